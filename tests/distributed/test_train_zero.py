"""ZeRO-1, 2 and 3 in real processes over gloo: the loop's losses, checkpoints on any number of ranks, LoRA, offload."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from alpaca_ray.config import LoraConfig, TrainConfig
from alpaca_ray.models import load_tokenizer
from alpaca_ray.schema import Example
from alpaca_ray.train import export, loop, model
from alpaca_ray.train.deepspeed import DeepSpeed
from alpaca_ray.train.encoding import Encoded, encode
from alpaca_ray.train.fsdp import Fsdp
from alpaca_ray.train.heldout import heldout_loss
from alpaca_ray.train.loop import StepMetrics
from alpaca_ray.train.strategy import Strategy
from tests.distributed.ranks import on_ranks
from tests.plain import fine_tune

STAGES = (1, 2, 3)
SAVED_STEP, NUM_STEPS = 4, 6
LORA = LoraConfig(rank=4, alpha=8.0, target_modules=["q_proj", "down_proj"])


@dataclass
class Outcome:
    """What rank 0 has of a run."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    error: str = ""
    heldout: float = 0.0
    num_forwards: int = 0  # of the first decoder layer's inside
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def demonstrations(directory: Path) -> list[Encoded]:
    """11 rows, in batches of 4, 4 and 3: the last one gives the ranks unequal shares."""
    tokenizer = load_tokenizer(str(directory))
    examples = [Example(f"{i}", f"Say {i}", "", "word " * (1 + i % 4)) for i in range(11)]
    return [row for e in examples if isinstance(row := encode(e, tokenizer, "alpaca", 512), Encoded)]


def config_for(directory: Path, **values: object) -> TrainConfig:
    defaults = {
        "base_model": str(directory),
        "num_epochs": 2,
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_ratio": 0.0,
        "compute_dtype": "float32",
        "strategy": "deepspeed",
        "checkpoint_every_steps": SAVED_STEP,
        "packing": False,
    }
    return TrainConfig.model_validate(defaults | values)


def run(
    state: Strategy, rows: list[Encoded], config: TrainConfig, on_checkpoint: Callable[[], None] = lambda: None
) -> Outcome:
    seen: list[StepMetrics] = []
    outcome = Outcome()

    def count(*_: object) -> None:
        outcome.num_forwards += 1

    state.model.base_model.get_submodule("layers.0.mlp").register_forward_pre_hook(count)
    try:
        loop.train(state, rows, config, seen.append, on_checkpoint)
    except loop.NotFinite as error:
        outcome.error = str(error)
    outcome.losses, outcome.grad_norms = [row.loss for row in seen], [row.grad_norm for row in seen]
    outcome.weights = dict(state.weights())
    return outcome


def train_all_ways(directory: Path, out: Path) -> dict[str, Outcome]:
    """What two ranks do."""
    rows, outcomes = demonstrations(directory), {}

    def go(name: str, stage: int, **values: object) -> None:
        config = config_for(directory, zero_stage=stage, **values)
        state = DeepSpeed(model.load(config), config)
        outcomes[f"{name} {stage}"] = run(state, rows, config)

    for stage in STAGES:
        outcomes |= save_on_the_way(directory, out, stage)
        go("packed", stage, packing=True, weight_decay=0.0)
        go("recomputed", stage, activation_checkpointing=True, num_epochs=1)
        go("offloaded", stage, cpu_offload=True, num_epochs=1)
        go("lora", stage, lora=LORA, num_epochs=1)
        go("bf16", stage, compute_dtype="bfloat16", num_epochs=1)
        go("diverging", stage, learning_rate=1e30, num_epochs=1)
    outcomes |= {f"resumed {name}": outcome for name, outcome in resume_all(directory, out).items()}
    oracles: dict[str, dict[str, Any]] = {
        "whole": {},
        "short": {"num_epochs": 1},
        "lora": {"lora": LORA, "num_epochs": 1},
        "recomputed": {"activation_checkpointing": True, "num_epochs": 1},
    }
    for name, values in oracles.items():
        config = config_for(directory, **values)
        state = Fsdp(model.load(config), config, model.make_mesh("cpu", dist.get_world_size()))
        outcomes[f"{name} fsdp"] = run(state, rows, config)
    return outcomes


def save_on_the_way(directory: Path, out: Path, stage: int) -> dict[str, Outcome]:
    """A run with a checkpoint at SAVED_STEP, and the held-out loss then."""
    rows, config = demonstrations(directory), config_for(directory, zero_stage=stage)
    state, heldout = DeepSpeed(model.load(config), config), []

    def on_checkpoint() -> None:
        state.save(out / f"stage{stage}" / f"step{state.step}").wait()
        if state.step == SAVED_STEP:
            write(state, config, out, stage)
        heldout.append(heldout_loss(state, rows, config))

    outcome = run(state, rows, config, on_checkpoint)
    outcome.heldout = heldout[0]
    return {f"whole {stage}": outcome}


def write(state: Strategy, config: TrainConfig, out: Path, stage: int) -> None:
    target = exported(out, stage, dist.get_world_size())
    export.write_trained(state, config, target if dist.get_rank() == 0 else None)


def exported(out: Path, stage: int, world_size: int) -> Path:
    return out / f"stage{stage}" / f"model of {world_size}"


