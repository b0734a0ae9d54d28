"""A completion that outlives the model that gives it: another one goes on behind what was already sent."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from alpaca_ray.serve.engine import EngineError, Health
from alpaca_ray.serve.text import TextDelta, TextModel, TextRequest


class Resuming:
    """A TextModel over models that may die. `models()` is asked for one at every attempt.

    A request is tried `max_attempts` times in all, progress or not: one that kills what answers it must not go on to
    kill the next for ever.
    """

    def __init__(self, models: Callable[[], TextModel], max_attempts: int) -> None:
        self._models, self._max_attempts = models, max_attempts

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

    async def health(self) -> Health:
        """See `TextModel`."""
        return await self._models().health()


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
