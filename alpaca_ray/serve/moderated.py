"""A TextModel whose inputs and outputs are judged: no character leaves before the text up to it has passed."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

from alpaca_ray.safety.verdict import ModerationUnavailableError, Moderator, Verdict, joined
from alpaca_ray.serve.engine import EngineError, Health
from alpaca_ray.serve.hold import Hold
from alpaca_ray.serve.sentences import MAX_CHARS, MIN_CHARS
from alpaca_ray.serve.text import TextDelta, TextModel, TextRequest, TokenPrompt, prompt_text

Kind = Literal["input", "output"]
# (None: no verdict could be had; what was judged; how long it took in seconds). It is told nothing of the text.
Record = Callable[[Verdict | None, Kind, float], None]


class ContentFilterError(ValueError):
    """The prompt was flagged: the model has not seen it."""

    def __init__(self, categories: tuple[str, ...]) -> None:
        super().__init__(categories)
        self.categories = categories

    def __str__(self) -> str:
        return f"The prompt was flagged by moderation ({', '.join(self.categories)}); change it and ask again"


def _record_nothing(verdict: Verdict | None, kind: Kind, latency_s: float) -> None:
    pass


@dataclass(frozen=True)
class Patience:
    """How much text is held for one sentence, in characters, and how long one judgement may take in all.

    `timeout_s` is the last resort: a Chain gives up on each of its backends sooner.
    """

    min_sentence_chars: int = MIN_CHARS
    max_held_chars: int = MAX_CHARS
    timeout_s: float = 10.0


class ModeratedModel:
    """`model` behind `moderator`. It has to see the whole text, so it goes around a model that resumes, never inside.

    The model goes on while a sentence is judged. Each stream has one judgement out at a time, with all that is new.
    Not judged: the likeliest other tokens in `logprobs`, single ones beside text that has passed; and a plain prompt
    together with what goes on behind it, each is judged alone.
    """

    def __init__(
        self,
        model: TextModel,
        moderator: Moderator,
        record: Record = _record_nothing,
        patience: Patience = Patience(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model, self._moderator, self._record = model, moderator, record
        self._patience, self._clock = patience, clock

    async def complete(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        """See `TextModel`. Raises ContentFilterError, or ModerationUnavailableError, before the first delta.

        A flagged sentence ends the stream before it with "content_filter"; so does one without a verdict, behind others
        that were sent already.
        """
        assert not request.emitted, "the first half of a resumed request cannot be judged here"
        await self._judge_prompt(request)
        hold, news = self._hold(), asyncio.Event()
        pump = asyncio.create_task(_fill(hold, self._model.complete(request), news))
        is_begun = False
        try:
            while not hold.is_over:
                await _more(pump, hold, news)
                last = hold.ends[-1]
                clean_end = await self._clean_end(hold, may_raise=not is_begun)
                if clean_end < last:
                    await _stop(pump)
                if delta := hold.release(clean_end):
                    is_begun = True
                    yield delta
                if clean_end < last:
                    yield TextDelta("", hold.num_prompt_tokens, 0, "content_filter")
                    return
        finally:
            await _stop(pump)

    async def health(self) -> Health:
        """See `TextModel`."""
        return await self._model.health()

    def _hold(self) -> Hold:
        return Hold(self._patience.min_sentence_chars, self._patience.max_held_chars)

    async def _judge_prompt(self, request: TextRequest) -> None:
        prompt = request.prompt
        if isinstance(prompt, TokenPrompt):
            prompt = await prompt_text(self._model, prompt)
        texts = [prompt] if isinstance(prompt, str) else [message.content for message in prompt]
        if len(texts) > 1:
            texts.append("\n".join(texts))  # harm may be spread over messages
        texts = [text for text in texts if text.strip()]
        verdict = await self._judge(texts, "input") if texts else None
        if verdict is not None and verdict.flagged:
            raise ContentFilterError(verdict.categories)

    async def _clean_end(self, hold: Hold, may_raise: bool) -> int:
        """How far the text may be shown: the end of a held sentence, or where the first one begins."""
        ends = hold.ends
        if hold.is_blank(ends[-1]):
            return ends[-1]
        try:
            verdict = await self._judge([hold.text_until(ends[-1])], "output")
        except ModerationUnavailableError:
            if may_raise:
                raise
            return hold.shown
        return await self._before_flagged(hold, ends) if verdict.flagged else ends[-1]

    async def _before_flagged(self, hold: Hold, ends: Sequence[int]) -> int:
        """Where the first flagged sentence begins, by halving: `ends` were judged together, the last is flagged."""
        clean, flagged = -1, len(ends) - 1
        while flagged - clean > 1:
            middle = (clean + flagged) // 2
            try:
                verdict = await self._ask([hold.text_until(ends[middle])])
            except ModerationUnavailableError:
                break
            clean, flagged = (clean, middle) if verdict.flagged else (middle, flagged)
        return hold.shown if clean < 0 else ends[clean]

    async def _judge(self, texts: Sequence[str], kind: Kind) -> Verdict:
        started_s = self._clock()
        try:
            verdict = await self._ask(texts)
        except ModerationUnavailableError:
            self._record(None, kind, self._clock() - started_s)
            raise
        self._record(verdict, kind, self._clock() - started_s)
        return verdict

    async def _ask(self, texts: Sequence[str]) -> Verdict:
        """One verdict for all of them. No verdict for one is no verdict."""
        try:
            async with asyncio.timeout(self._patience.timeout_s):
                verdicts = await self._moderator.moderate(texts)
        except TimeoutError:
            raise ModerationUnavailableError("timeout") from None
        if len(verdicts) != len(texts):
            raise ModerationUnavailableError("bad_response")
        return joined(verdicts)


async def _fill(hold: Hold, deltas: AsyncGenerator[TextDelta, None], news: asyncio.Event) -> None:
    try:
        async with aclosing(deltas):
            async for delta in deltas:
                hold.push(delta)
                if hold.ends:
                    news.set()
    finally:
        news.set()


async def _more(pump: asyncio.Task[None], hold: Hold, news: asyncio.Event) -> None:
    """Wait for a held sentence that is whole. Raises what the model raised: nothing behind it will come."""
    while True:
        await news.wait()
        news.clear()
        if hold.ends and not _failed(pump):
            return
        if pump.done():
            pump.result()
            raise EngineError("a completion ended without a finish reason")


def _failed(pump: asyncio.Task[None]) -> bool:
    return pump.done() and pump.exception() is not None


async def _stop(pump: asyncio.Task[None]) -> None:
    pump.cancel()
    await asyncio.gather(pump, return_exceptions=True)
