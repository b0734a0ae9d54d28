"""Texts -> verdicts, by backends behind one another. It fails closed: without a verdict no text may pass."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from alpaca_ray.config import ModerationConfig, UserError
from alpaca_ray.safety.breaker import Breaker, BreakerStats
from alpaca_ray.safety.gather import Gather
from alpaca_ray.safety.local_moderation import LocalModerator
from alpaca_ray.safety.verdict import ModerationUnavailableError, Moderator, UnjudgeableTextError, Verdict, joined

logger = logging.getLogger(__name__)

Policy = Literal["first", "both"]
Clock = Callable[[], float]


@dataclass(frozen=True)
class BackendStats:
    """`failures`: how often each reason was met."""

    breaker: BreakerStats
    failures: dict[str, int]


class Backend:
    """A Moderator with a name, a breaker and a time-out for the whole answer."""

    def __init__(self, name: str, moderator: Moderator, breaker: Breaker | None = None, timeout_s: float = 2.5) -> None:
        self.name = name
        self._moderator, self._breaker, self._timeout_s = moderator, breaker or Breaker(), timeout_s
        self._failures: Counter[str] = Counter()

    async def ask(self, texts: Sequence[str], clock: Clock) -> list[Verdict] | str:
        """The verdicts, or the reason why there are none. Raises UnjudgeableTextError."""
        permit = self._breaker.permit(clock())
        if permit is None:
            return "breaker_open"
        try:
            answer = await self._call(texts)
        except UnjudgeableTextError:
            self._breaker.succeeded(permit)  # it is well
            raise
        except BaseException:  # the task was cancelled, or the backend has a bug
            self._breaker.abandoned(permit)
            raise
        if isinstance(answer, str):
            self._breaker.failed(permit, clock())
            self._failures[answer] += 1
            logger.warning("moderation: %s gave no verdict (%s), breaker %s", self.name, answer, self._state)
        else:
            self._breaker.succeeded(permit)
        return answer

    def stats(self) -> BackendStats:
        """A copy."""
        return BackendStats(self._breaker.stats(), dict(self._failures))

    @property
    def _state(self) -> str:
        return self._breaker.stats().state

    async def _call(self, texts: Sequence[str]) -> list[Verdict] | str:
        try:
            async with asyncio.timeout(self._timeout_s):
                verdicts = await self._moderator.moderate(texts)
        except UnjudgeableTextError:
            raise
        except ModerationUnavailableError as error:
            return error.reason
        except TimeoutError:
            return "timeout"
        return verdicts if len(verdicts) == len(texts) else "bad_response"


class Chain:
    """A Moderator from backends, the best first, for one event loop.

    "first": the first backend that answers decides. "both": all are asked, and one that flags is enough. A verdict is
    degraded where a backend that should have had a say did not answer.
    """

    def __init__(self, backends: Sequence[Backend], policy: Policy = "first", clock: Clock = time.monotonic) -> None:
        if not backends:
            raise UserError("moderation.backends: name at least one of openai, local")
        self._backends, self._clock = tuple(backends), clock
        self._gather = Gather(self._first if policy == "first" else self._both)

    async def moderate(self, texts: Sequence[str]) -> list[Verdict]:
        """See `Moderator`. Texts of callers within a few milliseconds are judged together, equal ones once."""
        return await self._gather.judge(texts)

    def stats(self) -> dict[str, BackendStats]:
        """By the backend's name."""
        return {backend.name: backend.stats() for backend in self._backends}

    async def _first(self, texts: Sequence[str]) -> list[Verdict]:
        reasons: list[str] = []
        for backend in self._backends:
            answer = await backend.ask(texts, self._clock)
            if not isinstance(answer, str):
                return [replace(verdict, degraded=verdict.degraded or bool(reasons)) for verdict in answer]
            reasons.append(f"{backend.name}: {answer}")
        raise ModerationUnavailableError(", ".join(reasons))

    async def _both(self, texts: Sequence[str]) -> list[Verdict]:
        answers = await asyncio.gather(*(backend.ask(texts, self._clock) for backend in self._backends))
        given = [answer for answer in answers if not isinstance(answer, str)]
        if not given:
            named = zip(self._backends, answers, strict=True)
            raise ModerationUnavailableError(", ".join(f"{backend.name}: {answer}" for backend, answer in named))
        is_partial = len(given) < len(answers)
        return [
            replace(joined(verdicts), degraded=is_partial or all(verdict.degraded for verdict in verdicts))
            for verdicts in zip(*given, strict=True)
        ]


def moderator(config: ModerationConfig) -> Chain:
    """The backends that the config names. Raises UserError for a key that is not there."""

    def made(name: str) -> Moderator:
        if name == "local":
            return LocalModerator()
        from alpaca_ray.safety.openai_moderation import OpenAIModerator, read_key  # the SDK: a second to import

        return OpenAIModerator(read_key(config.key_env), config.base_url, config.model, config.timeout_s)

    return Chain(
        [Backend(name, made(name), timeout_s=1.25 * config.timeout_s) for name in config.backends], config.policy
    )


def moderate(texts: Sequence[str], moderator: Moderator | None = None) -> list[Verdict]:
    """For scripts and notebooks, outside any event loop. `moderator` None: the local patterns."""
    return asyncio.run((moderator or LocalModerator()).moderate(texts))