def resume_all(directory: Path, out: Path) -> dict[str, Outcome]:
    """What any number of ranks do with the checkpoints of two."""
    rows, outcomes = demonstrations(directory), {}
    for stage in STAGES:
        config = config_for(directory, zero_stage=stage)
        state = DeepSpeed(model.load(config), config)
        state.load(out / f"stage{stage}" / f"step{SAVED_STEP}")
        assert state.step == SAVED_STEP
        if dist.get_world_size() != 2:
            write(state, config, out, stage)
        loss = heldout_loss(state, rows, config)
        outcomes[f"whole {stage}"] = run(state, rows, config)
        outcomes[f"whole {stage}"].heldout = loss
    return outcomes


@pytest.fixture(scope="module")
def trained(tiny_model: Path, out: Path) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = on_ranks(2, train_all_ways, tiny_model, out)
    return outcomes


@pytest.fixture(scope="module")
def resumed(tiny_model: Path, out: Path, trained: dict[str, Outcome]) -> Callable[[int], dict[str, Outcome]]:
    """What so many ranks make of the checkpoints of two; `trained` has written them."""
    return cache(lambda world_size: on_ranks(world_size, resume_all, tiny_model, out))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("way", "num_steps"), [("whole", NUM_STEPS), ("lora", NUM_STEPS // 2)])
def test_two_ranks_learn_what_fsdp_learns(trained: dict[str, Outcome], way: str, num_steps: int, stage: int) -> None:
    """With weight decay on the matrices alone, so the groups of the optimizer are the same too."""
    ours, theirs = trained[f"{way} {stage}"], trained[f"{way} fsdp"]
    assert len(ours.losses) == num_steps
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-6)
    assert ours.grad_norms == pytest.approx(theirs.grad_norms, rel=1e-6)
    assert ours.weights.keys() == theirs.weights.keys()
    for name, weight in theirs.weights.items():
        torch.testing.assert_close(ours.weights[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_learn_what_one_plain_process_learns(
    tiny_model: Path, trained: dict[str, Outcome], stage: int
) -> None:
    """Packed. The gradient's norm would show a wrong scale, which AdamW alone hides."""
    ours = trained[f"packed {stage}"]
    config = config_for(tiny_model, weight_decay=0.0)
    expected = fine_tune(tiny_model, demonstrations(tiny_model), config)
    assert ours.losses == pytest.approx([row[0] for row in expected], rel=1e-5)
    assert ours.grad_norms == pytest.approx([row[1] for row in expected], rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_masters_stay_fp32_where_bf16_computes(trained: dict[str, Outcome], stage: int) -> None:
    ours = trained[f"bf16 {stage}"]
    assert ours.losses == pytest.approx(trained["short fsdp"].losses, rel=1e-2)
    assert {weight.dtype for weight in ours.weights.values()} == {torch.float32}
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in ours.weights.values())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("way", ["recomputed", "offloaded"])
def test_saving_memory_changes_nothing(trained: dict[str, Outcome], way: str, stage: int) -> None:
    ours, plain = trained[f"{way} {stage}"], trained["short fsdp"]
    assert ours.losses == pytest.approx(plain.losses, rel=1e-6)
    assert ours.grad_norms == pytest.approx(plain.grad_norms, rel=1e-6)


@pytest.mark.parametrize("name", ["fsdp", *STAGES])
def test_activations_are_computed_again(trained: dict[str, Outcome], name: object) -> None:
    assert trained[f"recomputed {name}"].num_forwards == 2 * trained["short fsdp"].num_forwards > 0


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_not_finite_stops_before_the_weights_change(trained: dict[str, Outcome], stage: int) -> None:
    ours = trained[f"diverging {stage}"]
    assert len(ours.losses) == 1
    assert "step 2: loss" in ours.error
    assert all(weight.isfinite().all() for weight in ours.weights.values())


def agree(rest: Outcome, whole: Outcome, rel: float) -> None:
    """The steps after SAVED_STEP, the weights that compute right after loading, and the masters at the end."""
    assert rest.heldout == pytest.approx(whole.heldout, rel=rel)
    assert rest.losses == pytest.approx(whole.losses[SAVED_STEP:], rel=rel)
    assert rest.grad_norms == pytest.approx(whole.grad_norms[SAVED_STEP:], rel=rel * 10)
    for name, weight in whole.weights.items():
        torch.testing.assert_close(rest.weights[name], weight, rtol=rel * 100, atol=rel)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_the_uninterrupted_one(trained: dict[str, Outcome], stage: int) -> None:
    agree(trained[f"resumed whole {stage}"], trained[f"whole {stage}"], rel=0.0)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", [1, 3])
def test_other_numbers_of_ranks_go_on_where_two_stopped(
    trained: dict[str, Outcome], resumed: Callable[[int], dict[str, Outcome]], world_size: int, stage: int
) -> None:
    """3 do not divide the weights evenly."""
    agree(resumed(world_size)[f"whole {stage}"], trained[f"whole {stage}"], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", [1, 3])
def test_the_exported_model_does_not_depend_on_the_number_of_ranks(
    resumed: Callable[[int], dict[str, Outcome]], out: Path, world_size: int, stage: int
) -> None:
    assert resumed(world_size)
    ours, of_two = (exported(out, stage, n) for n in (world_size, 2))
    assert export.directory_hash(ours) == export.directory_hash(of_two)
