"""Texts of concurrent callers, gathered for a few milliseconds and judged together."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from alpaca_ray.safety.verdict import ModerationUnavailableError, UnjudgeableTextError, Verdict

Judge = Callable[[Sequence[str]], Awaitable[list[Verdict]]]
_Ends = dict[str, asyncio.Future[Verdict | ModerationUnavailableError]]


class Gather:
    """Of one event loop. Equal texts are judged once: the choices of one request share a prompt."""

    def __init__(self, judge: Judge, max_texts: int = 32, wait_s: float = 0.005) -> None:
        self._judge, self._max_texts, self._wait_s = judge, max_texts, wait_s
        self._waiting: _Ends = {}
        self._timer: asyncio.TimerHandle | None = None
        self._running: set[asyncio.Task[None]] = set()

    async def judge(self, texts: Sequence[str]) -> list[Verdict]:
        """One verdict for each text. Raises ModerationUnavailableError if one of them got none.

        A caller that leaves takes nothing from the others.
        """
        ends = [self._enqueue(text) for text in texts]
        if ends:
            await asyncio.wait(set(ends))  # unlike gather, it cancels no future that others may wait for
        verdicts: list[Verdict] = []
        for end in ends:
            result = end.result()
            if isinstance(result, ModerationUnavailableError):
                raise type(result)(result.reason)
            verdicts.append(result)
        return verdicts

    def _enqueue(self, text: str) -> asyncio.Future[Verdict | ModerationUnavailableError]:
        loop = asyncio.get_running_loop()
        if self._timer is None:
            self._timer = loop.call_later(self._wait_s, self._send)
        end = self._waiting.setdefault(text, loop.create_future())
        if len(self._waiting) >= self._max_texts:
            self._send()
        return end

    def _send(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        ends, self._waiting = self._waiting, {}
        task = asyncio.create_task(self._settle(ends))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _settle(self, ends: _Ends) -> None:
        """Give each future its end, whatever happens: a caller must never hang."""
        try:
            verdicts = await self._judge(list(ends))
            for end, verdict in zip(ends.values(), verdicts, strict=True):
                end.set_result(verdict)
        except UnjudgeableTextError as error:
            await self._settle_halves(ends, error)
        except ModerationUnavailableError as error:
            _give_up(ends, error)
        finally:
            _give_up(ends, ModerationUnavailableError("internal"))

    async def _settle_halves(self, ends: _Ends, error: UnjudgeableTextError) -> None:
        """One text that cannot be judged must not take those of other callers down."""
        if len(ends) == 1:
            return _give_up(ends, error)
        items, middle = list(ends.items()), len(ends) // 2
        await asyncio.gather(self._settle(dict(items[:middle])), self._settle(dict(items[middle:])))


def _give_up(ends: _Ends, error: ModerationUnavailableError) -> None:
    for end in ends.values():
        if not end.done():
            end.set_result(error)
