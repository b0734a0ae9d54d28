"""[RAY DATA] Rows of requests -> rows of completions, by a pool of actors that all ask one gate."""

import asyncio
import math
import os
import warnings
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.util.metrics import Gauge

from alpaca_ray.artifacts import RunDirectory
from alpaca_ray.config import GenerateConfig
from alpaca_ray.provider.budget import Budget, price_of
from alpaca_ray.provider.gate import Ask, Gate, GateState, Permit, Permits, Report
from alpaca_ray.provider.request import Request
from alpaca_ray.provider.sender import Sender
from alpaca_ray.schema import COMPLETION_SCHEMA

# A block is returned when its slowest row is there; with several at once in an actor none waits for it.
BLOCKS_PER_ACTOR = 4
OPENAI_BASE_URL = "https://api.openai.com/v1"

_METRICS = {
    "answered": "Requests answered",
    "failed": "Requests given up",
    "retried": "Attempts that failed and were made again",
    "tokens": "Tokens of prompts and completions paid for",
    "usd": "US dollars spent",
    "requests_per_minute": "Requests in the last window of the rate limit",
    "tokens_per_minute": "Tokens in the last window of the rate limit",
}


class LimiterActor(Gate):
    """The gate as an actor. Ray restarts it; the calls that were under way are made again."""

    def __init__(self, config: GenerateConfig, run: RunDirectory, journal_directory: str) -> None:
        with warnings.catch_warnings():  # Ray's own property uses one that Ray deprecates
            warnings.simplefilter("ignore")
            restarted = ray.get_runtime_context().was_current_actor_reconstructed
        super().__init__(config, run, journal_directory, restarted=restarted)
        self._gauges = {name: Gauge(f"alpaca_ray_generate_{name}", text) for name, text in _METRICS.items()}

    def state(self) -> GateState:
        """The figures of now, which go to Ray's metrics as well."""
        state = super().state()
        for name in ("answered", "failed", "retried", "tokens", "usd"):
            self._gauges[name].set(getattr(state, name))
        self._gauges["requests_per_minute"].set(state.limiter.requests_in_window)
        self._gauges["tokens_per_minute"].set(state.limiter.tokens_in_window)
        return state


class RemoteGate:
    """The limiter's actor as senders and the driver call it."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def acquire(self, owner: str, asks: Sequence[Ask]) -> Awaitable[Permits]:
        """See Gate.acquire."""
        return self._actor.acquire.remote(owner, asks)  # type: ignore[no-any-return]

    def give_back(self, permits: Sequence[Permit]) -> Awaitable[None]:
        """See Gate.give_back."""
        return self._actor.give_back.remote(permits)  # type: ignore[no-any-return]

    def settle(self, reports: Sequence[Report]) -> Awaitable[None]:
        """See Gate.settle."""
        return self._actor.settle.remote(reports)  # type: ignore[no-any-return]

    def stop(self, reason: str) -> Awaitable[None]:
        """See Gate.stop."""
        return self._actor.stop.remote(reason)  # type: ignore[no-any-return]

    def state(self, timeout_s: float | None = None) -> GateState | None:
        """The figures of now; None if they do not come in time."""
        try:
            state: GateState = ray.get(self._actor.state.remote(), timeout=timeout_s)
        except ray.exceptions.GetTimeoutError:
            return None
        return state


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
        return {"request": request, "key": key, **asdict(completion)}


def start_gate(config: GenerateConfig, run: RunDirectory, journal_directory: str) -> RemoteGate:
    """One gate for all of a stage's rounds. It runs where the driver does and ends with it.

    Raises UserError for a budget in dollars without a price.
    """
    Budget(config.budget.max_usd, config.budget.max_tokens, price_of(config.teacher.model, config.teacher.price))
    if not ray.is_initialized():
        ray.init()
    node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=True
    )
    actor = ray.remote(LimiterActor).options(
        num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=node
    )  # fmt: skip
    return RemoteGate(actor.remote(config, run, journal_directory))


def ask(
    requests: pa.Table, form: Request, config: GenerateConfig, gate: RemoteGate, journal: tuple[RunDirectory, str]
) -> Iterator[list[dict[str, Any]]]:
    """Answer every row of `requests` (REQUEST_SCHEMA); yields rows of COMPLETION_SCHEMA as they come, in any order."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # a job's log gets our lines, not a table every ten seconds
    context.print_on_execution_start = False
    size = math.ceil(config.concurrent_requests_per_actor / (BLOCKS_PER_ACTOR - 1))
    blocks = [requests.slice(start, size) for start in range(0, len(requests), size)]
    answered = ray.data.from_arrow(blocks).map_batches(
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
        label_selector=config.placement.label_selector or None,
    )
    # No prefetch: a block would be held back until the next one is there.
    for batch in answered.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield cast(pa.Table, batch).to_pylist()


def base_url_of(config: GenerateConfig) -> str:
    """The driver's endpoint goes to every actor; the key does not, each node has its own environment."""
    return config.teacher.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_BASE_URL
