"""Which rows the engine works on in its next step: bookkeeping, in the engine's thread alone."""

import asyncio
import heapq
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass

from alpaca_ray.serve.engine import Delta, EngineError, FinishReason, TokenLogprob, TokenRequest
from alpaca_ray.serve.sampling import RowSampling


class Row:
    """One request in the engine, and the way back to the event loop that waits for it."""

    def __init__(
        self, request: TokenRequest, sampling: RowSampling, num_left: int, stop_token_ids: frozenset[int]
    ) -> None:
        self.request, self.sampling = request, sampling
        self.ids = [*request.prompt_token_ids, *request.emitted]
        self.num_left = num_left  # tokens that it may still generate
        self.cancelled = False  # set by the consumer, read by the engine's thread
        self.slot = -1
        self.num_cached = 0  # of ids
        self.prompt_logprobs: list[TokenLogprob] = []
        self.loop = asyncio.get_running_loop()
        self._num_given = len(self.ids)
        self._stop_token_ids = stop_token_ids
        self._inbox: asyncio.Queue[Delta | EngineError] = asyncio.Queue()

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """What the engine sent, up to the finish. Raises EngineError where it failed."""
        while True:
            item = await self._inbox.get()
            if isinstance(item, EngineError):
                raise item
            yield item
            if item.finish_reason is not None:
                return

    @property
    def is_decoding(self) -> bool:
        """Whether all but its newest token, one of its own making, are in the cache."""
        return len(self.ids) > self._num_given

    def accept(self, token_id: int, logprob: TokenLogprob | None) -> Delta:
        """Take the row's next token; what to tell its consumer."""
        if token_id in self._stop_token_ids:
            return self.end("stop")
        self.ids.append(token_id)
        self.sampling.append(token_id)
        self.num_left -= 1
        finish_reason: FinishReason | None = "length" if self.num_left == 0 else None
        return Delta((token_id,), finish_reason, () if logprob is None else (logprob,), self._take_prompt_logprobs())

    def end(self, finish_reason: FinishReason) -> Delta:
        """The last word to the consumer, without a token."""
        return Delta((), finish_reason, (), self._take_prompt_logprobs())

    def receive(self, item: Delta | EngineError) -> None:
        """In the consumer's event loop."""
        self._inbox.put_nowait(item)

    def _take_prompt_logprobs(self) -> tuple[TokenLogprob, ...]:
        taken, self.prompt_logprobs = tuple(self.prompt_logprobs), []
        return taken


@dataclass(frozen=True)
class Turn:
    """A row's part in a step: so many of its tokens that are not in the cache yet."""

    row: Row
    num_tokens: int

    @property
    def is_complete(self) -> bool:
        """Whether all of the row's tokens are in the cache after this."""
        return self.row.num_cached + self.num_tokens == len(self.row.ids)

    @property
    def chooses(self) -> bool:
        """Whether the row gets its next token from this."""
        return self.is_complete and self.row.num_left > 0

    @property
    def echoes(self) -> bool:
        """Whether log-probabilities of these tokens, the prompt's, are asked for."""
        return self.row.request.echoes_logprobs and not self.row.is_decoding


class Schedule:
    """Rows in the order in which they came; each running row has a slot of the cache."""

    def __init__(self, num_slots: int, prefill_chunk: int) -> None:
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self._free_slots = list(range(num_slots))  # a heap: low slots first keeps the used ones side by side
        self._prefill_chunk = prefill_chunk

    def admit(self) -> None:
        """Give free slots to the rows that wait longest."""
        while self.waiting and self._free_slots:
            row = self.waiting.popleft()
            row.slot = heapq.heappop(self._free_slots)
            self.running.append(row)

    def drop_cancelled(self) -> list[Row]:
        """Forget the rows whose consumer has left; those that had a slot."""
        if any(row.cancelled for row in self.waiting):
            self.waiting = deque(row for row in self.waiting if not row.cancelled)
        dropped = [row for row in self.running if row.cancelled]
        self.remove(dropped)
        return dropped

    def remove(self, rows: Iterable[Row]) -> None:
        """Take running rows out and their slots back."""
        for row in rows:
            self.running.remove(row)
            heapq.heappush(self._free_slots, row.slot)

    def turns(self) -> list[Turn]:
        """The next step: a token of every row that decodes, `prefill_chunk` tokens of the others; by slot."""
        budget, turns = self._prefill_chunk, []
        for row in self.running:
            num_tokens = len(row.ids) - row.num_cached
            if not row.is_decoding:
                num_tokens = min(num_tokens, budget)
                budget -= num_tokens
            if num_tokens > 0:
                turns.append(Turn(row, num_tokens))
        return sorted(turns, key=lambda turn: turn.row.slot)
