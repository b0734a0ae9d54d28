"""Two plain gloo processes that write one checkpoint after another, to be killed while they do."""

import json
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow.fs
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from alpaca_ray.artifacts import RunDirectory
from alpaca_ray.train import checkpoint
from alpaca_ray.train.checkpoint import Pending, Shelf

WIDTH, LAYERS = 256, 4  # about 3 MB with the optimizer's state
NUM_TO_KEEP = 2
STEPS_BETWEEN = 10


@dataclass
class Numbered:
    """Weights and moments that are all the number of the step, so that a mixture of two steps shows."""

    model: Any
    optimizer: torch.optim.Optimizer
    step: int = 0

    def advance(self) -> None:
        """One step on."""
        self.step += 1
        with torch.no_grad():
            for value in self.values():
                value.fill_(self.step)

    def values(self) -> list[torch.Tensor]:
        """This rank's part of every weight and moment."""
        moments = [state[name] for state in self.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        return [t.to_local() if isinstance(t, DTensor) else t for t in [*self.model.parameters(), *moments]]

    def save(self, directory: Path) -> checkpoint.Saved:
        return checkpoint.save(self, directory)

    def load(self, directory: Path) -> None:
        checkpoint.load(self, directory)


def open_shelf(directory: Path) -> tuple[RunDirectory, Shelf]:
    run = RunDirectory(pyarrow.fs.LocalFileSystem(), str(directory))
    return run, Shelf(run, NUM_TO_KEEP, keep_best=False)


def write(rank: int, world_size: int, store: str, directory: str) -> None:
    """Go on from the newest complete checkpoint, and save each step in a thread until killed.

    Exits with 3 if what was loaded is not one step's state whole, or if anything unfinished is left.
    """
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a survivor says of its peer's death, each time
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    run, shelf = open_shelf(Path(directory))
    state = _build(world_size)
    last = checkpoint.choose(shelf)
    if last is not None:
        state.load(Path(shelf.path(last.step)))
        is_whole = state.step == last.step and all(bool((v == last.step).all()) for v in state.values())
        left = [p for p in Path(shelf.path(last.step)).parent.iterdir() if not (p / checkpoint.MARK).exists()]
        if not is_whole or (rank == 0 and left):
            sys.exit(3)
    dist.barrier()  # a rank that went on would leave something unfinished for another's look
    (Path(store).parent / f"loaded-{rank}").touch()
    while True:
        state.advance()
        pending = checkpoint.begin(state, run, shelf, None)
        thread = Thread(target=pending.finish)
        thread.start()
        pending.wait()


def _build(world_size: int, width: int = WIDTH, layers: int = LAYERS) -> Numbered:
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))
    mesh = init_device_mesh("cpu", (world_size,))
    for layer in [*model, model]:
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, width)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return Numbered(model, optimizer)


class Group:
    """The processes of one try, each forked from a server that has torch loaded."""

    def __init__(self, directory: Path, world_size: int, number: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.writers"])
        self._marks = directory / f"try-{number}"
        self._marks.mkdir(parents=True)
        options = (world_size, str(self._marks / "store"), str(directory / "run"))
        self.processes: list[BaseProcess] = [
            context.Process(target=write, args=(rank, *options), daemon=True) for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def has_loaded(self, timeout_s: float) -> bool:
        """Waits until every rank has loaded its checkpoint; False if one found fault with it or did not come to it."""
        deadline_s = time.monotonic() + timeout_s
        while not all((self._marks / f"loaded-{rank}").exists() for rank in range(len(self.processes))):
            if any(p.exitcode is not None for p in self.processes) or time.monotonic() > deadline_s:
                return False
            time.sleep(0.01)
        return True

    def kill(self, victim: int) -> None:
        """SIGKILL to one rank, then to the rest, which could only wait for it."""
        for process in [self.processes[victim], *self.processes]:
            if process.pid is not None and process.exitcode is None:
                process.kill()
        for process in self.processes:
            process.join()


def checkpoint_cost(directory: Path, num_checkpoints: int) -> dict[str, float]:
    """Seconds that a checkpoint adds to the steps around it, on two ranks: written beside them, and waited for."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.writers"])
    directory.mkdir(parents=True, exist_ok=True)
    processes = [
        context.Process(target=_measure, args=(rank, str(directory), num_checkpoints), daemon=True) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    measured: dict[str, float] = json.loads((directory / "cost.json").read_text())
    return measured


def _measure(rank: int, directory: str, num_checkpoints: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    run, shelf = open_shelf(Path(directory) / "run")
    state = _build(2, width=1024, layers=8)
    _steps(state)
    costs: dict[str, list[float]] = {"async": [], "sync": []}
    stalls: list[float] = []
    paces: list[float] = []
    for _ in range(num_checkpoints):
        for kind, seen in costs.items():
            step_s = _steps(state) / STEPS_BETWEEN  # just before: what else the machine does changes by the second
            paces.append(step_s)
            started_s = time.perf_counter()
            state.step += 1
            pending = checkpoint.begin(state, run, shelf, None)
            thread = Thread(target=pending.finish)
            thread.start()
            if kind == "sync":
                pending.wait()
            else:
                stalls.append(time.perf_counter() - started_s)
            num_steps = _steps_until(state, pending)
            seen.append(time.perf_counter() - started_s - num_steps * step_s)
    if rank == 0:
        size = sum(path.stat().st_size for path in (Path(directory) / "run").rglob("*.distcp")) / NUM_TO_KEEP
        result = {f"{kind}_s": round(statistics.median(seen), 3) for kind, seen in costs.items()}
        result |= {"async_stall_s": round(statistics.median(stalls), 3), "step_s": round(statistics.median(paces), 3)}
        (Path(directory) / "cost.json").write_text(json.dumps(result | {"megabytes": round(size / 1e6)}))
    dist.barrier()


def _steps(state: Numbered) -> float:
    started_s = time.perf_counter()
    for _ in range(STEPS_BETWEEN):
        _train(state)
    return time.perf_counter() - started_s


def _steps_until(state: Numbered, pending: Pending) -> int:
    """Steps beside the writing, equally many on all ranks: a collective says whether any still writes."""
    done = 0
    writes = torch.ones(())
    while writes > 0 or done < STEPS_BETWEEN:
        _train(state)
        done += 1
        writes = torch.tensor(float(not pending.is_finished))
        dist.all_reduce(writes)
    return done


def _train(state: Numbered) -> None:
    state.model(torch.randn(64, state.model[0].in_features)).square().mean().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
