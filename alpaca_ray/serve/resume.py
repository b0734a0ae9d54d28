"""A completion that outlives the model that gives it: another one goes on behind what was already sent."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

from alpaca_ray.serve.engine import EngineError, Health
from alpaca_ray.serve.text import TextDelta, TextModel, TextRequest

Answer = TypeVar("Answer")


def _record_nothing() -> None:
    pass


class Resuming:
    """A TextModel over models that may die. `models()` is asked for one at every attempt.

    `record` hears of each attempt after the first. There are `max_attempts` in all, progress or not: a request that
    kills what answers it must not go on to kill the next for ever.
    """

    def __init__(
        self, models: Callable[[], TextModel], max_attempts: int, record: Callable[[], None] = _record_nothing
    ) -> None:
        self._models, self._max_attempts, self._record = models, max_attempts, record

    async def complete(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        """See `TextModel`. EngineError: the last attempt failed too."""
        sent = _Sent(request)
        for attempt in range(1, self._max_attempts + 1):
            try:
                async with aclosing(self._models().complete(sent.rest())) as deltas:
                    async for delta in deltas:
                        sent.add(delta)
                        yield delta
                        if delta.finish_reason is not None:
                            return
                raise EngineError("a completion ended without a finish reason")
            except EngineError:
                if attempt == self._max_attempts:
                    raise
                self._record()

    async def health(self) -> Health:
        """See `TextModel`."""
        return await self._models().health()


async def retried(ask: Callable[[], Awaitable[Answer]], max_attempts: int) -> Answer:
    """The answer to a question that models may die on. EngineError: the last attempt failed too."""
    for _ in range(max_attempts - 1):
        try:
            return await ask()
        except EngineError:
            continue
    return await ask()


class _Sent:
    """What of a request is done."""

    def __init__(self, request: TextRequest) -> None:
        self._request = request
        self._token_ids, self._num_characters = list(request.emitted), request.num_shown
        self._is_echoed = False

    def add(self, delta: TextDelta) -> None:
        self._token_ids += delta.token_ids
        self._num_characters += len(delta.text)
        self._is_echoed = self._is_echoed or delta.prompt is not None

    def rest(self) -> TextRequest:
        """The request for what is not done."""
        return replace(
            self._request,
            echo=self._request.echo and not self._is_echoed,
            emitted=tuple(self._token_ids),
            num_shown=self._num_characters,
        )
