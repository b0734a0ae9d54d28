"""FSDP2 in groups of 1, 2 and 4 processes against plain torch in one: 200 steps, the same losses and gradient norms."""

import json
import multiprocessing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import Parameter
from transformers import PreTrainedModel

from alpaca_ray.config import TrainConfig
from alpaca_ray.models import load_tokenizer
from alpaca_ray.schema import Example
from alpaca_ray.train import loop, model
from alpaca_ray.train.encoding import Encoded, encode
from alpaca_ray.train.fsdp import Fsdp
from alpaca_ray.train.heldout import heldout_loss
from tests import plain

NUM_STEPS, BF16_STEPS = 200, 20
BATCH, NUM_EXAMPLES = 6, 21  # a short batch at the end of each epoch, of 3


@dataclass(frozen=True)
class Run:
    """What differs between runs of one group."""

    optimizer: str = "adamw"
    packing: bool = True
    micro_batch_size: int = 2
    compute_dtype: str = "float32"
    with_weights: bool = True  # on ranks after the first

    def config(self, directory: Path) -> TrainConfig:
        num_steps = NUM_STEPS if self.compute_dtype == "float32" else BF16_STEPS
        return TrainConfig(
            base_model=str(directory),
            max_length=256,
            num_epochs=num_steps // 4,  # of 4 steps each
            global_batch_size=BATCH,
            micro_batch_size=self.micro_batch_size,
            packing=self.packing,
            compute_dtype="float32" if self.compute_dtype == "float32" else "bfloat16",
            # Below the edge of stability, where rounding errors grow from step to step.
            learning_rate=0.05 if self.optimizer == "sgd" else 3e-4,
            weight_decay=0.0,
            warmup_ratio=0.0,
            checkpoint_every_steps=1000,
        )


# AdamW alone would hide gradients of a wrong scale.
RUNS = {
    1: [Run("sgd"), Run("adamw", packing=False)],
    2: [
        Run("sgd", packing=False, micro_batch_size=1),
        Run("sgd", packing=True, micro_batch_size=3),
        Run("adamw", packing=True, micro_batch_size=1, with_weights=False),
        Run("adamw", packing=False, micro_batch_size=3),
        Run("adamw", compute_dtype="bfloat16"),
    ],
    4: [Run("sgd", micro_batch_size=1), Run("adamw")],
}


def examples(directory: Path) -> list[Encoded]:
    tokenizer = load_tokenizer(str(directory))
    made = [Example(f"{i:02d}", f"Say {i}", "", "word " * (1 + 3 * (i % 5))) for i in range(NUM_EXAMPLES)]
    return [row for e in made if isinstance(row := encode(e, tokenizer, "alpaca", 256), Encoded)]


def sgd(parameters: Iterable[Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=config.learning_rate)


def sharded_sgd(plain: PreTrainedModel, config: TrainConfig) -> torch.optim.Optimizer:
    return sgd(plain.parameters(), config)


def train_all(rank: int, world_size: int, directory: Path, target: Path) -> None:
    """One process of a group; the first writes what it has seen."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{target}/store", rank=rank, world_size=world_size)
    rows = [train(run, rank, world_size, directory) for run in RUNS[world_size]]
    if rank == 0:
        (target / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def train(run: Run, rank: int, world_size: int, directory: Path) -> dict[str, Any]:
    config, rows = run.config(directory), examples(directory)
    made = model.load(config, with_weights=run.with_weights or rank == 0)
    optimizer = sharded_sgd if run.optimizer == "sgd" else model.make_optimizer
    state = Fsdp(made, config, model.make_mesh("cpu", world_size), optimizer)
    first = heldout_loss(state, rows[:5], config)
    seen: list[loop.StepMetrics] = []
    loop.train(state, rows, config, seen.append, lambda: None)
    return {"losses": [r.loss for r in seen], "norms": [r.grad_norm for r in seen], "heldout": first}


@pytest.fixture(scope="module")
def outcomes(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, Run], dict[str, Any]]:
    """By world size and run. The processes are forks of one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    found: dict[tuple[int, Run], dict[str, Any]] = {}
    for world_size, runs in RUNS.items():
        target = tmp_path_factory.mktemp(f"ranks{world_size}")
        arguments = [(rank, world_size, tiny_model, target) for rank in range(world_size)]
        processes = [context.Process(target=train_all, args=each) for each in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * world_size
        rows = json.loads((target / "rows.json").read_text())
        found |= {(world_size, run): row for run, row in zip(runs, rows, strict=True)}
    return found


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> dict[str, list[tuple[float, float]]]:
    """(loss, gradient norm) of each step in the plain loop, by optimizer."""
    rows = examples(tiny_model)
    return {
        name: plain.fine_tune(tiny_model, rows, Run(name).config(tiny_model), make_optimizer)
        for name, make_optimizer in (("sgd", sgd), ("adamw", plain.adamw))
    }


@pytest.mark.parametrize(
    ("world_size", "run"), [(n, r) for n, runs in RUNS.items() for r in runs if r.compute_dtype == "float32"], ids=str
)
def test_losses_and_gradient_norms_are_those_of_plain_torch(
    outcomes: dict[tuple[int, Run], dict[str, Any]],
    expected: dict[str, list[tuple[float, float]]],
    world_size: int,
    run: Run,
) -> None:
    ours, theirs = outcomes[world_size, run], expected[run.optimizer]
    assert len(theirs) == NUM_STEPS
    assert ours["losses"] == pytest.approx([loss for loss, _ in theirs], rel=1e-6)
    assert ours["norms"] == pytest.approx([norm for _, norm in theirs], rel=2e-5)
    assert ours["losses"][-1] < 0.9 * ours["losses"][0]


def test_bf16_stays_near(
    outcomes: dict[tuple[int, Run], dict[str, Any]], expected: dict[str, list[tuple[float, float]]]
) -> None:
    """bf16 keeps 8 bits: 4e-3 of each value, less of a mean over many. A schedule of its own: compared at first."""
    ours = outcomes[2, Run("adamw", compute_dtype="bfloat16")]["losses"]
    assert len(ours) == BF16_STEPS
    assert ours[:4] == pytest.approx([loss for loss, _ in expected["adamw"][:4]], rel=2e-3)
    assert ours[-1] < ours[0]


def test_a_rank_without_weights_gets_its_part_of_the_first_rank(
    outcomes: dict[tuple[int, Run], dict[str, Any]],
) -> None:
    losses = {outcome["heldout"] for (n, run), outcome in outcomes.items() if run.compute_dtype == "float32"}
    assert max(losses) == pytest.approx(min(losses), rel=1e-6)
