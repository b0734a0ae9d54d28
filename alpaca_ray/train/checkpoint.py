"""Checkpoints of model, optimizer and step: sharded, written while training goes on, loaded on any number of ranks.

torch's distributed checkpoint (DCP): each rank writes its own shards, rank 0 the index of all. The mark that a
checkpoint is complete is written last, when every rank's part is in the run's storage. One without a mark is never
loaded, and removed by the next try.
"""

import shutil
import tempfile
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, cast

import pyarrow.fs
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save

from alpaca_ray.artifacts import RunDirectory, patiently
from alpaca_ray.train.strategy import Saving

ROOT = "train/checkpoints"
MARK = "complete.json"


class Trained(Protocol):
    """What is saved."""

    model: Any
    optimizer: torch.optim.Optimizer
    step: int


class Savable(Protocol):
    """What `begin` asks of a Strategy."""

    step: int

    def save(self, directory: Path) -> Saving:
        """See Strategy.save."""
        ...


@dataclass(frozen=True)
class Saved:
    """A checkpoint that a thread writes."""

    written: "Future[Any]"

    def wait(self) -> None:
        """See Saving.wait."""
        self.written.result()


def save(state: Trained, directory: Path) -> Saved:
    """Copy the state in memory, then write this rank's part to `directory` in a thread; every rank must call it.

    Of the model the weights that are trained: frozen ones are read with the base model, run by run.
    DCP's index `.metadata` comes last, and only when all ranks have written.
    """
    written = async_save(_as_dict(state), checkpoint_id=directory, process_group=own_group())
    return Saved(cast("Future[Any]", written))


def load(state: Trained, directory: Path) -> None:
    """Restore `state` in place from a merged checkpoint; every rank must call it."""
    saved = _as_dict(state)
    dcp_load(saved, checkpoint_id=directory)
    set_state_dict(
        state.model,
        state.optimizer,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
        options=StateDictOptions(strict=False),  # frozen weights are not there
    )
    state.step = saved["step"]


def own_group() -> dist.ProcessGroup:
    """All ranks, over gloo. A thread that saved through the default group would meet FSDP's collectives there, and
    both would hang. Every rank must make the first call.
    """
    world = dist.group.WORLD
    assert world is not None  # the caller has joined a group
    return _gloo_beside(world)


@dataclass(frozen=True)
class Complete:
    """A checkpoint that may be loaded: what its mark says."""

    step: int
    heldout_loss: float | None
    file_bytes: dict[str, int]  # name -> size, of all ranks' files


class Shelf:
    """The checkpoints of a run. One process at a time may change it: rank 0."""

    def __init__(self, run: RunDirectory, num_to_keep: int, keep_best: bool) -> None:
        self._run = run
        self._num_to_keep = num_to_keep
        self._keep_best = keep_best

    def path(self, step: int) -> str:
        """Of a checkpoint's directory, as the run's filesystem knows it."""
        return self._run.path(_directory(step))

    def complete(self) -> list[Complete]:
        """In the order of their steps. A mark whose files are not all there as they were written does not count."""
        found = [self._read(step) for step in self._steps()]
        return [mark for mark in found if mark is not None]

    def clean(self) -> list[int]:
        """Remove what a dead try has left unfinished; returns the steps of it."""
        kept = {mark.step for mark in self.complete()}
        broken = [step for step in self._steps() if step not in kept]
        for step in broken:
            self._delete(step)
        return broken

    def finish(self, step: int, heldout_loss: float | None) -> None:
        """Mark the checkpoint whose files are all there, then remove those that are no longer to be kept."""
        mark = Complete(step, heldout_loss, self._file_bytes(step))
        self._run.write_json(f"{_directory(step)}/{MARK}", asdict(mark))
        complete = self.complete()
        keep = kept_steps(complete, self._num_to_keep, self._keep_best)
        for old in complete:
            if old.step not in keep:
                self._delete(old.step)

    def _read(self, step: int) -> Complete | None:
        path = f"{_directory(step)}/{MARK}"
        if not self._run.exists(path):
            return None
        try:
            mark = Complete(**self._run.read_json(path))
        except (ValueError, TypeError):  # cut off, where a file system renames before it writes
            return None
        return mark if self._file_bytes(step) == mark.file_bytes else None

    def _steps(self) -> list[int]:
        selector = pyarrow.fs.FileSelector(self._run.path(ROOT), allow_not_found=True)
        infos = patiently(lambda: self._run.fs.get_file_info(selector), self._run.patience_s)
        names = [info.base_name for info in infos]
        return sorted(int(name.removeprefix("step=")) for name in names if name.startswith("step="))

    def _file_bytes(self, step: int) -> dict[str, int]:
        selector = pyarrow.fs.FileSelector(self.path(step), allow_not_found=True, recursive=True)
        infos = patiently(lambda: self._run.fs.get_file_info(selector), self._run.patience_s)
        files = (info for info in infos if info.is_file)
        inside = len(self.path(step)) + 1
        return {info.path[inside:]: info.size for info in files if not info.base_name.startswith(MARK)}

    def _delete(self, step: int) -> None:
        mark = f"{_directory(step)}/{MARK}"
        if self._run.exists(mark):  # first: a removal that is cut off must leave no mark behind
            self._run.fs.delete_file(self._run.path(mark))
        self._run.delete(_directory(step))


