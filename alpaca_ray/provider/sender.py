"""One request from the gate to the journal: wait for a slot, send, try again what passes, keep what was paid for.

A sender lives in each generation actor; they all ask one gate.
"""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from alpaca_ray.artifacts import RunDirectory
from alpaca_ray.config import GenerateConfig, TeacherConfig
from alpaca_ray.provider.budget import Budget, Charge, price_of, worst_case
from alpaca_ray.provider.client import Client
from alpaca_ray.provider.failures import FATAL_ERRORS, FINAL_ERRORS, UNKNOWN_COST_ERRORS
from alpaca_ray.provider.gate import Ask, Permit, Permits, Report
from alpaca_ray.provider.journal import Cost, Journal, Writer
from alpaca_ray.provider.limiter import parse_limit_headers
from alpaca_ray.provider.request import Request, request_key
from alpaca_ray.schema import Completion

BATCH = 64  # requests in one call of the gate
GATHER_S = 0.01  # what comes to the gate within it goes in one call; each costs the gate 0.35 ms of CPU
MAX_POLL_S = 1.0  # a stop is heard of within this time
BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0
NOT_ASKED = "not_asked"  # the error of a request that a stopped run did not send


class GateCalls(Protocol):
    """The gate as a sender sees it, over whatever lies between."""

    def acquire(self, owner: str, asks: Sequence[Ask]) -> Awaitable[Permits]: ...

    def give_back(self, permits: Sequence[Permit]) -> Awaitable[None]: ...

    def settle(self, reports: Sequence[Report]) -> Awaitable[None]: ...

    def stop(self, reason: str) -> Awaitable[None]: ...


@dataclass(frozen=True)
class Turn:
    """A permit and when to use it, on the loop's clock; or why the run has stopped; or neither: see the journal.

    The gate's "now" was somewhere between the call and its answer. Counted from either end, the request can be neither
    too early nor too late by the gate's clock.
    """

    permit: Permit | None = None
    start_s: float = 0.0
    end_s: float = 0.0
    stopped: str | None = None


class Queue:
    """The way to the gate: what asks and what reports come in together go in one call each."""

    def __init__(self, gate: GateCalls, owner: str, max_delay_s: float) -> None:
        self._gate, self._owner, self._max_delay_s = gate, owner, max_delay_s
        self._asking: list[tuple[Ask, asyncio.Future[Turn]]] = []
        self._reports: list[Report] = []
        self._asker: asyncio.Task[None] | None = None
        self._reporter: asyncio.Task[None] | None = None

    async def turn(self, ask: Ask) -> Turn:
        """Wait until the gate lets this request out."""
        future: asyncio.Future[Turn] = asyncio.get_running_loop().create_future()
        self._asking.append((ask, future))
        if self._asker is None or self._asker.done():
            self._asker = asyncio.create_task(self._ask())
        return await future

    async def missed(self, turn: Turn, may_send: Callable[[], bool]) -> bool:
        """Sleep until the turn; True if it has come too late to use, or may not be used now, and is given back."""
        assert turn.permit is not None
        loop = asyncio.get_running_loop()
        await asyncio.sleep(turn.start_s - loop.time())
        if loop.time() <= turn.end_s and may_send():
            return False
        await self._gate.give_back([turn.permit])
        return True

    def report(self, report: Report) -> None:
        """Tell the gate soon."""
        self._reports.append(report)
        if self._reporter is None or self._reporter.done():
            self._reporter = asyncio.create_task(self._tell())

    async def flush(self) -> None:
        """Return when the gate has heard all reports."""
        if self._reporter is not None:
            await self._reporter

    async def _ask(self) -> None:
        try:
            while self._asking:
                await asyncio.sleep(GATHER_S)
                await self._ask_once()
        except Exception as error:  # the gate is gone for good: those who wait must hear of it
            for _, future in self._asking:
                future.set_exception(error)
            self._asking = []

    async def _ask_once(self) -> None:
        loop = asyncio.get_running_loop()
        batch = self._asking[:BATCH]
        called_s = loop.time()
        permits = await self._gate.acquire(self._owner, [ask for ask, _ in batch])
        answered_s = loop.time()
        if answered_s - called_s > self._max_delay_s:  # nobody can tell when those slots were meant to be
            await self._gate.give_back(permits.granted)
            return
        turns = _turns(permits, [ask.key for ask, _ in batch], answered_s, called_s + self._max_delay_s)
        self._asking = [(ask, future) for ask, future in self._asking if ask.key not in turns]
        for ask, future in batch:
            if ask.key in turns:
                future.set_result(turns[ask.key])
        if len(turns) < len(batch):
            await asyncio.sleep(min(permits.retry_in_s, MAX_POLL_S))

    async def _tell(self) -> None:
        while self._reports:
            await asyncio.sleep(GATHER_S)
            batch, self._reports = self._reports, []
            await self._gate.settle(batch)


def _turns(permits: Permits, keys: Sequence[str], first_s: float, last_s: float) -> dict[str, Turn]:
    """The turns of those that need not ask again; a permit without delay is good from `first_s` to `last_s`."""
    if permits.stopped is not None:
        return {key: Turn(stopped=permits.stopped) for key in keys}
    turns = {key: Turn() for key in permits.replay}
    return turns | {p.key: Turn(p, first_s + p.delay_s, last_s + p.delay_s) for p in permits.granted}


