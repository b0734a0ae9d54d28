"""[RAY DATA] Rows of requests -> rows of completions, by a pool of actors.

Each actor keeps `concurrent_requests_per_actor` requests under way. Rows are written as soon as their block is
answered, so a job that dies has paid at most for the blocks in flight.
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import ray.data

from alpaca_ray.artifacts import RunDirectory
from alpaca_ray.config import GenerateConfig, TeacherConfig
from alpaca_ray.provider.client import Client
from alpaca_ray.schema import COMPLETION_SCHEMA

log = logging.getLogger("alpaca_ray")


class Requester:
    """An actor with one client; a batch of requests is sent at once."""

    def __init__(self, teacher: TeacherConfig, stop: str) -> None:
        self._client = Client(teacher)
        self._stop = stop

    async def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> AsyncIterator[pa.Table]:
        """Columns of REQUEST_SCHEMA in, COMPLETION_SCHEMA out."""
        rows = zip(batch["request"].tolist(), batch["prompt"].tolist(), batch["seed"].tolist(), strict=True)
        answered = await asyncio.gather(*(self._answer(*row) for row in rows))
        yield pa.Table.from_pylist(answered, schema=COMPLETION_SCHEMA)

    async def _answer(self, request: int, prompt: str, seed: int) -> dict[str, Any]:
        return {"request": request, **asdict(await self._client.complete(prompt, seed, self._stop))}


def ask(run: RunDirectory, requests: pa.Table, config: GenerateConfig, stop: str, target: str) -> None:
    """Answer every row of `requests` (REQUEST_SCHEMA) and append the rows to the directory `target`."""
    rows_per_block = config.concurrent_requests_per_actor
    # The driver's endpoint goes to every actor; the key does not, each node has its own environment.
    base_url = config.teacher.base_url or os.environ.get("OPENAI_BASE_URL")
    teacher = config.teacher.model_copy(update={"base_url": base_url})
    blocks = [requests.slice(start, rows_per_block) for start in range(0, len(requests), rows_per_block)]
    answered = ray.data.from_arrow(blocks).map_batches(
        Requester,
        fn_constructor_kwargs={"teacher": teacher, "stop": stop},
        batch_size=rows_per_block,
        compute=ray.data.ActorPoolStrategy(size=min(config.num_actors, len(blocks))),
        num_cpus=config.placement.num_cpus,
        num_gpus=config.placement.num_gpus or None,
        label_selector=config.placement.label_selector or None,
    )
    answered.write_parquet(run.path(target), filesystem=run.fs)


def answers(run: RunDirectory, target: str) -> dict[int, dict[str, Any]]:
    """The newest answer to each request in the directory `target`; one with a text goes before a failure."""
    found: dict[int, dict[str, Any]] = {}
    if not run.exists(target):
        return found
    for info in run.fs.get_file_info(pa.fs.FileSelector(run.path(target), recursive=True)):
        for row in _read_whole(run, info):
            if row["text"] is not None or row["request"] not in found:
                found[row["request"]] = row
    return found


def _read_whole(run: RunDirectory, info: pa.fs.FileInfo) -> list[dict[str, Any]]:
    if not info.path.endswith(".parquet"):
        return []
    try:
        rows: list[dict[str, Any]] = pq.read_table(info.path, filesystem=run.fs, schema=COMPLETION_SCHEMA).to_pylist()
    except pa.ArrowInvalid:
        log.warning("%s was cut off while it was written; its requests will be asked again", info.path)
        run.fs.delete_file(info.path)
        return []
    return rows
