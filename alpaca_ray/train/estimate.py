"""What a training run will need and cost, before it starts: memory of each rank, time, dollars; and what would fit.

`alpaca-ray estimate --recipe alpaca_7b --gpu a100-80gb --mfu 0.4`
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from importlib import resources
from typing import Any

import yaml
from transformers import AutoConfig, PreTrainedConfig

from alpaca_ray import models
from alpaca_ray.config import LoraConfig, RunConfig, Strict, TrainConfig, UserError, nearest
from alpaca_ray.train import memory
from alpaca_ray.train.loop import total_steps
from alpaca_ray.train.memory import Memory
from alpaca_ray.train.metrics import flops_per_token

GIB = 2**30
RESERVED_SHARE = 0.08  # of a GPU's memory: CUDA's own, cuBLAS and NCCL buffers, what the allocator cannot use
TOKENS_PER_EXAMPLE = 139.0  # Alpaca's 52,002 rows: about 21.6M tokens in 3 epochs
DEFAULT_MFU = 0.4  # 7B on A100s has reached 0.57 to 0.68 with long sequences; Alpaca's own run had about 0.03
DEFAULT_GPU = "a100-80gb"


class Gpu(Strict):
    """A row of gpus.yaml."""

    cuda_name: str  # a part of what CUDA calls it
    memory_gib: float
    peak_tflops: float
    power_w: float
    usd_per_hour: float | None
    price: str = ""
    read: date | None = None
    source: str = ""


@dataclass(frozen=True)
class Basis:
    """What an estimate takes for granted."""

    mfu: float = DEFAULT_MFU  # of useful tokens, over the whole run
    tokens_per_example: float = TOKENS_PER_EXAMPLE


@dataclass(frozen=True)
class Estimate:
    """One run on one kind of device."""

    memory: Memory
    num_parameters: int
    num_trained: int
    num_workers: int
    num_steps: int
    num_tokens: int  # of all epochs
    device_bytes: int | None  # None: not known
    time_s: float | None  # None: no peak is known
    usd: float | None

    @property
    def fits(self) -> bool:
        """Whether a rank fits its device, as far as that is known."""
        return self.device_bytes is None or self.memory.device <= self.device_bytes * (1 - RESERVED_SHARE)


def gpus() -> dict[str, Gpu]:
    """The GPU types that we know, by name."""
    return {name: Gpu.model_validate(row) for name, row in _table("gpus.yaml").items()}


def gpu_named(name: str) -> Gpu:
    """Raises UserError that names the nearest."""
    if name not in gpus():
        raise UserError(f"unknown GPU {name!r}{nearest(name, list(gpus()))} (there are: {', '.join(gpus())})")
    return gpus()[name]


def shapes_of(base_model: str) -> PreTrainedConfig:
    """The model's config: from our table where it is there, so without its hub; else its own. Raises UserError."""
    known = _table("shapes.yaml").get(base_model)
    if known is None:
        loaded: PreTrainedConfig = models.load_config(base_model)
        return loaded
    made: PreTrainedConfig = AutoConfig.for_model(**known)
    return made


def estimate(config: RunConfig, gpu: Gpu | None, basis: Basis) -> Estimate:
    """On the most workers that the config allows. `gpu` None: a CPU, of which only `train.peak_tflops` is known."""
    train, shapes = config.train, shapes_of(config.train.base_model)
    num_workers = train.workers[1]
    model = memory.without_values(train, shapes)
    parameters = list(model.parameters())
    num_examples = round(config.generate.num_instructions * (1 - train.heldout_fraction))
    num_tokens = round(train.num_epochs * num_examples * basis.tokens_per_example)
    peak = train.peak_tflops or (gpu.peak_tflops if gpu else None)
    flops = num_tokens * flops_per_token(model, basis.tokens_per_example)
    time_s = None if peak is None else flops / (peak * 1e12 * basis.mfu * num_workers)
    price = gpu.usd_per_hour if gpu else None
    kept = memory.activations(train, shapes, "cuda" if gpu else "cpu")
    return Estimate(
        memory=memory.per_rank(train, shapes, num_workers, kept),
        num_parameters=sum(p.numel() for p in parameters),
        num_trained=sum(p.numel() for p in parameters if p.requires_grad),
        num_workers=num_workers,
        num_steps=total_steps(num_examples, train),
        num_tokens=num_tokens,
        device_bytes=round(gpu.memory_gib * GIB) if gpu else None,
        time_s=time_s,
        usd=None if price is None or time_s is None else price * num_workers * time_s / 3600,
    )


