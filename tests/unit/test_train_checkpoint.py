"""The shelf of checkpoints: which one is chosen, which are kept, and what is swept away."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

import pyarrow.fs
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from alpaca_ray.artifacts import RunDirectory
from alpaca_ray.train import checkpoint
from alpaca_ray.train.checkpoint import MARK, Complete, Shelf, kept_steps
from tests.faults.away import open_away


@pytest.fixture(scope="module", autouse=True)
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(pyarrow.fs.LocalFileSystem(), str(tmp_path))


def put(run: RunDirectory, step: int, heldout_loss: float | None = None, shelf: Shelf | None = None) -> None:
    """A checkpoint of one file; marked if there is a shelf to do so."""
    run.write_bytes(f"{checkpoint.ROOT}/step={step:06d}/__0_0.distcp", bytes(step))
    if shelf is not None:
        shelf.finish(step, heldout_loss)


def steps_on_disk(run: RunDirectory) -> list[int]:
    return sorted(int(path.name.removeprefix("step=")) for path in Path(run.path(checkpoint.ROOT)).iterdir())


def test_the_newest_marked_one_is_chosen_and_the_rest_swept_away(run: RunDirectory) -> None:
    shelf = Shelf(run, num_to_keep=2, keep_best=False)
    put(run, 1, shelf=shelf)
    put(run, 2, shelf=shelf)
    put(run, 3)
    chosen = checkpoint.choose(shelf)
    assert chosen is not None
    assert chosen.step == 2
    assert steps_on_disk(run) == [1, 2]


def test_without_any_there_is_none_to_choose(run: RunDirectory) -> None:
    assert checkpoint.choose(Shelf(run, num_to_keep=2, keep_best=False)) is None


@pytest.mark.parametrize("harm", ["cut", "gone", "mark cut"])
def test_a_mark_does_not_vouch_for_files_that_changed(run: RunDirectory, harm: str) -> None:
    shelf = Shelf(run, num_to_keep=3, keep_best=False)
    put(run, 1, shelf=shelf)
    put(run, 2, shelf=shelf)
    file = Path(shelf.path(2)) / ("__0_0.distcp" if harm != "mark cut" else MARK)
    file.unlink() if harm == "gone" else file.write_bytes(file.read_bytes()[:1])
    chosen = checkpoint.choose(shelf)
    assert chosen is not None
    assert chosen.step == 1
    assert steps_on_disk(run) == [1]


def test_the_newest_and_the_best_stay(run: RunDirectory) -> None:
    shelf = Shelf(run, num_to_keep=2, keep_best=True)
    for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 1.5)]:
        put(run, step, loss, shelf)
    assert steps_on_disk(run) == [2, 4, 5]


SCORED = st.lists(st.none() | st.floats(0, 10), min_size=1, max_size=8)


@given(losses=SCORED, num_to_keep=st.integers(1, 4), keep_best=st.booleans())
def test_the_policy_keeps_the_newest_and_never_more_than_one_besides(
    losses: list[float | None], num_to_keep: int, keep_best: bool
) -> None:
    complete = [Complete(step, loss, {}) for step, loss in enumerate(losses)]
    kept = kept_steps(complete, num_to_keep, keep_best)
    newest = {mark.step for mark in complete[-num_to_keep:]}
    assert newest <= kept
    assert len(kept - newest) <= int(keep_best)
    best = min((loss for loss in losses if loss is not None), default=None)
    assert not keep_best or best is None or best in [losses[step] for step in kept]


@dataclass
class Slow:
    """A state whose writing lasts until it is let go."""

    step: int = 1
    released: Event = field(default_factory=Event)
    error: Exception | None = None

    def save(self, directory: Path) -> "Slow":
        (directory / "part").write_text("x")
        return self

    def wait(self) -> None:
        self.released.wait()
        if self.error is not None:
            raise self.error


def test_the_mark_comes_after_the_writing(run: RunDirectory) -> None:
    state, shelf = Slow(), Shelf(run, num_to_keep=1, keep_best=False)
    pending = checkpoint.begin(state, run, shelf, 0.5)
    thread = Thread(target=pending.finish)
    thread.start()
    assert shelf.complete() == []
    assert not pending.is_finished
    state.released.set()
    pending.wait()
    thread.join()
    assert [(mark.step, mark.heldout_loss) for mark in shelf.complete()] == [(1, 0.5)]


def test_a_failed_writing_leaves_no_mark_and_says_so(run: RunDirectory) -> None:
    state, shelf = Slow(error=OSError("disk full")), Shelf(run, num_to_keep=1, keep_best=False)
    state.released.set()
    pending = checkpoint.begin(state, run, shelf, None)
    with pytest.raises(OSError, match="disk full"):
        pending.finish()
    with pytest.raises(OSError, match="disk full"):
        pending.wait()
    assert shelf.complete() == []


def test_other_storage_gets_what_was_written_beside_it(tmp_path: Path) -> None:
    base = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())
    run = RunDirectory(base, "bucket/run")
    state, shelf = Slow(), Shelf(run, num_to_keep=1, keep_best=False)
    state.released.set()
    pending = checkpoint.begin(state, run, shelf, None)
    pending.finish()
    assert [mark.file_bytes for mark in shelf.complete()] == [{"part": 1}]
    assert not pending.local.exists()


def test_a_checkpoint_waits_for_a_storage_that_is_away(tmp_path: Path) -> None:
    flag = tmp_path / "away"
    run = open_away(tmp_path, "run", flag)
    state, shelf = Slow(), Shelf(run, num_to_keep=1, keep_best=False)
    pending = checkpoint.begin(state, run, shelf, None)
    flag.touch()
    thread = Thread(target=pending.finish)
    thread.start()
    state.released.set()
    thread.join(0.2)  # so that it has most likely tried; before the storage is back it cannot end
    assert not pending.is_finished
    flag.unlink()
    pending.wait()
    thread.join()
    assert [mark.file_bytes for mark in shelf.complete()] == [{"part": 1}]


@dataclass
class Weights:
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 1


def build() -> Weights:
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return Weights(model, optimizer)


def train(state: Weights) -> None:
    state.model(torch.ones(1, 64)).square().sum().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()


def test_what_is_saved_is_the_state_at_the_call(tmp_path: Path) -> None:
    """Training goes on while the thread writes; the checkpoint must not see it."""
    state = build()
    train(state)
    then = [p.detach().clone() for p in state.model.parameters()]
    saved = checkpoint.save(state, tmp_path / "c")
    for _ in range(5):
        train(state)
    saved.wait()
    fresh = build()
    checkpoint.load(fresh, tmp_path / "c")
    assert all(torch.equal(p, q) for p, q in zip(fresh.model.parameters(), then, strict=True))
    train(fresh)
    again = build()
    train(again)
    train(again)
    assert all(torch.equal(p, q) for p, q in zip(fresh.model.parameters(), again.model.parameters(), strict=True))
