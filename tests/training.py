"""A small training run and a driver for it: which examples each step read, what to kill and when.

python -m tests.training PLAN.json
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Timer
from typing import Any, overload

import pyarrow as pa
import ray
import torch.distributed as dist

from alpaca_ray.artifacts import RunDirectory, Stage, begin_stage, open_run, table_hash
from alpaca_ray.config import RunConfig
from alpaca_ray.schema import DATASET_SCHEMA
from alpaca_ray.settings import load_config
from alpaca_ray.train import trainer
from alpaca_ray.train.encoding import Encoded
from alpaca_ray.train.loop import StepMetrics


def dataset(num_examples: int) -> list[dict[str, Any]]:
    """Short demonstrations with answers of several lengths."""
    return [
        {"id": f"{i:03d}", "instruction": f"Say {i}", "input": "", "output": "word " * (1 + i % 4)}
        for i in range(num_examples)
    ]


def arguments(storage: Path, tiny_model: Path, **overrides: object) -> list[str]:
    """Options of a run that takes two workers a few seconds."""
    values = {
        "base_model": tiny_model,
        "heldout_fraction": 0.15,
        "max_length": 256,
        "num_epochs": 2,
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "learning_rate": 1e-2,
        "warmup_ratio": 0.0,
        "compute_dtype": "float32",
        "checkpoint_every_steps": 2,
        "max_failures": 1,
        "num_workers": 2,
        **overrides,
    }
    options = [f"--train.{name.replace('_', '-')}={value}" for name, value in values.items()]
    return ["--recipe=tiny_cpu", "--name=r", f"--storage-path={storage}", "--train.placement.num-cpus=1", *options]


def finish_generate(run: RunDirectory, config: RunConfig, rows: list[dict[str, Any]]) -> None:
    """As if the first stage had made these rows."""
    table = pa.Table.from_pylist(rows, schema=DATASET_SCHEMA)
    run.write_table("generate/dataset.parquet", table)
    begin_stage(run, config, "generate", {}).finish({}, {"dataset.parquet": table_hash(table)})


def begin(storage: Path, tiny_model: Path, rows: list[dict[str, Any]], **overrides: object) -> Stage:
    """A run whose dataset is done, and whose train stage was begun or is gone on with."""
    config = load_config(arguments(storage, tiny_model, **overrides))
    run = open_run(config.storage_path, config.name)
    if not run.exists("generate/manifest.json"):
        finish_generate(run, config, rows)
    return begin_stage(run, config, "train", trainer.inputs(run))


@dataclass(frozen=True)
class Seen:
    """A step as one rank saw it."""

    at_s: float
    step: int
    rank: int
    world_size: int
    pid: int
    node_id: str
    loss: float
    ids: list[str]


class Reading(Sequence[Encoded]):
    """Examples that remember which of them were read."""

    def __init__(self, examples: Sequence[Encoded]) -> None:
        self._examples = examples
        self.ids: list[str] = []

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | Sequence[Encoded]:
        row = self._examples[index]
        if isinstance(row, Encoded):
            self.ids.append(row.id)
        return row


@dataclass
class Recorder:
    """Writes down what each rank does, and kills ranks with SIGKILL after given steps, each once."""

    directory: Path
    kills: list[tuple[int, int, float]]  # (step, rank modulo the number of ranks, seconds after the step)
    pace_s: float = 0.0  # of a step, at least, until there is a file `hurry`
    reading: Reading | None = field(default=None)

    def view(self, examples: Sequence[Encoded]) -> Sequence[Encoded]:
        """The same, and `on_step` knows what was read."""
        self.reading = Reading(examples)
        return self.reading

    def on_step(self, row: StepMetrics) -> None:
        """Record the step, then kill this process if it is its turn."""
        assert self.reading is not None
        rank, world_size = dist.get_rank(), dist.get_world_size()
        node_id = ray.get_runtime_context().get_node_id()
        seen = Seen(time.time(), row.step, rank, world_size, os.getpid(), node_id, row.loss, self.reading.ids)
        self.reading.ids = []
        with (self.directory / f"seen-{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(asdict(seen)) + "\n")
        for step, victim, delay_s in self.kills:
            if row.step == step and rank == victim % world_size and not (self.directory / f"killed-{step}").exists():
                Timer(delay_s, self._kill, [step]).start() if delay_s else self._kill(step)
        if not (self.directory / "hurry").exists():
            time.sleep(max(0.0, self.pace_s - row.step_time_s))

    def _kill(self, step: int) -> None:
        (self.directory / f"killed-{step}").write_text(f"{time.time()}")
        os.kill(os.getpid(), signal.SIGKILL)


def seen(directory: Path) -> list[Seen]:
    """All that was recorded so far, in the order of time."""
    return sorted(_lines(directory), key=lambda row: row.at_s)


def _lines(directory: Path) -> Iterator[Seen]:
    for path in directory.glob("seen-*.jsonl"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # else the rank was killed over it, or is writing it now
                yield Seen(**json.loads(line))


def main(plan_path: str) -> None:
    """Train as the plan says, on the cluster that RAY_ADDRESS names or on one of its own."""
    plan = json.loads(Path(plan_path).read_text())
    watch = Path(plan["watch"])
    watch.mkdir(parents=True, exist_ok=True)
    storage, model = Path(plan["storage"]), Path(plan["model"])
    stage = begin(storage, model, dataset(plan["num_examples"]), **plan["overrides"])
    if stage.manifest is None:
        recorder = Recorder(watch, [tuple(kill) for kill in plan["kills"]], plan["pace_s"])
        trainer.train(stage, recorder.on_step, recorder.view, plan["grow_every_s"])


if __name__ == "__main__":
    main(sys.argv[1])