def report(config: RunConfig, gpu_name: str | None, basis: Basis) -> tuple[str, bool]:
    """The text that the command prints, and whether the run fits. Raises UserError for an unknown GPU."""
    if not 0 < basis.mfu <= 1 or basis.tokens_per_example <= 0:
        raise UserError("--mfu is a share above 0 and up to 1, --tokens-per-example a number above 0")
    gpu = gpu_named(gpu_name) if gpu_name else None
    result = estimate(config, gpu, basis)
    text = render(config, result, gpu_name, basis)
    if result.fits or result.device_bytes is None:
        return text, True
    room = round(result.device_bytes * (1 - RESERVED_SHARE))
    remedies = what_fits(config.train, shapes_of(config.train.base_model), result.num_workers, room)
    listed = [f"  {remedy}" for remedy in remedies] or ["  a larger GPU, or a smaller model"]
    return "\n".join([text, "", "it would fit with any of", *listed]), False


def refuse_unfit(config: TrainConfig, shapes: PreTrainedConfig, device_memory_bytes: int) -> None:
    """Raises UserError if a rank cannot fit its GPU on the fewest workers allowed; it names what would fit."""
    num_workers, room = config.workers[0], round(device_memory_bytes * (1 - RESERVED_SHARE))
    need = memory.per_rank(config, shapes, num_workers, memory.activations(config, shapes, "cuda")).device
    if need <= room:
        return
    remedies = list(what_fits(config, shapes, num_workers, room))
    raise UserError(
        f"train: {config.base_model} on {num_workers} workers needs {need / GIB:.1f} GiB on each GPU, which has room "
        f"for {room / GIB:.1f}. "
        + (f"It would fit with {'; or '.join(remedies)}" if remedies else "Choose a larger GPU or a smaller model")
    )


def what_fits(config: TrainConfig, shapes: PreTrainedConfig, num_workers: int, room_bytes: int) -> Iterator[str]:
    """Changes that make a rank fit, each as options with what it would need; if no one does alone, all together."""

    as_it_is = memory.activations(config, shapes, "cuda")

    def need(changes: Mapping[str, Any]) -> int:
        changed = config.model_copy(update=dict(changes))
        same = not changes.keys() & set(memory.TRACED)
        kept = as_it_is if same else memory.activations(changed, shapes, "cuda")
        return memory.per_rank(changed, shapes, changes.get("num_workers", num_workers), kept).device

    fitting: list[dict[str, Any]] = []
    together: dict[str, Any] = {}
    for changes in _changes(config, num_workers):
        if "num_workers" in changes and any("num_workers" in seen for seen in fitting):
            continue  # the fewest are enough
        needed = need(changes)
        if needed <= room_bytes:
            fitting.append(changes)
            yield f"{_options(changes)} ({needed / GIB:.1f} GiB)"
        if "num_workers" not in changes and "lora" not in changes:
            together |= changes
    if not fitting and together and (needed := need(together)) <= room_bytes:
        yield f"{_options(together)} ({needed / GIB:.1f} GiB)"


def render(config: RunConfig, result: Estimate, gpu_name: str | None, basis: Basis) -> str:
    """The table that the command prints, its assumptions below."""
    lines = [*_memory_lines(result), "", *_cost_lines(result), "", *_assumptions(config, result, gpu_name, basis)]
    return "\n".join([_headline(config.train, result, gpu_name), "", *lines])


def _changes(config: TrainConfig, num_workers: int) -> Iterator[dict[str, Any]]:
    if not config.activation_checkpointing:
        yield {"activation_checkpointing": True}
    if config.micro_batch_size > 1:
        yield {"micro_batch_size": 1}
    if not config.cpu_offload:
        yield {"cpu_offload": True}
    for factor in (2, 4, 8):
        yield {"num_workers": num_workers * factor}
    if config.lora is None:
        yield {"lora": LoraConfig()}


