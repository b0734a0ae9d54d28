"""A circuit breaker, pure: the clock is an argument.

Closed, calls pass. After `failures_to_open` failures in a row it opens: no call passes, so that nobody waits for a
backend that is down. After `cooldown_s` it is half open: one call passes as a probe, and its end closes or reopens it.
"""

from dataclasses import dataclass
from typing import Literal

State = Literal["closed", "open", "half_open"]


@dataclass(frozen=True)
class Permit:
    """Leave for one call. Only a permit of the present `epoch` changes the state: an old call's end is old news."""

    epoch: int


@dataclass(frozen=True)
class BreakerStats:
    """Counts since the start. A call that was not let through is `num_refused`."""

    state: State
    num_succeeded: int
    num_failed: int
    num_refused: int
    num_opened: int


class Breaker:
    """Ask for a permit before each call; then say how the call ended, exactly once."""

    def __init__(self, failures_to_open: int = 5, cooldown_s: float = 10.0) -> None:
        if failures_to_open < 1 or cooldown_s < 0:
            raise ValueError("failures_to_open must be 1 at least, cooldown_s 0 at least")
        self._failures_to_open, self._cooldown_s = failures_to_open, cooldown_s
        self._state: State = "closed"
        self._opened_at_s = 0.0
        self._failures_in_row = 0
        self._epoch = 0
        self._num_succeeded = self._num_failed = self._num_refused = self._num_opened = 0

    def permit(self, now_s: float) -> Permit | None:
        """None: do not call."""
        if self._state == "open" and now_s - self._opened_at_s >= self._cooldown_s:
            self._enter("half_open")
            return Permit(self._epoch)
        if self._state == "closed":
            return Permit(self._epoch)
        self._num_refused += 1  # open, or the probe is out
        return None

    def succeeded(self, permit: Permit) -> None:
        """The call gave an answer."""
        self._num_succeeded += 1
        if permit.epoch == self._epoch:
            self._failures_in_row = 0
            if self._state == "half_open":
                self._enter("closed")

    def failed(self, permit: Permit, now_s: float) -> None:
        """The call gave none."""
        self._num_failed += 1
        if permit.epoch != self._epoch:
            return
        self._failures_in_row += 1
        if self._state == "half_open" or self._failures_in_row >= self._failures_to_open:
            self._open(now_s)

    def abandoned(self, permit: Permit) -> None:
        """Nobody waited for the call's end. A lost probe leaves its place to the next caller."""
        if permit.epoch == self._epoch and self._state == "half_open":
            self._enter("open")  # its cool-down is over already

    def stats(self) -> BreakerStats:
        """A copy."""
        return BreakerStats(self._state, self._num_succeeded, self._num_failed, self._num_refused, self._num_opened)

    def _open(self, now_s: float) -> None:
        self._num_opened += 1
        self._opened_at_s = now_s
        self._enter("open")

    def _enter(self, state: State) -> None:
        self._state = state
        self._epoch += 1
        self._failures_in_row = 0
