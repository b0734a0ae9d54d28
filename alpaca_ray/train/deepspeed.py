"""DeepSpeed's ZeRO (Rajbhandari et al. 2020) behind the same loop; its import has effects, so it waits for a call.

Stage 1 shards the optimizer's state and the fp32 masters over the ranks, stage 2 the gradients too, stage 3 also the
weights that compute.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import pad
from transformers import PreTrainedModel

from alpaca_ray.config import TrainConfig, UserError
from alpaca_ray.train.model import make_optimizer, wrap_layers
from alpaca_ray.train.strategy import Weights

WEIGHT = "fp32"  # the master
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's names for what it remembers of a weight
FILE = "zero-{:05d}-of-{:05d}.safetensors"
INSTALL = "pip install 'deepspeed>=0.19,<1'"


def refuse(config: TrainConfig) -> None:
    """Raises UserError for what this strategy cannot do; imports nothing."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"train.strategy is deepspeed, which is not installed here: {INSTALL}, or choose fsdp")
    if config.compile:
        raise UserError("train.compile is not for train.strategy deepspeed: set it to false, or choose fsdp")


def settings(config: TrainConfig, hidden_size: int) -> dict[str, Any]:
    """DeepSpeed's own configuration. The sizes, in elements, are those of transformers' "auto"."""
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    if config.cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if config.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": 1,  # the loop says where a step ends, and has scaled the loss
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": config.compute_dtype == "bfloat16", "check_grad_overflow": True},
        # bf16 gradients would lose the small ones of a long accumulation
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW: DeepSpeed's wants a C++ compiler on every node
    }


class Saved:
    """A checkpoint that is written."""

    def wait(self) -> None:
        """See Saving.wait."""


