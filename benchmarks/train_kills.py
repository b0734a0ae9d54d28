"""What a training run loses when its workers, nodes and checkpoints are killed, and what a checkpoint costs.

python benchmarks/train_kills.py [--quick] [--parts writers steps nodes cost] [--seed 0]

writers  two plain processes write one checkpoint after another, killed at random moments: 100 times
steps    a run on two workers, one killed after each of 20 random steps, half of them while a checkpoint is written;
         held against a run nobody disturbed, and against one that goes on with one worker
nodes    two nodes: one lost and returned, then one that its cloud takes back with a notice
cost     a checkpoint written beside the steps, against one that the steps wait for
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from alpaca_ray.artifacts import RunDirectory, open_run
from alpaca_ray.train import metrics
from alpaca_ray.train.checkpoint import MARK
from alpaca_ray.train.order import steps_per_epoch
from tests.metadata import MetadataServer
from tests.nodes import Nodes
from tests.tiny import write_tiny_model
from tests.training import Seen, seen
from tests.writers import Group, checkpoint_cost, open_shelf

ROOT = Path(__file__).parents[1]
POLL_S = 0.05
DEADLINE_S = 600.0
NOTICE_S = 25.0
RARE = {"learning_rate": 1e-3, "checkpoint_every_steps": 3, "global_batch_size": 4}


@dataclass
class Driver:
    """A training run in a process of its own, on a cluster that can be hurt."""

    process: "subprocess.Popen[bytes]"
    storage: Path
    watch: Path
    log: Path

    def run(self) -> RunDirectory:
        return open_run(str(self.storage), "r")

    def finished(self) -> bool:
        """Raises RuntimeError if it ended badly."""
        code = self.process.poll()
        if code not in (None, 0):
            raise RuntimeError(f"training ended with {code}:\n{self.log.read_text()[-3000:]}")
        return code == 0

    def wait(self, holds: Callable[[], object], what: str) -> None:
        """Until something is so. Raises RuntimeError if the run ends or much time passes before."""
        deadline_s = time.monotonic() + DEADLINE_S
        while not holds():
            has_ended = self.finished()
            if (has_ended and not holds()) or time.monotonic() > deadline_s:
                raise RuntimeError(f"never seen: {what}\n{self.log.read_text()[-3000:]}")
            time.sleep(POLL_S)

    def rows(self) -> list[Seen]:
        return seen(self.watch)


def start(directory: Path, cluster: Nodes, model: Path, name: str = "", **plan: Any) -> Driver:
    """`plan`: see tests/training.py; `overrides` are of the train config."""
    watch = directory / f"watch{name}"
    defaults = {"kills": [], "pace_s": 0.0, "grow_every_s": 60.0, "num_examples": 14, "overrides": {}}
    described = defaults | plan | {"storage": str(directory), "model": str(model), "watch": str(watch)}
    (directory / f"plan{name}.json").parent.mkdir(parents=True, exist_ok=True)
    (directory / f"plan{name}.json").write_text(json.dumps(described))
    environment = cluster.environment | {
        "PYTHONPATH": str(ROOT), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    }  # fmt: skip
    log = directory / f"log{name}"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.training", str(directory / f"plan{name}.json")],
            cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    return Driver(process, directory, watch, log)


@contextlib.contextmanager
def running(driver: Driver) -> Iterator[Driver]:
    try:
        yield driver
    finally:
        if driver.process.poll() is None:
            driver.process.kill()
        driver.process.wait()


@dataclass(frozen=True)
class WriterOutcome:
    kills: int
    while_writing: int  # kills that left something unfinished
    whole_loads: int  # tries that found nothing unfinished, and every number of what they loaded right
    left_behind: int


def kill_writers(directory: Path, kills: int, seed: int, longest_s: float = 0.6) -> WriterOutcome:
    """Kill a group that saves without a pause. Each next try fails if what it loads is not whole."""
    rng = random.Random(seed)
    while_writing = whole_loads = 0
    for number in range(kills):
        group = Group(directory, 2, number)
        whole_loads += group.has_loaded(DEADLINE_S)
        time.sleep(rng.uniform(0, longest_s))
        group.kill(rng.randrange(2))
        while_writing += bool(_unfinished(directory / "run/train/checkpoints"))
    last = Group(directory, 2, kills)
    whole_loads += last.has_loaded(DEADLINE_S)
    last.kill(0)
    _, shelf = open_shelf(directory / "run")
    shelf.clean()
    left = _unfinished(directory / "run/train/checkpoints")
    return WriterOutcome(kills, while_writing, whole_loads, len(left))


def _unfinished(checkpoints: Path) -> list[Path]:
    return [path for path in checkpoints.glob("step=*") if not (path / MARK).exists()]


@dataclass(frozen=True)
class StepOutcome:
    kills: int
    same_losses: bool
    same_weights: bool
    each_once: bool
    unfinished: int
    recovery_s: list[float]  # from a kill to the next step that any rank has done
    repeated_steps: int  # over all kills


def kill_steps(directory: Path, cluster: Nodes, kills: int, seed: int) -> StepOutcome:
    """The same run undisturbed and with kills, on two workers."""
    model = write_tiny_model(directory / "model")
    num_examples = 14 + 2 * kills
    plan: dict[str, Any] = {"num_examples": num_examples, "overrides": RARE | {"max_failures": kills}}
    whole = _to_the_end(start(directory / "whole", cluster, model, **plan))
    num_steps = metrics.read(whole)[-1].step
    rng = random.Random(seed)
    steps = sorted(rng.sample(range(1, num_steps), kills))
    # every other kill waits a little, for the writing of a checkpoint that the step began
    hits = [(step, rng.randrange(2), rng.uniform(0.01, 0.2) if i % 2 else 0.0) for i, step in enumerate(steps)]
    _encode_alike(whole, directory / "killed/r")
    driver = start(directory / "killed", cluster, model, **plan, kills=hits)
    killed = _to_the_end(driver)
    return StepOutcome(
        kills=len(list(driver.watch.glob("killed-*"))),
        same_losses=[r.loss for r in metrics.read(killed)] == [r.loss for r in metrics.read(whole)],
        same_weights=_manifest(killed)["outputs"] == _manifest(whole)["outputs"],
        each_once=each_once(driver.rows(), killed),
        unfinished=len(_unfinished(directory / "killed/r/train/checkpoints")),
        recovery_s=[round(s, 1) for s in recoveries(driver)],
        repeated_steps=repeated_steps(driver.rows()),
    )


@dataclass(frozen=True)
class ResizeOutcome:
    loss: float  # largest relative difference
    weights: float  # largest difference


def resize(directory: Path, cluster: Nodes, num_examples: int, step: int) -> ResizeOutcome:
    """The same run undisturbed on two workers, and with a kill at a step after which one worker goes on."""
    model = write_tiny_model(directory / "model")
    plan: dict[str, Any] = {"num_examples": num_examples, "overrides": RARE}
    whole = _to_the_end(start(directory / "whole", cluster, model, **plan))
    _encode_alike(whole, directory / "one/r")
    one = _on_one_worker(directory / "one", cluster, model, plan, step)
    loss = max(abs(a.loss - b.loss) / b.loss for a, b in _pairs(one, whole))
    return ResizeOutcome(loss, _largest_difference(one, whole))


def _encode_alike(whole: RunDirectory, other: Path) -> None:
    """Give another run the dataset as this one has encoded it, which takes a run longer than some steps."""
    shutil.copytree(whole.path("generate"), other / "generate")
    (other / "train").mkdir()
    for table in Path(whole.path("train")).glob("*.parquet"):
        shutil.copy(table, other / "train")


def _on_one_worker(directory: Path, cluster: Nodes, model: Path, plan: dict[str, Any], step: int) -> RunDirectory:
    """The kill ends the job, which is started again with one worker."""
    first = plan | {"kills": [(step, 1, 0.0)], "overrides": plan["overrides"] | {"max_failures": 0}}
    with running(start(directory, cluster, model, **first)) as driver, contextlib.suppress(RuntimeError):
        driver.wait(driver.finished, "the end")
    second = plan | {"overrides": plan["overrides"] | {"num_workers": 1}}
    return _to_the_end(start(directory, cluster, model, "-again", **second))


def _to_the_end(started: Driver) -> RunDirectory:
    with running(started) as driver:
        while not driver.finished():  # however many kills there are, none may hold up the next step for long
            before = len(driver.rows())
            driver.wait(lambda: driver.finished() or len(driver.rows()) > before, "the next step")  # noqa: B023
    return started.run()


def _manifest(run: RunDirectory) -> dict[str, Any]:
    manifest: dict[str, Any] = run.read_json("train/manifest.json")
    return manifest


def _pairs(a: RunDirectory, b: RunDirectory) -> Iterator[tuple[metrics.Row, metrics.Row]]:
    return zip(metrics.read(a), metrics.read(b), strict=True)


def _largest_difference(a: RunDirectory, b: RunDirectory) -> float:
    ours, theirs = (load_file(run.path("train/model/model.safetensors")) for run in (a, b))
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


def each_once(rows: list[Seen], run: RunDirectory) -> bool:
    """Whether the ids of the steps as they were last done are, epoch by epoch, all ids, each once."""
    ids = sorted(run.read_table("train/encoded.parquet")["id"].to_pylist())
    last = {row.step: row.ids for row in rows}
    per_epoch = steps_per_epoch(len(ids), int(RARE["global_batch_size"]))
    epochs = [[last[s] for s in range(e + 1, e + per_epoch + 1)] for e in range(0, max(last), per_epoch)]
    return all(sorted(i for step in epoch for i in step) == ids for epoch in epochs)


def repeated_steps(rows: list[Seen]) -> int:
    """How many steps were done once more than they had to be; a step counts as often as one rank has done it."""
    times = Counter((row.step, row.rank, row.world_size) for row in rows)
    return sum(max(n for (step, _, _), n in times.items() if step == wanted) - 1 for wanted in {s for s, _, _ in times})


def steps_back(rows: list[Seen], from_size: int, to_size: int, at_s: float) -> int:
    """How many steps a run did again when it went on with another number of workers after a moment."""
    first = min((row for row in rows if row.world_size == to_size and row.at_s > at_s), key=lambda row: row.at_s)
    done = max(row.step for row in rows if row.world_size == from_size and row.at_s < first.at_s)
    return max(0, done + 1 - first.step)


def recoveries(driver: Driver) -> list[float]:
    """Seconds from each kill to the first step after it."""
    kills = [float(mark.read_text()) for mark in driver.watch.glob("killed-*")]
    rows = driver.rows()
    return [min(r.at_s for r in rows if r.at_s > kill + 0.5) - kill for kill in sorted(kills)]


@dataclass(frozen=True)
class NodeOutcome:
    fewer_s: float  # from the loss of a node to the next step, on fewer workers
    grown_s: float  # from the node's return to the first step on all
    notice_to_checkpoint_s: float
    deadline_s: float  # after the notice
    moved_s: float | None  # from the deadline to the next step, on fewer workers
    each_once: bool
    repeated_steps: int  # by the loss of the node


def lose_nodes(directory: Path, cluster: Nodes, *, is_taken: bool = True) -> NodeOutcome:
    """One run on two nodes, of which one is lost, comes back, gets notice from its cloud, and then is taken."""
    model = write_tiny_model(directory / "model")
    # At 2 s a step, 8 epochs of 13 steps last for all that happens here, and are soon done when they may hurry.
    driver = start(
        directory / "run", cluster, model, num_examples=60, pace_s=2.0, grow_every_s=5.0,
        overrides=RARE | {
            "num_workers": "[2,4]", "num_epochs": 8, "max_failures": 10, "evaluate_every_steps": 1000,
        },
    )  # fmt: skip
    with running(driver):
        wait_for_size(driver, 4, 0.0)
        lost_s = time.time()
        cluster.lose_node()
        fewer_s = wait_for_size(driver, 2, lost_s) - lost_s
        back = steps_back(driver.rows(), 4, 2, lost_s)
        _say(f"on two workers {fewer_s:.1f} s after the loss of a node")
        cluster.return_node()
        returned_s = time.time()
        grown_s = wait_for_size(driver, 4, returned_s) - returned_s
        _say(f"on four workers {grown_s:.1f} s after its return")
        noticed_s, saved_s = give_notice(driver, cluster)
        _say(f"checkpoint {saved_s:.1f} s after the notice")
        moved_s = None
        if is_taken:
            time.sleep(max(0.0, noticed_s + NOTICE_S - time.time()))
            cluster.lose_node()
            moved_s = wait_for_size(driver, 2, noticed_s + NOTICE_S) - noticed_s - NOTICE_S
            _say(f"on two workers {moved_s:.1f} s after the deadline")
        (driver.watch / "hurry").touch()
        driver.wait(lambda: driver.process.poll() is not None, "the end")
        driver.finished()
    return NodeOutcome(fewer_s, grown_s, saved_s, NOTICE_S, moved_s, each_once(driver.rows(), driver.run()), back)


def wait_for_size(driver: Driver, world_size: int, after_s: float) -> float:
    """When the first step on so many workers was done, after a moment."""
    found: list[float] = []

    def is_there() -> bool:
        found[:] = [r.at_s for r in driver.rows() if r.world_size == world_size and r.at_s > after_s]
        return bool(found)

    driver.wait(is_there, f"a step on {world_size} workers")
    return min(found)


def give_notice(driver: Driver, cluster: Nodes) -> tuple[float, float]:
    """Have the second node's cloud take it back: when it said so, and seconds from there to the checkpoint."""
    there: list[str] = []

    def is_there() -> bool:
        there[:] = [r.node_id for r in driver.rows() if cluster.is_on_node(r.pid)]
        return bool(there)

    driver.wait(is_there, "a step of a worker on the second node")
    node_id = there[-1]
    with MetadataServer() as server:
        command = [
            sys.executable, "-m", "alpaca_ray.cluster.preemption", "--cloud", "aws", "--metadata-url", server.url,
            "--address", cluster.environment["RAY_ADDRESS"], "--node-id", node_id,
        ]  # fmt: skip
        watcher = subprocess.Popen(command, cwd=ROOT, env=cluster.environment | {"PYTHONPATH": str(ROOT)})
        server.asked.wait(DEADLINE_S)
        before = _newest(driver.run())
        noticed_s = time.time()
        server.take_back(noticed_s + NOTICE_S)
        watcher.wait(DEADLINE_S)
        said = "a node is about to go"
        driver.wait(lambda: said in driver.log.read_text(), "the notice in the log")
        driver.wait(lambda: _newest(driver.run()) > before, "a checkpoint after the notice")
    return noticed_s, time.time() - noticed_s


