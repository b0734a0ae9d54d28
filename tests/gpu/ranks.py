"""Run a function on every GPU of this machine, one process each, or in this process on the CPU."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn


def on_ranks(device: str, work: Callable[..., Any], *arguments: Any) -> Any:
    """Rank 0's answer, as JSON has it. `work` is a top-level function; it finds a process group of all ranks."""
    world_size = torch.cuda.device_count() if device == "cuda" else 1
    with tempfile.TemporaryDirectory() as directory:
        common = (world_size, device, Path(directory), work, arguments)
        if world_size == 1:
            _rank(0, *common)
        else:
            spawn(_rank, args=common, nprocs=world_size)  # type: ignore[no-untyped-call]
        return json.loads((Path(directory) / "answer.json").read_text())


def _rank(  # noqa: PLR0917 - torch.multiprocessing gives them one by one
    rank: int, world_size: int, device: str, directory: Path, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    backend = "gloo"
    if device == "cuda":
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, init_method=f"file://{directory}/store", rank=rank, world_size=world_size)
    try:
        answer = work(*arguments)
        if rank == 0:
            (directory / "answer.json").write_text(json.dumps(answer))
    finally:
        dist.destroy_process_group()
