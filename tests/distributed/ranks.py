"""Run a function in a group of processes on this machine, over gloo."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn


def on_ranks(world_size: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work(*arguments)` returns on rank 0. It is a top-level function, and finds a process group of all ranks."""
    with tempfile.TemporaryDirectory() as directory:
        spawn(_rank, (world_size, Path(directory), work, arguments), nprocs=world_size)  # type: ignore[no-untyped-call]
        return torch.load(Path(directory) / "answer.pt", weights_only=False)


def _rank(rank: int, world_size: int, directory: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed asks for it; Ray Train sets it
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world_size)
    answer = work(*arguments)
    if rank == 0:
        torch.save(answer, directory / "answer.pt")
    dist.destroy_process_group()
