"""What was charged against a sliding window: the books behind provider/limiter.py."""

import math
from collections import deque
from dataclasses import dataclass

from alpaca_ray.provider.limit_headers import LimitHeaders

MIN_MEAN = 50  # requests: the mean of fewer is noise


@dataclass(slots=True, order=True)
class Charge:
    """What a request takes of the window that begins with its start."""

    start_s: float
    reserved: int
    requests: int = 1
    tokens: int = 0
    seen_requests: int = 0  # the sums with it, when it was granted
    seen_tokens: int = 0
    logged: bool = False


class Window:
    """The charges of the last `span_s` before the newest start, in order, and their sums."""

    def __init__(self, span_s: float) -> None:
        self.span_s = span_s
        self.requests = self.tokens = 0
        self._charges: deque[Charge] = deque()

    def add(self, charge: Charge) -> None:
        """`charge.start_s` may not be before any other's."""
        self.drop_until(charge.start_s)
        self._charges.append(charge)
        charge.requests, charge.tokens, charge.logged = 1, charge.reserved, True
        self.requests, self.tokens = self.requests + 1, self.tokens + charge.reserved
        charge.seen_requests, charge.seen_tokens = self.requests, self.tokens

    def drop_until(self, time_s: float) -> None:
        while self._charges and self._charges[0].start_s + self.span_s <= time_s:
            charge = self._charges.popleft()
            self.correct(charge, 0, 0)
            charge.logged = False

    def correct(self, charge: Charge, requests: int, tokens: int) -> None:
        if charge.logged:
            self.requests += requests - charge.requests
            self.tokens += tokens - charge.tokens
            charge.requests, charge.tokens = requests, tokens

    def holds(self, tokens: int, most_requests: float, most_tokens: float) -> bool:
        """Whether one more request fits, all that is ahead included."""
        return self.requests + 1 <= most_requests and self.tokens + tokens <= most_tokens

    def earliest(self, from_s: float, last_s: float, tokens: int, most_requests: float, most_tokens: float) -> float:
        """When, from `from_s` on, enough charges have left for one more; any time after `last_s` if not by then."""
        requests, tokens = self.requests + 1, self.tokens + tokens
        for charge in self._charges:
            leaves_s = charge.start_s + self.span_s
            if leaves_s > from_s and ((requests <= most_requests and tokens <= most_tokens) or from_s > last_s):
                return from_s
            from_s = max(from_s, leaves_s)
            requests, tokens = requests - charge.requests, tokens - charge.tokens
        return from_s if tokens <= most_tokens else math.inf

    def rate(self, now_s: float) -> float:
        """Requests per span, as seen since the oldest."""
        since_s = now_s - self._charges[0].start_s if self._charges else self.span_s
        return self.requests * self.span_s / min(max(since_s, self.span_s / 60), self.span_s)

    def between(self, after_s: float, until_s: float) -> tuple[int, int]:
        """Requests and tokens that started in (after_s, until_s]; goes through them all."""
        inside = [charge for charge in self._charges if after_s < charge.start_s <= until_s]
        return sum(charge.requests for charge in inside), sum(charge.tokens for charge in inside)


class Limits:
    """Both limits of a window; infinite where there is none."""

    def __init__(self, requests: int | None, tokens: int | None, window_s: float) -> None:
        self.requests, self.tokens = Limit(requests, window_s), Limit(tokens, window_s)

    def hear(self, said: LimitHeaders, charge: Charge, window: Window, now_s: float) -> None:
        """`said`: with the answer to `charge`. The server may have counted when that came, or when it answered."""
        requests, tokens = charge.seen_requests, charge.seen_tokens
        more_requests = max(window.requests - requests, 0) + 1
        more_tokens = max(window.tokens - tokens, 0) + charge.reserved
        self.requests.hear(
            said.limit_requests, said.remaining_requests, said.reset_requests_s, (requests, more_requests), now_s
        )
        self.tokens.hear(said.limit_tokens, said.remaining_tokens, said.reset_tokens_s, (tokens, more_tokens), now_s)


class Limit:
    """One limit: as configured, as the server names it, and what others use of it under the same key."""

    def __init__(self, configured: int | None, window_s: float) -> None:
        self._configured = math.inf if configured is None else float(configured)
        self._named, self._others, self._others_until_s, self._window_s = math.inf, 0.0, -math.inf, window_s

    def in_force(self) -> float:
        return min(self._configured, self._named)

    def left(self, now_s: float) -> float:
        """In force, less what others use."""
        return max(self.in_force() - (self._others if now_s < self._others_until_s else 0.0), 1.0)

    def hear(
        self, limit: int | None, remaining: int | None, reset_s: float | None, ours: tuple[int, int], now_s: float
    ) -> None:
        """`ours`: how much the server should have counted of us, and how much more it may have."""
        if reset_s is not None and reset_s > self._window_s * 1.05:
            self._named, self._others = math.inf, 0.0  # a limit per day: it says nothing about the window
            return
        self._named = self._named if limit is None else float(limit)
        total = self._configured if math.isinf(self._named) else self._named
        if remaining is not None and math.isfinite(total):
            others = total - remaining - ours[0]
            # Ours may pass each other by the margin, a 60th of the window; twice that is no sign of others.
            self._others = others if others > ours[1] + total / 30 else 0.0
            self._others_until_s = now_s + (self._window_s if reset_s is None else min(reset_s, self._window_s))


class Pace:
    """Keeps the starts that can arrive in one second, all those of second_s + spread_s, to twice their mean rate.

    `spread_s`: how long after its start a request may arrive.
    """

    def __init__(self, second_s: float, spread_s: float) -> None:
        self._second_s, self._span_s = second_s, second_s + spread_s
        self._starts: deque[Charge] = deque()  # of the last span

    def add(self, charge: Charge) -> None:
        """`charge.start_s` may not be before any other's."""
        while self._starts and self._starts[0].start_s + self._span_s <= charge.start_s:
            self._starts.popleft()
        self._starts.append(charge)

    def give_back(self, charge: Charge) -> None:
        """It was never sent, so another may start instead."""
        if charge in self._starts:
            self._starts.remove(charge)

    def from_s(self, mean_gap_s: float) -> float:
        """When the next may start; `mean_gap_s`: from one start to the next, on average."""
        if mean_gap_s <= 0.0:
            return -math.inf
        # Below ten a second, starts that are even put up to one more than twice the mean into a span.
        most = max(math.floor(2 * self._second_s / mean_gap_s), math.ceil(self._span_s / mean_gap_s))
        return self._starts[-most].start_s + self._span_s if most <= len(self._starts) else -math.inf


class Footprint:
    """The token seconds that a request takes of T x span: reserved while in flight, used after that. A mean."""

    def __init__(self, span_s: float) -> None:
        self._span_s = span_s
        self._mean: float | None = None
        self._num_seen = 0

    def expected(self, reserved: int) -> float:
        return reserved * self._span_s if self._mean is None else self._mean

    def learn(self, reserved: int, used: int, flight_s: float, num_in_window: int) -> None:
        """Weighs all alike, until there are two windows of them; from then on an EWMA over as many."""
        flight_s = min(max(flight_s, 0.0), self._span_s)
        seen = reserved * flight_s + used * (self._span_s - flight_s)
        self._num_seen += 1
        weight = 1 / min(self._num_seen, max(2 * num_in_window, MIN_MEAN))
        self._mean = seen if self._mean is None else self._mean + weight * (seen - self._mean)
