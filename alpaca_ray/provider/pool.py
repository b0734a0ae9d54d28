"""[RAY DATA] Rows of requests -> rows of completions, by a pool of actors.

An actor writes the answers to a block of requests before it takes the next block, so a job that dies has paid in
vain for the blocks in flight at most.
"""

import asyncio
import logging
import os
import uuid
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from alpaca_ray.artifacts import RunDirectory
from alpaca_ray.config import GenerateConfig, TeacherConfig
from alpaca_ray.provider.client import Client
from alpaca_ray.schema import COMPLETION_SCHEMA

log = logging.getLogger("alpaca_ray")


class Requester:
    """An actor with one client. It sends a block of requests at once and writes their answers to `target`."""

    def __init__(self, teacher: TeacherConfig, stop: str, run: RunDirectory, target: str) -> None:
        self._client = Client(teacher)
        self._stop, self._run, self._target = stop, run, target

    async def __call__(self, block: dict[str, np.ndarray[Any, Any]]) -> AsyncIterator[dict[str, list[int]]]:
        """Columns of REQUEST_SCHEMA in; how many were answered, and how many failed, out."""
        rows = zip(block["request"].tolist(), block["prompt"].tolist(), block["seed"].tolist(), strict=True)
        answered = await asyncio.gather(*(self._answer(*row) for row in rows))
        table = pa.Table.from_pylist(answered, schema=COMPLETION_SCHEMA)
        # A name of its own: a request that failed once is asked again, perhaps in another company.
        self._run.write_table(f"{self._target}/{uuid.uuid4().hex}.parquet", table)
        failed = sum(row["text"] is None for row in answered)
        yield {"answered": [len(answered) - failed], "failed": [failed]}

    async def _answer(self, request: int, prompt: str, seed: int) -> dict[str, Any]:
        return {"request": request, **asdict(await self._client.complete(prompt, seed, self._stop))}


def ask(run: RunDirectory, requests: pa.Table, config: GenerateConfig, stop: str, target: str) -> None:
    """Answer every row of `requests` (REQUEST_SCHEMA); the answers go to files in the directory `target`."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # a job's log gets our lines, not a table every ten seconds
    context.print_on_execution_start = False
    size = config.concurrent_requests_per_actor
    blocks = [requests.slice(start, size) for start in range(0, len(requests), size)]
    # The driver's endpoint goes to every actor; the key does not, each node has its own environment.
    base_url = config.teacher.base_url or os.environ.get("OPENAI_BASE_URL")
    teacher = config.teacher.model_copy(update={"base_url": base_url})
    summaries = ray.data.from_arrow(blocks).map_batches(
        Requester,
        fn_constructor_args=(teacher, stop, run, target),
        batch_size=size,
        # One block at a time: a second one would wait behind the first while another actor is idle.
        compute=ray.data.ActorPoolStrategy(size=min(config.num_actors, len(blocks)), max_tasks_in_flight_per_actor=1),
        num_cpus=config.placement.num_cpus,
        num_gpus=config.placement.num_gpus or None,
        label_selector=config.placement.label_selector or None,
    )
    answered = failed = 0
    # No prefetch: a summary would be held back until the next one is there.
    for summary in summaries.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        answered += int(np.sum(summary["answered"]))
        failed += int(np.sum(summary["failed"]))
        log.info("%d of %d requests answered, %d failed", answered, len(requests), failed)


def answers(run: RunDirectory, target: str) -> dict[int, dict[str, Any]]:
    """The answer to each request in the directory `target`; one with a text goes before a failure."""
    found: dict[int, dict[str, Any]] = {}
    for path in run.files(target, ".parquet"):
        for row in run.read_table(path).to_pylist():
            if row["text"] is not None or row["request"] not in found:
                found[row["request"]] = row
    return found
