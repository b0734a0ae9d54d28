"""How refusals and outages slow the limiter down: a rate found by trying, and a circuit breaker."""

import math
from typing import Literal

BreakerState = Literal["closed", "open", "half_open"]

DECREASE, INCREASE = 0.75, 0.1  # of the rate: at once, and per window of successes (AIMD: Chiu & Jain 1989)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # doubled on each 429 that names no time, and on each failed probe
FAILURES_TO_OPEN = 10


class AdaptiveRate:
    """A rate found by trying: cut when refused, a little more with each success. Infinite until the first refusal."""

    def __init__(self) -> None:
        self.rate = math.inf
        self._step, self._cut_through_s, self._pause_s = 1.0, -math.inf, FIRST_PAUSE_S

    def speed_up(self, start_s: float, limit: float) -> None:
        """For a success that started at `start_s`; up to `limit` there is anything to find."""
        if start_s > self._cut_through_s:
            self._pause_s = FIRST_PAUSE_S
            self.rate += self._step / self.rate
            self.rate = math.inf if self.rate >= limit else self.rate

    def slow_down(self, rate: float, start_s: float, last_start_s: float) -> float:
        """Returns the pause. Whatever started up to `last_start_s` was on its way already: its refusals cut once.

        `rate`: the one that was refused, where none was set yet; infinite: unknown, then there is only the pause.
        """
        if start_s <= self._cut_through_s:
            return 0.0
        rate = min(self.rate, rate)
        if math.isfinite(rate):
            self.rate, self._step = max(DECREASE * rate, 1.0), max(INCREASE * rate, 1.0)
        self._cut_through_s = last_start_s
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, LONGEST_PAUSE_S)
        return pause_s


class Breaker:
    """Closed; after failures in a row open, nothing goes; then half open: one goes, and its outcome decides."""

    def __init__(self) -> None:
        self.open_until_s: float | None = None
        self._failures, self._pause_s = 0, FIRST_PAUSE_S

    def judge(self, failed: bool, probed: bool, now_s: float) -> None:
        if self.open_until_s is not None and not probed:
            return  # sent before it opened
        self._failures = self._failures + 1 if failed else 0
        if not failed:
            self.open_until_s, self._pause_s = None, FIRST_PAUSE_S
        elif self._failures >= FAILURES_TO_OPEN:
            self.open_until_s = now_s + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def from_s(self) -> float:
        return -math.inf if self.open_until_s is None else self.open_until_s

    def state(self, now_s: float) -> BreakerState:
        if self.open_until_s is None:
            return "closed"
        return "open" if now_s < self.open_until_s else "half_open"
