"""Requests and tokens per minute over a whole cluster, as scheduled slots. Pure: the clock is an argument.

One RateLimiter serves all senders. A sender asks for leases, sleeps until each one's start, and sends; it gives the
lease back where it would send more than `grace_s` too late. So a request reaches the server in [start, start + margin),
where margin = window_s / 60 is for grace and network together, and these hold at the server:

- At most R requests in any window: starts are (window + margin) / R apart, and idle time is not saved up.
- At most ceil(R / 30) requests in any 60th of a window (a second), twice the mean rate, for the same reason.
- Where T binds, too, at most twice the mean rate in any second, if requests arrive within 0.9 x margin: no more start
  in a second + 0.9 x margin. The mean is an estimate: what T allows for requests like those of the last two windows,
  less 2.5 %. Below ten requests a second it can be one more, as even starts would come to.
- At most T tokens in any window: each start is checked against the sum over the last window + margin, in which a
  request counts as reserved (prompt + max_tokens) until it is settled and as used after that.
- A limiter that replaces a dead one does not know what that one let through, so it waits `cool_down_s` first. If
  requests are the only limit, starts of both then lie a slot apart, as from one limiter. Nothing spreads tokens evenly
  over the past window: with a token limit, or limits yet unknown, a whole window must pass.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Literal

from alpaca_ray.config import UserError
from alpaca_ray.provider.backoff import AdaptiveRate, Breaker, BreakerState
from alpaca_ray.provider.limit_headers import LimitHeaders as LimitHeaders  # noqa: PLC0414 - a part of Outcome
from alpaca_ray.provider.limit_headers import parse_limit_headers as parse_limit_headers  # noqa: PLC0414
from alpaca_ray.provider.window import Charge, Footprint, Limits, Pace, Window

Status = Literal["ok", "rate_limited", "server_failure", "other"]

MIN_SEEN = 10  # requests in a window: the refusal of fewer says nothing about a rate
SHORTEST_LOOKAHEAD_S = 0.1  # a sender asks that often
TOKEN_PACE = 0.975  # of the mean rate that tokens seem to allow: an estimate, and twice the true mean is promised
CATCH_UP = 1.2  # times that pace from one start to the next, where slots were lost
NO_HEADERS = LimitHeaders()


@dataclass(frozen=True)
class Lease:
    """The right to send one request at `start_s`; `tokens` are reserved for it."""

    id: str
    start_s: float
    tokens: int


@dataclass(frozen=True)
class Grant:
    """Leases for the first of the requests asked for. Ask for the others in `retry_in_s`; 0 if there are none."""

    leases: tuple[Lease, ...]
    retry_in_s: float


@dataclass(frozen=True)
class Outcome:
    """What became of a request. `tokens`: used, prompt and completion; None: unknown, the reservation stands.

    "server_failure": 5xx, time-out, no connection, broken body. "other": an answer, but no success.
    """

    status: Status
    tokens: int | None = None
    headers: LimitHeaders = NO_HEADERS


@dataclass(frozen=True)
class LimiterState:
    """For progress views. Limits are those in force, less what others use of them; None: no limit."""

    requests_in_window: int
    tokens_in_window: int
    requests_limit: float | None
    tokens_limit: float | None
    in_flight: int
    paused_until_s: float
    breaker: BreakerState


def cool_down_s(
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    window_s: float = 60.0,
    lookahead_s: float | None = None,
) -> float:
    """How long after its birth a limiter that replaces a dead one must wait, given the configured limits."""
    span_s = window_s + window_s / 60
    ahead_s = window_s / 30 if lookahead_s is None else lookahead_s
    if requests_per_minute is None or tokens_per_minute is not None:
        return ahead_s + span_s
    return ahead_s + span_s / requests_per_minute


class RateLimiter:
    """Leases under both limits, both per `window_s`. All times are seconds on one clock of the caller.

    None: the limit that the server's headers name. Where they name none, the rate is found by trying: the first request
    goes alone, then all go, and a 429 sets the rate. `epoch` is part of the lease ids: each limiter of a run gets its
    own, so that what a dead one leased is not taken for this one's.
    """

    def __init__(  # noqa: PLR0913 - each is set by the pool or by a test
        self,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        *,
        window_s: float = 60.0,
        lookahead_s: float | None = None,  # how far ahead a lease may start; None: window_s / 30
        lease_timeout_s: float = 600.0,  # not settled this long after its start: its sender is dead, it counts as used
        cool_down_until_s: float = -math.inf,
        epoch: str = "0",
    ) -> None:
        self.grace_s = window_s / 120
        self._window_s = window_s
        self._lookahead_s = window_s / 30 if lookahead_s is None else lookahead_s
        self._lease_timeout_s, self._epoch = lease_timeout_s, epoch
        self._limits = Limits(requests_per_minute, tokens_per_minute, window_s)
        self._window = Window(window_s + window_s / 60)
        self._footprint = Footprint(self._window.span_s)
        self._pace = Pace(window_s / 60, 0.9 * window_s / 60)  # those of the margin before a second can come in it
        self._in_flight: OrderedDict[str, Charge] = OrderedDict()  # in the order of the grants
        self._free: list[Charge] = []  # heap of slots given back
        self._num_leases = 0
        self._last_start_s = -math.inf
        self._paused_until_s = cool_down_until_s
        self._adaptive = AdaptiveRate()
        self._breaker = Breaker()
        self._probe: str | None = None  # the lease that goes alone
        self._heard = requests_per_minute is not None or tokens_per_minute is not None

    def acquire(self, tokens: Sequence[int], now_s: float) -> Grant:
        """Leases for as many of the requests, in order, as have a slot in the lookahead. Each reserves its `tokens`.

        Raises UserError for a request that could never be sent.
        """
        self._expire(now_s)
        self._window.drop_until(now_s)
        self._refuse_impossible(tokens)
        alone = not self._heard or self._breaker.open_until_s is not None
        if alone and self._probe is not None:
            return Grant((), self._lookahead_s / 2)
        ahead_s = self._ahead_s()
        leases: list[Lease] = []
        wait_s = 0.0
        for wanted in tokens[:1] if alone else tokens:
            charge = self._slot(wanted, now_s)
            wait_s = charge.start_s - now_s
            if wait_s > ahead_s:
                break
            leases.append(self._lease(charge, wanted))
        if alone and leases:
            self._probe = leases[0].id
        # Back when half of that time is free: for a batch, not for each slot by itself. At the latest after all of it,
        # for a settlement may have made room.
        retry_in_s = min(max(wait_s - ahead_s / 2, ahead_s / 20), ahead_s)
        return Grant(tuple(leases), retry_in_s if len(leases) < len(tokens) else 0.0)

    def give_back(self, lease_ids: Iterable[str], now_s: float) -> None:
        """These were never sent: they count for nothing.

        Slots that are still ahead can be had again; with a token limit, the next starts take the room of all.
        """
        for lease_id in lease_ids:
            charge = self._end(lease_id)
            if charge is not None:
                self._window.correct(charge, 0, 0)
                if math.isfinite(self._limits.tokens.in_force()):
                    self._pace.give_back(charge)
                elif charge.start_s > now_s:
                    heappush(self._free, charge)

    def settle(self, lease_id: str, outcome: Outcome, now_s: float) -> None:
        """The answer is there, or will not come. Of a lease that is not known only a pause counts."""
        probed = lease_id == self._probe
        charge = self._end(lease_id)
        self._obey(outcome, None if charge is None else charge.start_s, now_s)
        self._heard |= outcome.status in ("ok", "rate_limited")
        if charge is None:
            return
        self._limits.hear(outcome.headers, charge, self._window, now_s)
        self._breaker.judge(outcome.status == "server_failure", probed, now_s)
        if outcome.tokens is not None:
            self._window.correct(charge, charge.requests, outcome.tokens)
        if outcome.status == "ok":
            self._adaptive.speed_up(charge.start_s, self._limits.requests.in_force())
            used = charge.reserved if outcome.tokens is None else outcome.tokens
            self._footprint.learn(charge.reserved, used, now_s - charge.start_s, self._window.requests)

    def snapshot(self, now_s: float) -> LimiterState:
        """Goes through the whole window: for a view now and then, not for each request."""
        requests, tokens = self._window.between(now_s - self._window_s, now_s)
        most_requests, most_tokens = self._left(now_s)
        return LimiterState(
            requests_in_window=requests,
            tokens_in_window=tokens,
            requests_limit=None if math.isinf(most_requests) else most_requests,
            tokens_limit=None if math.isinf(most_tokens) else most_tokens,
            in_flight=len(self._in_flight),
            paused_until_s=self._paused_until_s,
            breaker=self._breaker.state(now_s),
        )

    def _ahead_s(self) -> float:
        if math.isinf(self._limits.tokens.in_force()):
            return self._lookahead_s
        # Room that a settlement makes is only for starts not yet given: with tokens, give them late.
        return min(max(self._lookahead_s / 8, SHORTEST_LOOKAHEAD_S), self._lookahead_s)

    def _left(self, now_s: float) -> tuple[float, float]:
        return min(self._limits.requests.left(now_s), self._adaptive.rate), self._limits.tokens.left(now_s)

    def _refuse_impossible(self, tokens: Sequence[int]) -> None:
        most, limit = max(tokens, default=0), self._limits.tokens.in_force()
        if most > limit:
            raise UserError(
                f"a request reserves {most} tokens, its prompt and max_tokens, and {limit:.0f} per minute are allowed: "
                "lower generate.teacher.max_tokens, or raise the limit (generate.limits.tokens_per_minute)"
            )

    def _slot(self, wanted: int, now_s: float) -> Charge:
        """The next slot that fits: one given back, or a new one behind all others. It is not yet on the books."""
        most_requests, most_tokens = self._left(now_s)
        from_s = max(now_s, self._paused_until_s, self._breaker.from_s())
        while self._free and self._free[0].start_s < from_s:
            heappop(self._free)
        if self._free and wanted <= self._free[0].reserved and self._window.holds(wanted, most_requests, most_tokens):
            return self._free[0]
        token_gap_s = self._footprint.expected(wanted) / most_tokens / TOKEN_PACE
        gap_s = max(self._window.span_s / most_requests, token_gap_s / CATCH_UP)
        from_s = max(from_s, self._last_start_s + gap_s, self._pace.from_s(token_gap_s))
        last_s = now_s + self._ahead_s()
        return Charge(self._window.earliest(from_s, last_s, wanted, most_requests, most_tokens), wanted)

    def _lease(self, charge: Charge, wanted: int) -> Lease:
        if self._free and charge is self._free[0]:
            heappop(self._free)
            self._window.correct(charge, 1, wanted)
            charge.reserved = wanted
        else:
            self._window.add(charge)
            self._pace.add(charge)
            self._last_start_s = charge.start_s
        self._num_leases += 1
        lease = Lease(f"{self._epoch}-{self._num_leases}", charge.start_s, wanted)
        self._in_flight[lease.id] = charge
        return lease

    def _end(self, lease_id: str) -> Charge | None:
        if lease_id == self._probe:
            self._probe = None
        return self._in_flight.pop(lease_id, None)

    def _expire(self, now_s: float) -> None:
        while self._in_flight:
            lease_id, charge = next(iter(self._in_flight.items()))
            if charge.start_s + self._lease_timeout_s > now_s:
                return
            self._end(lease_id)

    def _obey(self, outcome: Outcome, start_s: float | None, now_s: float) -> None:
        """Pause for what the server refused. `start_s` None: a dead limiter's lease, and its rate not ours to cut."""
        pause_s = 0.0
        if outcome.status == "rate_limited" and start_s is not None:
            limit = self._limits.requests.in_force()
            rate = limit
            if math.isinf(limit) and self._window.requests >= MIN_SEEN:
                rate = self._window.rate(now_s)
            pause_s = self._adaptive.slow_down(rate, start_s, self._last_start_s)
        if outcome.headers.retry_after_s is not None and outcome.status in ("rate_limited", "server_failure"):
            pause_s = outcome.headers.retry_after_s
        if pause_s > 0:
            self._paused_until_s = max(self._paused_until_s, now_s + pause_s)
