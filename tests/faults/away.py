"""A storage that is away while a file says so, and a generation on it.

python -m tests.faults.away FLAG [options of jobs/generate.py]
"""

import errno
import os
import sys
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem

from alpaca_ray.artifacts import RunDirectory, begin_stage
from alpaca_ray.cli import announce, run_job
from alpaca_ray.generate import dataset
from alpaca_ray.settings import load_config

CALLS = frozenset(name for name in dir(FSSpecHandler) if not name.startswith("_")) - {"get_type_name", "normalize_path"}


class AwayHandler(FSSpecHandler):  # type: ignore[misc]  # pyarrow has no types
    """Directories of this machine, which pyarrow does not take for local ones. All calls fail while `flag` is there."""

    def __init__(self, flag: str) -> None:
        super().__init__(LocalFileSystem())
        self.flag = flag

    def __getattribute__(self, name: str) -> Any:
        if name in CALLS and os.path.exists(self.flag):
            raise OSError(errno.EIO, "the storage is away, says the test")
        return super().__getattribute__(name)


def open_away(storage: Path, name: str, flag: Path) -> RunDirectory:
    """A run there."""
    return RunDirectory(PyFileSystem(AwayHandler(str(flag))), f"{storage}/{name}")


def main() -> None:
    """What jobs/generate.py does, on that storage."""
    config = load_config(sys.argv[2:])
    run = open_away(Path(config.storage_path), config.name, Path(sys.argv[1]))
    stage = begin_stage(run, config, "generate", dataset.inputs(config.generate))
    dataset.generate(stage)
    announce(stage)


if __name__ == "__main__":
    run_job(main)
