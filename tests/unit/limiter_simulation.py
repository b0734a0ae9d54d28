"""A strict server and its senders in simulated time: what tests/unit/test_limiter.py puts the limiter through."""

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from alpaca_ray.provider.limit_headers import LimitHeaders
from alpaca_ray.provider.limiter import Lease, Outcome, RateLimiter


def most_within(span_s: float, times_s: Sequence[float]) -> int:
    """The most of the times, which are in order, in any (t - span_s, t]."""
    most = first = 0
    for last, time_s in enumerate(times_s):
        while times_s[first] <= time_s - span_s:
            first += 1
        most = max(most, last - first + 1)
    return most


@dataclass
class Admitted:
    time_s: float
    tokens: int


class StrictServer:
    """Sliding windows: a request counts with what it reserves when it comes, with what it used when it is answered."""

    def __init__(self, requests: float, tokens: float, window_s: float) -> None:
        self.requests, self.tokens, self.window_s = requests, tokens, window_s
        self.times_s: list[float] = []
        self.used_tokens: list[tuple[float, int]] = []  # at what time how many
        self.refused_s: list[float] = []
        self._window: deque[Admitted] = deque()
        self._sum = 0

    def admit(self, now_s: float, tokens: int) -> Admitted | None:
        self._forget(now_s)
        if len(self._window) + 1 > self.requests or self._sum + tokens > self.tokens:
            self.refused_s.append(now_s)
            return None
        entry = Admitted(now_s, tokens)
        self._window.append(entry)
        self._sum += tokens
        self.times_s.append(now_s)
        return entry

    def answer(self, entry: Admitted, tokens: int) -> None:
        if self._window and entry.time_s >= self._window[0].time_s:
            self._sum += tokens - entry.tokens
        entry.tokens = tokens
        self.used_tokens.append((entry.time_s, tokens))

    def headers(self, now_s: float) -> LimitHeaders:
        self._forget(now_s)
        said = LimitHeaders()
        if math.isfinite(self.requests):
            left = int(self.requests) - len(self._window)
            said = replace(
                said, limit_requests=int(self.requests), remaining_requests=left, reset_requests_s=self.window_s
            )
        if math.isfinite(self.tokens):
            left = int(self.tokens) - self._sum
            said = replace(said, limit_tokens=int(self.tokens), remaining_tokens=left, reset_tokens_s=self.window_s)
        return said

    def most_within(self, span_s: float) -> int:
        """The most requests in any (t - span_s, t]."""
        return most_within(span_s, self.times_s)

    def _forget(self, now_s: float) -> None:
        while self._window and self._window[0].time_s <= now_s - self.window_s:
            self._sum -= self._window.popleft().tokens


@dataclass
class World:
    """`num_actors` senders that always have more to send. `rng` decides every delay; `reserve` and `use` the tokens."""

    server: StrictServer
    limiter: RateLimiter
    rng: random.Random
    num_actors: int = 4
    batch: int = 8
    reserve: Callable[[random.Random], int] = lambda rng: 1000
    use: Callable[[random.Random, int], int] = lambda rng, reserved: reserved
    latency_s: Callable[[random.Random], float] = lambda rng: rng.uniform(0.5, 10.0)
    jitter: float = 0.99  # of what the contract allows between a lease's start and its arrival
    late_share: float = 0.0  # of the leases, whose sender wakes too late
    bunch_s: float = math.inf  # how often all senders stall together, for as long as the contract allows
    crash_share: float = 0.0  # of the batches, whose sender dies with all that it holds
    says: str = "nothing"  # headers: "nothing", "admitted" or "answered" (as of when)
    now_s: float = 0.0
    unsettled: int = 0
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _count: int = 0

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (time_s, self._count, action))

    def run(self, until_s: float) -> None:
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, action = heapq.heappop(self._events)
            action()
        self.now_s = until_s

    def start(self) -> None:
        for _ in range(self.num_actors):
            self.at(self.now_s + self.rng.uniform(0, 0.1), self._ask)

    def _ask(self) -> None:
        wanted = [self.reserve(self.rng) for _ in range(self.rng.randint(1, self.batch))]
        grant = self.limiter.acquire(wanted, self.now_s)
        trip_s = self.rng.uniform(0, 0.1) * self.jitter * self.limiter.grace_s
        dies_s = self.now_s + self.rng.uniform(0, 10) if self.rng.random() < self.crash_share else math.inf
        for lease in grant.leases:
            self._plan(lease, trip_s, dies_s)
        self.at(self.now_s + trip_s + (grant.retry_in_s or 0.001), self._ask)

    def _plan(self, lease: Lease, trip_s: float, dies_s: float) -> None:
        grace_s = self.limiter.grace_s
        wakes_s = lease.start_s + trip_s
        wakes_s += self.rng.uniform(
            0, 3 * grace_s if self.rng.random() < self.late_share else 0.9 * self.jitter * grace_s
        )
        if wakes_s > dies_s:
            return
        if wakes_s > lease.start_s + grace_s:
            limiter = self.limiter
            self.at(wakes_s, lambda: limiter.give_back([lease.id], self.now_s))
        else:
            self.at(self._arrival_s(lease, wakes_s), lambda: self._arrive(lease, dies_s))

    def _arrival_s(self, lease: Lease, wakes_s: float) -> float:
        """By chance; or, where senders stall, at once, and all that is under way at the end of a stall together."""
        grace_s = self.limiter.grace_s
        if math.isinf(self.bunch_s):
            return wakes_s + self.rng.uniform(0, self.jitter * grace_s)
        stall_ends_s = math.ceil(lease.start_s / self.bunch_s) * self.bunch_s
        return stall_ends_s if stall_ends_s - lease.start_s < 2 * self.jitter * grace_s else lease.start_s

    def _arrive(self, lease: Lease, dies_s: float) -> None:
        entry = self.server.admit(self.now_s, lease.tokens)
        headers = self.server.headers(self.now_s) if self.says == "admitted" else LimitHeaders()
        if entry is None:
            refusal = Outcome("rate_limited", 0, headers)
            self.at(self.now_s + 0.01, lambda: self._settle(lease, refusal, dies_s))
        else:
            self.at(self.now_s + self.latency_s(self.rng), lambda: self._answer(lease, entry, headers, dies_s))

    def _answer(self, lease: Lease, entry: Admitted, headers: LimitHeaders, dies_s: float) -> None:
        used = self.use(self.rng, lease.tokens)
        self.server.answer(entry, used)
        if self.says == "answered":
            headers = self.server.headers(self.now_s)
        outcome = Outcome("ok", used, headers)
        self.at(self.now_s + self.rng.uniform(0.001, 0.1), lambda: self._settle(lease, outcome, dies_s))

    def _settle(self, lease: Lease, outcome: Outcome, dies_s: float) -> None:
        if self.now_s < dies_s:
            self.limiter.settle(lease.id, outcome, self.now_s)
        else:
            self.unsettled += 1