def _newest(run: RunDirectory) -> int:
    marks = Path(run.path("train/checkpoints")).glob(f"step=*/{MARK}")
    return max((int(mark.parent.name.removeprefix("step=")) for mark in marks), default=0)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def row(name: str, ours: Any, unit: str, goal: str, holds: bool, **more: Any) -> dict[str, Any]:
    return {"name": name, "ours": ours, "unit": unit, "goal": goal, "holds": holds, **more}


def writer_rows(directory: Path, quick: bool, seed: int) -> list[dict[str, Any]]:
    wanted = 20 if quick else 100
    outcome = kill_writers(directory, wanted, seed)
    return [
        row("kills_of_writers", outcome.kills, "SIGKILLs", f">= {wanted}", outcome.kills >= wanted),
        row("kills_while_writing", outcome.while_writing, "SIGKILLs", "> 0", outcome.while_writing > 0),
        row(
            "whole_checkpoints_loaded", outcome.whole_loads, "tries", f"{wanted + 1}", outcome.whole_loads == wanted + 1
        ),
        row("partial_checkpoints_left", outcome.left_behind, "", "0", outcome.left_behind == 0),
    ]


def step_rows(directory: Path, quick: bool, seed: int) -> list[dict[str, Any]]:
    wanted = 4 if quick else 20
    with Nodes(3, 2) as cluster:
        outcome = kill_steps(directory / "kills", cluster, wanted, seed)
        resized = resize(directory / "resized", cluster, num_examples=16, step=2)
    middle_s = statistics.median(outcome.recovery_s)
    return [
        row("kills_of_workers", outcome.kills, "SIGKILLs", f">= {wanted}", outcome.kills >= wanted),
        row("losses_bitwise_equal", outcome.same_losses, "bool", "true", outcome.same_losses),
        row("weights_bitwise_equal", outcome.same_weights, "bool", "true", outcome.same_weights),
        row("each_example_once_an_epoch", outcome.each_once, "bool", "true", outcome.each_once),
        row("partial_checkpoints_left_by_a_run", outcome.unfinished, "", "0", outcome.unfinished == 0),
        row("loss_on_another_world_size", resized.loss, "relative", "<= 1e-5", resized.loss <= 1e-5),
        row("weights_on_another_world_size", resized.weights, "absolute", "<= 1e-5", resized.weights <= 1e-5),
        row("kill_to_next_step_s", middle_s, "s", "<= 60", middle_s <= 60, each=outcome.recovery_s),
    ]  # fmt: skip


