"""FSDP2 on two ranks, all weights and adapters alone: who brings the weights, checkpoints, and the exported model."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader

from alpaca_ray.config import LoraConfig, TrainConfig
from alpaca_ray.models import load_tokenizer
from alpaca_ray.schema import Example
from alpaca_ray.train import export, loop, model
from alpaca_ray.train.encoding import Encoded, encode
from alpaca_ray.train.fsdp import Fsdp
from tests.distributed.ranks import on_ranks

LORA = LoraConfig(rank=4, alpha=8.0, target_modules=["q_proj", "down_proj"])
WAYS: dict[str, dict[str, object]] = {
    "whole": {},
    "lora": {"lora": LORA},
    "lora in bf16": {"lora": LORA, "compute_dtype": "bfloat16"},
}
SAVED_STEP, NUM_STEPS = 2, 4


@dataclass
class Outcome:
    """What rank 0 saw: losses and gradient norms by step."""

    uninterrupted: list[tuple[float, float]] = field(default_factory=list)
    all_loaded: list[tuple[float, float]] = field(default_factory=list)  # every rank had read the weights itself
    resumed: list[tuple[float, float]] = field(default_factory=list)


def config_for(directory: Path, way: str) -> TrainConfig:
    values: dict[str, object] = {
        "base_model": str(directory),
        "num_epochs": 2,
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_ratio": 0.0,
        "compute_dtype": "float32",
        "checkpoint_every_steps": SAVED_STEP,
    }
    return TrainConfig.model_validate(values | WAYS[way])


def build(config: TrainConfig, *, all_load: bool = False) -> Fsdp:
    plain = model.load(config, with_weights=all_load or dist.get_rank() == 0)
    return Fsdp(plain, config, model.make_mesh("cpu", dist.get_world_size()))


def run(state: Fsdp, config: TrainConfig, out: Path | None = None) -> list[tuple[float, float]]:
    """Train to the end; at SAVED_STEP leave a checkpoint and an exported model in `out`."""
    tokenizer = load_tokenizer(config.base_model)
    examples = [Example(f"{i}", f"Say {i}", "", "word " * (1 + i % 4)) for i in range(7)]  # in batches of 4 and 3
    rows = [row for e in examples if isinstance(row := encode(e, tokenizer, "alpaca", 512), Encoded)]
    seen: list[loop.StepMetrics] = []

    def on_checkpoint() -> None:
        if out is not None and state.step == SAVED_STEP:
            part = out / f"part of {dist.get_rank()}"
            state.save(part).wait()
            merge(part, out / "checkpoint")
            write(state, config, out)

    loop.train(state, rows, config, seen.append, on_checkpoint)
    return [(row.loss, row.grad_norm) for row in seen]


def merge(part: Path, whole: Path) -> None:
    """What Ray does with the parts of nodes that share no disk. Collective."""
    whole.mkdir(exist_ok=True)
    for file in part.iterdir():
        file.rename(whole / file.name)
    dist.barrier()


def write(state: Fsdp, config: TrainConfig, out: Path) -> None:
    is_first, name = dist.get_rank() == 0, f"model of {dist.get_world_size()}"
    export.write_trained(state, config, out / name if is_first else None)


def train_and_resume(directory: Path, out: Path) -> dict[str, Outcome]:
    """What two ranks do."""
    outcomes = {}
    for way in WAYS:
        config, outcome = config_for(directory, way), Outcome()
        outcome.uninterrupted = run(build(config), config, out / way)
        outcome.all_loaded = run(build(config, all_load=True), config)
        resumed = build(config)
        resumed.load(out / way / "checkpoint")
        assert resumed.step == SAVED_STEP
        outcome.resumed = run(resumed, config)
        outcomes[way] = outcome
    return outcomes


def export_and_go_on(directory: Path, out: Path) -> dict[str, list[tuple[float, float]]]:
    """What one rank does with the checkpoints of two."""
    seen = {}
    for way in WAYS:
        config = config_for(directory, way)
        state = build(config)
        state.load(out / way / "checkpoint")
        write(state, config, out / way)
        seen[way] = run(state, config)
    return seen


@pytest.fixture(scope="module")
def outcomes(tiny_model: Path, out: Path) -> dict[str, Outcome]:
    found: dict[str, Outcome] = on_ranks(2, train_and_resume, tiny_model, out)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_who_brings_the_weights_changes_no_bit(outcomes: dict[str, Outcome], way: str) -> None:
    assert len(outcomes[way].uninterrupted) == NUM_STEPS
    assert outcomes[way].uninterrupted == outcomes[way].all_loaded


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_equals_the_uninterrupted_one(outcomes: dict[str, Outcome], way: str) -> None:
    assert outcomes[way].resumed == outcomes[way].uninterrupted[SAVED_STEP:]


def test_adapters_alone_are_saved(outcomes: dict[str, Outcome], out: Path) -> None:
    """The base is no part of a checkpoint: every run reads it anyway."""
    assert outcomes
    for way, num_weights in {"whole": 21, "lora": 8, "lora in bf16": 8}.items():
        saved = FileSystemReader(out / way / "checkpoint").read_metadata().state_dict_metadata
        weights = {name for name in saved if name.startswith("model.")}
        moments = {name for name in saved if name.endswith("exp_avg")}
        assert len(weights) == num_weights, weights
        assert {name.split(".lora_")[-1] for name in weights} == ({"a", "b"} if way != "whole" else weights)
        assert len(moments) == num_weights - (way == "whole")  # the head is the embedding


@pytest.fixture(scope="module")
def of_one_rank(outcomes: dict[str, Outcome], tiny_model: Path, out: Path) -> dict[str, list[tuple[float, float]]]:
    assert outcomes
    found: dict[str, list[tuple[float, float]]] = on_ranks(1, export_and_go_on, tiny_model, out)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_one_rank_goes_on_where_two_stopped(
    outcomes: dict[str, Outcome], of_one_rank: dict[str, list[tuple[float, float]]], way: str
) -> None:
    rel = 1e-2 if way == "lora in bf16" else 1e-5
    for ours, of_two in zip(of_one_rank[way], outcomes[way].uninterrupted[SAVED_STEP:], strict=True):
        assert ours == pytest.approx(of_two, rel=rel)


def test_the_exported_model_does_not_depend_on_the_number_of_ranks(
    of_one_rank: dict[str, list[tuple[float, float]]], tiny_model: Path, out: Path
) -> None:
    assert of_one_rank
    base = load_file(tiny_model / "model.safetensors")
    for way in WAYS:
        one, two = (out / way / f"model of {n}" for n in (1, 2))
        assert export.directory_hash(one) == export.directory_hash(two)
        tuned = load_file(two / "model.safetensors")
        changed = {name for name, weight in base.items() if not torch.equal(tuned[name], weight)}
        assert {name.split(".")[-2] for name in changed} >= {"q_proj", "down_proj"}