class DeepSpeed:
    """The strategy of strategy.py; `model` is DeepSpeed's engine, which passes on to the model what it lacks itself."""

    step: int

    def __init__(self, model: PreTrainedModel, config: TrainConfig) -> None:
        refuse(config)
        self._library = load_library(on_gpu=config.placement.num_gpus > 0)
        wrap_layers(model, config)
        self._optimizer = make_optimizer(model, config)
        self._engine, self._zero, *_ = self._library.initialize(
            model=model, optimizer=self._optimizer, config=settings(config, model.config.hidden_size)
        )
        self._make_moments()
        self._engine.config = model.config  # DeepSpeed's own would hide it, and is of no more use
        self.model: PreTrainedModel = self._engine
        self.device: torch.device = self._engine.device  # ZeRO-3 may keep the weights in host memory

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See Strategy.backward. DeepSpeed averages gradients over the ranks, hence the scale."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * dist.get_world_size())

    def update(self, learning_rate: float, max_grad_norm: float, check: Callable[[float], None]) -> float:
        """See Strategy.update. A norm that is not finite comes as infinity, and leaves the weights as they are."""
        self._zero.clip_grad = max_grad_norm
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        # The hook comes after clipping and before the first weight changes, and not at all if the norm is not finite.
        with self._optimizer.register_step_pre_hook(lambda *_: check(float(self._zero._global_grad_norm))):
            self._engine.step()
        grad_norm = float(self._engine.get_global_grad_norm())
        check(grad_norm)
        self.step += 1
        return grad_norm

    def save(self, directory: Path) -> Saved:
        """See Strategy.save; returns when it is written. Of weights and their moments, those that are trained.

        Needs a step done, or a load: before, DeepSpeed knows no moments.
        """
        directory.mkdir(parents=True, exist_ok=True)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        shares = {
            f"{name}/{kind}": self._full(parameter, kind).flatten().tensor_split(world_size)[rank].cpu().clone()
            for name, parameter in self._trained()
            for kind in (WEIGHT, *MOMENTS)
        }
        save_file(shares, directory / FILE.format(rank, world_size), {"step": str(self.step)})
        return Saved()

    def load(self, directory: Path) -> None:
        """See Strategy.load; any number of ranks may have saved it. Raises UserError if a rank's part is missing."""
        with ExitStack() as opened:
            parts = [opened.enter_context(safe_open(path, "pt")) for path in complete(directory)]
            step = int(parts[0].metadata()["step"])
            self._restore(parts, WEIGHT)
            self._step_in_place()
            for kind in MOMENTS:
                self._restore(parts, kind)
        self._set_steps(step)

    def weights(self) -> Weights:
        """See Strategy.weights. Those that are not trained were rounded to the dtype that computes."""
        module = self._engine.module
        parameters = dict(module.named_parameters(remove_duplicate=False))  # tied ones by both names
        rest = {name: value for name, value in module.state_dict().items() if name not in parameters}

        def whole(name: str) -> Tensor:
            return self._full(parameters[name], WEIGHT) if name in parameters else cast(Tensor, rest[name])

        return Weights(parameters | rest, whole, has_values=dist.get_rank() == 0)

    def _make_moments(self) -> None:
        """Stages 1 and 2 look for the moments of all groups of weights when only the first group has been stepped.

        Without them nothing of the other groups could be saved. Stage 3 has no weights in the groups, and no need.
        """
        flat = [p for group in self._optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in flat]
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0
        for p in flat:
            p.grad = torch.zeros_like(p)
        self._optimizer.step()
        for p, gradient in zip(flat, gradients, strict=True):
            p.grad = gradient
        self._set_steps(0)

    def _set_steps(self, step: int) -> None:
        for state in self._optimizer.state.values():
            state["step"].fill_(step)  # Adam's bias correction
        self.step = step

    def _trained(self) -> Iterator[tuple[str, Parameter]]:
        return ((name, p) for name, p in self._engine.module.named_parameters() if p.requires_grad)

    def _full(self, parameter: Parameter, kind: str) -> Tensor:
        """A whole weight, or one of its moments, on every rank."""
        if not parameter.requires_grad:
            with self._library.zero.GatheredParameters([parameter]):
                return parameter.detach().clone()
        if kind == WEIGHT:
            return cast(Tensor, self._library.utils.safe_get_full_fp32_param(parameter))
        return cast(Tensor, self._library.utils.safe_get_full_optimizer_state(parameter, kind))

    def _restore(self, parts: Sequence[Any], kind: str) -> None:
        for name, parameter in self._trained():
            self._set(parameter, kind, torch.cat([part.get_tensor(f"{name}/{kind}") for part in parts]))

    def _set(self, parameter: Parameter, kind: str, value: Tensor) -> None:
        utils, share = self._library.utils, getattr(parameter, "ds_tensor", None)
        if share is not None:
            # Stage 3: its own setter of whole weights fails where they do not divide evenly by the ranks.
            size, rank = share.numel(), dist.get_rank()
            value = pad(value, (0, size * dist.get_world_size() - value.numel()))[rank * size : (rank + 1) * size]
        if kind == WEIGHT:
            (utils.safe_set_full_fp32_param if share is None else utils.safe_set_local_fp32_param)(parameter, value)
        else:
            set_state = utils.safe_set_full_optimizer_state if share is None else utils.safe_set_local_optimizer_state
            set_state(parameter, value, kind)

    def _step_in_place(self) -> None:
        """A step of rate 0: it makes the moments, and copies the masters to the weights that compute."""
        ids = torch.zeros((1, 2), dtype=torch.long, device=self._engine.device)
        self.backward(0.0 * self.model(input_ids=ids, use_cache=False).logits.sum(), last=True)
        self.update(0.0, 1.0, lambda _: None)


def load_library(*, on_gpu: bool) -> Any:
    """Import DeepSpeed, which looks for an accelerator once and for all."""
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # else it takes a GPU that this worker did not ask for
    import deepspeed

    # An all-reduce for inference on CPUs: it would be compiled on every node, and end the run where no compiler is.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)  # its calls, not ours
    return deepspeed


def complete(directory: Path) -> list[Path]:
    """All ranks' parts of a checkpoint, in the order of the ranks. Raises UserError if one is missing."""
    found = sorted(directory.glob("zero-*.safetensors"))
    world_size = int(found[0].stem.rpartition("-")[2]) if found else 0
    if not found or [path.name for path in found] != [FILE.format(rank, world_size) for rank in range(world_size)]:
        raise UserError(
            f"{directory} is no whole checkpoint of train.strategy deepspeed: it holds {[p.name for p in found]}. "
            "Remove it, and the run goes on from the one before"
        )
    return found