def node_rows(directory: Path, quick: bool, seed: int) -> list[dict[str, Any]]:
    with Nodes(2, 2) as cluster:
        outcome = lose_nodes(directory, cluster)
    saved_s, moved_s = outcome.notice_to_checkpoint_s, outcome.moved_s
    assert moved_s is not None
    return [
        row("node_lost_to_next_step_s", round(outcome.fewer_s, 1), "s", "<= 120", outcome.fewer_s <= 120),
        row("node_back_to_all_workers_s", round(outcome.grown_s, 1), "s", "<= 120", outcome.grown_s <= 120),
        row("notice_to_checkpoint_s", round(saved_s, 1), "s", f"<= {NOTICE_S:.0f}", saved_s <= NOTICE_S),
        row("deadline_to_next_step_s", round(moved_s, 1), "s", "<= 120", moved_s <= 120),
        row("each_example_once_an_epoch_over_sizes", outcome.each_once, "bool", "true", outcome.each_once),
    ]


def cost_rows(directory: Path, quick: bool, seed: int) -> list[dict[str, Any]]:
    cost = checkpoint_cost(directory, num_checkpoints=3 if quick else 8)
    sizes = {"megabytes": cost["megabytes"], "step_s": cost["step_s"]}
    return [
        row("checkpoint_cost_s", cost["async_s"], "s", "< the peer's", cost["async_s"] < cost["sync_s"],
            peer=cost["sync_s"], peer_name="steps wait for the writing", stall_s=cost["async_stall_s"],
            slowed_s=round(cost["async_s"] - cost["async_stall_s"], 3), **sizes),
    ]  # fmt: skip


PARTS = {"writers": writer_rows, "steps": step_rows, "nodes": node_rows, "cost": cost_rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 kills of workers, 20 of writers")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.parts:
        with tempfile.TemporaryDirectory(prefix="kills") as directory:
            rows += PARTS[name](Path(directory), arguments.quick, arguments.seed)
        _say(json.dumps(rows[-1]))
    machine = {"cores": os.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9)}
    versions = {name: importlib.metadata.version(name) for name in ("ray", "torch")}
    print(json.dumps({"benchmark": "train_kills", "machine": machine, "versions": versions, "rows": rows}))
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
