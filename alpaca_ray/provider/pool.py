"""[RAY DATA] Rows of requests -> rows of completions, by a pool of actors that all ask one gate."""

import asyncio
import math
import os
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray.data

from alpaca_ray.artifacts import RunDirectory
from alpaca_ray.config import GenerateConfig
from alpaca_ray.provider.gate_actor import RemoteGate
from alpaca_ray.provider.request import Request
from alpaca_ray.provider.sender import Sender
from alpaca_ray.schema import COMPLETION_SCHEMA

# A block is returned when its slowest row is there; with several at once in an actor none waits for it.
BLOCKS_PER_ACTOR = 4
MIN_BLOCK_ROWS = 32  # of a long round: blocks of three rows cost Ray more CPU than the requests do
OPENAI_BASE_URL = "https://api.openai.com/v1"


class Requester:
    """An actor with one sender."""

    def __init__(
        self, config: GenerateConfig, base_url: str, form: Request, gate: RemoteGate, journal: tuple[RunDirectory, str]
    ) -> None:
        self._form = form
        self._sender = Sender(config, base_url, gate, journal)

    async def __call__(self, block: dict[str, np.ndarray[Any, Any]]) -> Any:
        """Columns of REQUEST_SCHEMA in, rows of COMPLETION_SCHEMA out."""
        rows = zip(block["request"].tolist(), block["prompt"].tolist(), block["seed"].tolist(), strict=True)
        # gather() starts them all; the sender holds back what is too much at once.
        answered = await asyncio.gather(*(self._answer(*row) for row in rows))
        await self._sender.flush()
        yield pa.Table.from_pylist(answered, schema=COMPLETION_SCHEMA)

    async def _answer(self, request: int, prompt: str, seed: int) -> dict[str, Any]:
        key, completion = await self._sender.answer(self._form.of(prompt, seed))
        return {"request": request, "key": key, **vars(completion)}


def ask(
    requests: pa.Table, form: Request, config: GenerateConfig, gate: RemoteGate, journal: tuple[RunDirectory, str]
) -> Iterator[list[dict[str, Any]]]:
    """Answer every row of `requests` (REQUEST_SCHEMA); yields rows of COMPLETION_SCHEMA as they come, in any order."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # a job's log gets our lines, not a table every ten seconds
    context.print_on_execution_start = False
    context.memory_usage_poll_interval_s = None  # that reads a file of the kernel once a second for every block
    # Of every task, and of what Ray Data asks the autoscaler for: without it they start whichever nodes are cheapest.
    context.execution_options.label_selector = dict(config.placement.label_selector) or None
    size = block_rows(len(requests), config)
    blocks = [requests.slice(start, size) for start in range(0, len(requests), size)]
    # Not from_arrow, which runs a task for every block before anything else.
    answered = ray.data.from_blocks(blocks).map_batches(
        Requester,
        fn_constructor_args=(config, base_url_of(config), form, gate, journal),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(
            size=min(config.num_actors, len(blocks)),
            max_tasks_in_flight_per_actor=BLOCKS_PER_ACTOR,
            max_concurrent_calls_per_actor=BLOCKS_PER_ACTOR,
        ),
        num_cpus=config.placement.num_cpus,
        num_gpus=config.placement.num_gpus or None,
    )
    # No prefetch: a block would be held back until the next one is there.
    for batch in answered.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield cast(pa.Table, batch).to_pylist()


def block_rows(num_requests: int, config: GenerateConfig) -> int:
    """Enough to keep an actor busy with all its blocks but one; more where a round is long enough for all actors."""
    share = math.ceil(num_requests / (config.num_actors * BLOCKS_PER_ACTOR))
    return max(math.ceil(config.concurrent_requests_per_actor / (BLOCKS_PER_ACTOR - 1)), min(MIN_BLOCK_ROWS, share))


def base_url_of(config: GenerateConfig) -> str:
    """The driver's endpoint goes to every actor; the key does not, each node has its own environment."""
    return config.teacher.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_BASE_URL