def kept_steps(complete: list[Complete], num_to_keep: int, keep_best: bool) -> set[int]:
    """The newest, and with `keep_best` the one of the lowest held-out loss (the earliest of equals)."""
    keep = {mark.step for mark in complete[-num_to_keep:]}
    scored = [mark for mark in complete if mark.heldout_loss is not None]
    if keep_best and scored:
        keep.add(min(scored, key=lambda mark: (cast(float, mark.heldout_loss), mark.step)).step)
    return keep


@dataclass
class Pending:
    """A checkpoint on its way to the run's storage: `finish` in any thread, once on every rank."""

    step: int
    local: Path  # where this rank writes
    heldout_loss: float | None
    saving: Saving
    shelf: Shelf
    run: RunDirectory
    _finished: "Future[None]" = field(default_factory=Future)

    def finish(self) -> None:
        """Wait for the writing, bring the files to the storage, and mark the checkpoint when all ranks have."""
        try:
            self.saving.wait()
            if not is_shared(self.run):
                patiently(self._send, self.run.patience_s)
                shutil.rmtree(self.local)
            dist.barrier(own_group())
            if dist.get_rank() == 0:
                self.shelf.finish(self.step, self.heldout_loss)
        except BaseException as error:
            self._finished.set_exception(error)
            raise
        self._finished.set_result(None)

    def _send(self) -> None:
        target = self.shelf.path(self.step)
        self.run.fs.create_dir(target, recursive=True)
        pyarrow.fs.copy_files(str(self.local), target, destination_filesystem=self.run.fs)

    def wait(self) -> None:
        """Until `finish` has come to its end. Raises what it raised."""
        self._finished.result()

    @property
    def is_finished(self) -> bool:
        """Whether `finish` has come to its end on this rank."""
        return self._finished.done()


def begin(state: Savable, run: RunDirectory, shelf: Shelf, heldout_loss: float | None) -> Pending:
    """Copy the state and start to write it; at most one at a time, so wait for the last one first. Collective."""
    # Ranks that see the run's storage as files write there at once; others write beside and copy.
    local = Path(shelf.path(state.step)) if is_shared(run) else Path(tempfile.mkdtemp(prefix="checkpoint"))
    local.mkdir(parents=True, exist_ok=True)
    return Pending(state.step, local, heldout_loss, state.save(local), shelf, run)


def choose(shelf: Shelf) -> Complete | None:
    """The newest complete checkpoint, the same on every rank, after the rest of a dead try is gone. Collective."""
    box: list[Complete | None] = [None]
    if dist.get_rank() == 0:
        shelf.clean()
        box = list(shelf.complete()[-1:]) or [None]
    dist.broadcast_object_list(box, src=0, group=own_group())
    return box[0]


def is_shared(run: RunDirectory) -> bool:
    """Whether the run's storage is a directory that each node sees."""
    return isinstance(run.fs, pyarrow.fs.LocalFileSystem)


def _directory(step: int) -> str:
    return f"{ROOT}/step={step:06d}"


@lru_cache(maxsize=1)
def _gloo_beside(world: dist.ProcessGroup) -> dist.ProcessGroup:
    group: dist.ProcessGroup = dist.new_group(backend="gloo")
    return group


def _as_dict(state: Trained) -> dict[str, Any]:
    # Keyed by parameter names, not by positions in the optimizer, so that another world size finds them.
    model, optimizer = get_state_dict(state.model, state.optimizer)
    # torch's own ignore_frozen_params leaves tied weights in.
    for name, parameter in state.model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            del model[name]
    return {"model": model, "optimizer": optimizer, "step": state.step}
