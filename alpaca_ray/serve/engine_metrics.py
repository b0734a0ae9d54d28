"""[RAY SERVE] What an engine replica does, in Ray's metrics, with its application's name. No label is a client's text.

Tokens are told as they come. What the engine holds is told by `report`, once a period.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Protocol

from ray.serve.metrics import Counter, Gauge, Histogram

from alpaca_ray.serve.engine import Delta, Engine, Health, TokenRequest

PREFIX = "alpaca_ray_serve"
PERIOD_S = 1.0  # Ray exports every 10 s, by default
FIRST_TOKEN_S = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60]
BETWEEN_TOKENS_S = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]


class Counts(Protocol):
    """What an engine holds now; see EngineStats."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def num_cached_tokens(self) -> int: ...
    @property
    def num_cache_tokens(self) -> int: ...
    @property
    def num_steps(self) -> int: ...


class MeteredEngine:
    """An Engine whose tokens are counted and timed. `is_marked`: they carry the watermark, every one."""

    def __init__(
        self,
        engine: Engine,
        stats: Callable[[], Counts],
        is_marked: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._stats, self._is_marked, self._clock = engine, stats, is_marked, clock
        self._num_tokens = 0
        self._first_token_s = Histogram(
            f"{PREFIX}_engine_first_token_s", "Seconds from a request's arrival to its first token", FIRST_TOKEN_S
        )
        self._between_tokens_s = Histogram(
            f"{PREFIX}_engine_between_tokens_s", "Seconds from a token to the next of its request", BETWEEN_TOKENS_S
        )
        self._tokens = Counter(f"{PREFIX}_engine_tokens", "Tokens that were generated")
        self._watermarked = Counter(f"{PREFIX}_engine_watermarked_tokens", "Of them, those that carry the mark")
        self._steps = Counter(f"{PREFIX}_engine_steps", "Steps of the batch")
        self._gauges = {
            name: Gauge(f"{PREFIX}_engine_{name}", description)
            for name, description in (
                ("tokens_per_s", "Tokens generated per second, in the last period"),
                ("batch_size", "Requests that are decoded together"),
                ("waiting", "Requests that wait for a row of the batch"),
                ("cached_tokens", "Tokens in the cache"),
                ("cache_tokens", "Tokens that the cache has room for"),
                ("tasks", "Tasks of the replica's event loop"),
            )
        }

    async def generate(self, request: TokenRequest) -> AsyncGenerator[Delta, None]:
        """See `Engine`."""
        last_s, is_first = self._clock(), True
        async with aclosing(self._engine.generate(request)) as deltas:
            async for delta in deltas:
                if num_tokens := len(delta.token_ids):
                    now_s = self._clock()
                    if is_first:
                        self._first_token_s.observe(now_s - last_s)
                    else:
                        self._between_tokens_s.observe((now_s - last_s) / num_tokens)
                    last_s, is_first = now_s, False
                    self._num_tokens += num_tokens
                yield delta

    async def health(self) -> Health:
        """See `Engine`."""
        return await self._engine.health()

    async def report(self, period_s: float = PERIOD_S) -> None:
        """Tell what the engine holds, for ever."""
        told_s, num_steps = self._clock(), 0
        while True:
            await asyncio.sleep(period_s)
            now_s, stats = self._clock(), self._stats()
            self._tell(stats, stats.num_steps - num_steps, now_s - told_s)
            told_s, num_steps = now_s, stats.num_steps

    def _tell(self, stats: Counts, num_steps: int, seconds: float) -> None:
        num_tokens, self._num_tokens = self._num_tokens, 0
        values = {
            "tokens_per_s": num_tokens / seconds,
            "batch_size": stats.num_running,
            "waiting": stats.num_waiting,
            "cached_tokens": stats.num_cached_tokens,
            "cache_tokens": stats.num_cache_tokens,
            "tasks": len(asyncio.all_tasks()),
        }
        for name, value in values.items():
            self._gauges[name].set(value)
        for counter, number in (
            (self._tokens, num_tokens),
            (self._watermarked, num_tokens if self._is_marked else 0),
            (self._steps, num_steps),
        ):
            if number:  # Ray refuses to count nothing
                counter.inc(number)
