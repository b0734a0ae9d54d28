"""[RAY] The gate as an actor. Apart from the pool: it starts sooner, and anew, without Ray Data and the SDK."""

import warnings
from collections.abc import Awaitable, Sequence
from typing import Any

import ray
from ray.util.metrics import Gauge

from alpaca_ray.artifacts import RunDirectory
from alpaca_ray.config import GenerateConfig
from alpaca_ray.provider.budget import Budget, price_of
from alpaca_ray.provider.gate import Ask, Gate, GateState, Permit, Permits, Report

_METRICS = {
    "answered": "Requests answered",
    "failed": "Requests given up",
    "retried": "Attempts that failed and were made again",
    "tokens": "Tokens of prompts and completions paid for",
    "usd": "US dollars spent",
    "requests_per_minute": "Requests in the last window of the rate limit",
    "tokens_per_minute": "Tokens in the last window of the rate limit",
    "requests_limit": "Requests that the rate limit allows in a window; not told where there is none",
    "tokens_limit": "Tokens that the rate limit allows in a window; not told where there is none",
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
        for name in ("requests_limit", "tokens_limit"):
            limit = getattr(state.limiter, name)
            if limit is not None:
                self._gauges[name].set(limit)
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