def _options(changes: Mapping[str, Any]) -> str:
    shown = {name: f"rank {value.rank}" if isinstance(value, LoraConfig) else value for name, value in changes.items()}
    return ", ".join(f"train.{name} {str(value).lower()}" for name, value in shown.items())


def _headline(train: TrainConfig, result: Estimate, gpu_name: str | None) -> str:
    trained = "all" if result.num_trained == result.num_parameters else f"{result.num_trained / 1e6:.1f}M"
    device = gpu_name or "CPU"
    return (
        f"{train.base_model}: {result.num_parameters / 1e9:.2f}B parameters, {trained} trained, "
        f"on {result.num_workers} x {device}, {_strategy(train)}"
    )


def _strategy(train: TrainConfig) -> str:
    name = "FSDP2" if train.strategy == "fsdp" else f"DeepSpeed ZeRO-{train.zero_stage}"
    extras = [("activation checkpointing", train.activation_checkpointing), ("CPU offload", train.cpu_offload)]
    return ", ".join([name, *(extra for extra, on in extras if on)])


def _memory_lines(result: Estimate) -> list[str]:
    terms = {
        "weights, this rank's shards": result.memory.parameters,
        "gradients": result.memory.gradients,
        "AdamW's moments": result.memory.optimizer,
        "layers gathered to compute": result.memory.gathered,
        "activations": result.memory.activations,
        "logits or a layer's gradients": result.memory.transient,
        "together": result.memory.device,
    }
    lines = ["memory of a rank               GiB"]
    lines += [f"  {name:<29}{size / GIB:>6.2f}" for name, size in terms.items()]
    if result.memory.host:
        lines.append(f"  {'in host memory besides':<29}{result.memory.host / GIB:>6.2f}")
    if result.device_bytes is not None:
        room = result.device_bytes * (1 - RESERVED_SHARE)
        lines.append(f"  {'room':<29}{room / GIB:>6.2f}   {'fits' if result.fits else 'DOES NOT FIT'}")
    return lines


def _cost_lines(result: Estimate) -> list[str]:
    lines = [
        f"steps                          {result.num_steps:,}",
        f"tokens                         {result.num_tokens:,}",
    ]
    if result.time_s is not None:
        minutes = math.ceil(result.time_s / 60)
        lines.append(f"time                           {minutes // 60} h {minutes % 60:02d} min")
    if result.usd is not None:
        lines.append(f"cost                           ${result.usd:,.2f}")
    return lines


def _assumptions(config: RunConfig, result: Estimate, gpu_name: str | None, basis: Basis) -> list[str]:
    train, gpu = config.train, gpu_named(gpu_name) if gpu_name else None
    lines = [
        "assumptions",
        f"  {config.generate.num_instructions:,} examples less {train.heldout_fraction:.0%} held out, "
        f"{basis.tokens_per_example:g} tokens each, {train.num_epochs} epochs",
        f"  micro-batches of {train.micro_batch_size} full rows of {train.max_length} tokens, computed in "
        f"{train.compute_dtype}; half of the tokens are targets",
    ]
    if result.time_s is not None:
        peak = train.peak_tflops or (gpu.peak_tflops if gpu else 0)
        lines.append(
            f"  MFU {basis.mfu:.0%} of {peak:g} TFLOP/s; steps only: no start, checkpoint, export or evaluation"
        )
    if gpu is not None:
        lines.append(
            f"  {gpu.memory_gib} GiB on a GPU, of which {RESERVED_SHARE:.0%} are left to CUDA and the allocator"
        )
    if gpu is not None and gpu.usd_per_hour is not None:
        lines.append(f"  ${gpu.usd_per_hour:.2f} a GPU and hour: {gpu.price}, read {gpu.read}, {gpu.source}")
    return lines


def _table(name: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((resources.files("alpaca_ray") / "train" / name).read_text(encoding="utf-8"))
    return read