class Sender:
    """Answers requests, `concurrent_requests_per_actor` at once; each answer is durable before it is returned."""

    def __init__(
        self, config: GenerateConfig, base_url: str, gate: GateCalls, journal: tuple[RunDirectory, str]
    ) -> None:
        teacher = config.teacher
        self._teacher, self._base_url, self._gate = teacher, base_url, gate
        self._client = Client(teacher)
        self._prices = Budget(None, None, price_of(teacher.model, teacher.price))
        self._journal_place = journal
        self._journal: Journal | None = None
        self._writer = Writer(*journal)
        self._queue = Queue(gate, self._writer.name, config.limits.window_s / 120)
        self._free = asyncio.Semaphore(config.concurrent_requests_per_actor)

    async def answer(self, request: Request) -> tuple[str, Completion]:
        """The request's key and its completion: paid for now, or found in the journal.

        A request that a stopped run did not send has the error "not_asked". A journal that cannot be written stops
        the run.
        """
        key = request_key(request, self._teacher, self._base_url)
        try:
            async with self._free:
                completion, attempt = await self._pursue(key, request)
            if attempt is not None:
                # Outside the semaphore: the next request goes out while this answer is synced.
                await self._writer.answered(key, attempt, completion)
        except OSError as error:
            reason = f"the journal cannot be written ({error}): free space, or choose another --storage-path"
            await self._gate.stop(reason)
            return key, Completion(None, NOT_ASKED, error_detail=reason)
        return key, completion

    async def flush(self) -> None:
        """Return when the gate has heard of all that was answered."""
        await self._queue.flush()

    async def close(self) -> None:
        """Flush, and close the connections."""
        await self.flush()
        await self._client.close()

    async def _pursue(self, key: str, request: Request) -> tuple[Completion, int | None]:
        """A completion, and the number of the attempt to file it under; None where there is nothing to file."""
        ask, failures = ask_for(key, request, self._teacher), 0
        while True:
            await self._writer.ready()
            turn = await self._queue.turn(ask)
            if turn.stopped is not None:
                return Completion(None, NOT_ASKED, error_detail=turn.stopped), None
            if turn.permit is None:
                if found := self._replay(key):
                    return found, None
                ask = replace(ask, replayed=True)
            elif not await self._queue.missed(turn, self._writer.is_ready):
                completion, attempt = await self._attempt(ask, turn.permit, request, failures)
                failures += completion.error is not None and completion.error != "rate_limit"
                if completion.error is None or completion.error in FINAL_ERRORS:
                    return completion, attempt
                if self._is_final(completion.error, failures):
                    return completion, None
                await asyncio.sleep(_backoff_s(completion.error, failures))

    async def _attempt(self, ask: Ask, permit: Permit, request: Request, failures: int) -> tuple[Completion, int]:
        """Send once; the journal and the gate know of it before and after."""
        attempt = self._writer.sent(ask.key, Cost(ask.worst.tokens, self._prices.usd(ask.worst)))
        reply = await self._client.complete(request)
        error = reply.completion.error
        charged = charge_of(reply.completion, ask.worst)
        completion = replace(reply.completion, usd=self._prices.usd(charged))
        if error is not None and error not in FINAL_ERRORS:
            self._writer.failed(ask.key, attempt, error, Cost(charged.tokens, completion.usd))
        headers, detail = parse_limit_headers(reply.headers), completion.error_detail or ""
        final = self._is_final(error, failures + 1)
        self._queue.report(Report(permit.lease_id, ask.key, error, charged, headers, final, detail))
        return completion, attempt

    def _is_final(self, error: str | None, failures: int) -> bool:
        """Whether this request is not tried again. The gate knows how long 429s are waited out."""
        return error != "rate_limit" and (error in FATAL_ERRORS or failures >= self._teacher.max_attempts)

    def _replay(self, key: str) -> Completion | None:
        if self._journal is None:
            self._journal = Journal(*self._journal_place)
        else:
            self._journal.refresh()
        return self._journal.answer(key)


def ask_for(key: str, request: Request, teacher: TeacherConfig) -> Ask:
    """What a request takes of the limits and, at most, of the budget."""
    text = request.prompt + ("" if request.response_format is None else json.dumps(request.response_format))
    # English has more than 3 bytes a token; the server's own count replaces this guess with the answer.
    tokens = len(text.encode()) // 3 + 16 + teacher.max_tokens
    return Ask(key, tokens, worst_case(text, teacher.max_tokens))


def charge_of(completion: Completion, worst: Charge) -> Charge:
    """What an attempt may have been billed for; a server that counts no tokens is taken at the worst."""
    counted = Charge(completion.prompt_tokens, completion.completion_tokens)
    if completion.error in UNKNOWN_COST_ERRORS or (completion.text is not None and counted.tokens == 0):
        return worst
    return counted


def _backoff_s(error: str, failures: int) -> float:
    """Exponential with full jitter. None after a 429: the gate holds everything back as long as it takes."""
    return 0.0 if error == "rate_limit" else random.uniform(0, min(MAX_BACKOFF_S, BACKOFF_S * 2**failures))
