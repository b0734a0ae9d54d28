"""Exact sliding windows: what one holds now, and the most that any one held.

A window of `window_s` seconds is half open: two events that lie exactly `window_s` apart are never in the same one.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Slot:
    """An amount that counts from `at_s` on for one window."""

    at_s: float
    amount: int
    live: bool = True


class SlidingWindow:
    """The sum of the amounts of the last `window_s` seconds. Times must not run backwards."""

    def __init__(self) -> None:
        self._slots: deque[Slot] = deque()
        self._total = 0

    def held(self, window_s: float, now_s: float) -> int:
        """What the window that ends now holds."""
        while self._slots and now_s - self._slots[0].at_s >= window_s:
            gone = self._slots.popleft()
            gone.live = False
            self._total -= gone.amount
        return self._total

    def add(self, amount: int, now_s: float) -> Slot:
        """Charge an amount from now on."""
        slot = Slot(now_s, amount)
        self._slots.append(slot)
        self._total += amount
        return slot

    def correct(self, slot: Slot, amount: int) -> None:
        """Replace a charge; it keeps its time."""
        if slot.live:
            self._total += amount - slot.amount
        slot.amount = amount

    def clear(self) -> None:
        """Hold nothing; charges made before have no effect any more."""
        while self._slots:
            self._slots.popleft().live = False
        self._total = 0

    def wait_s(self, amount: int, limit: int, window_s: float, now_s: float) -> float | None:
        """How long until `amount` fits under `limit` if nothing else comes; None: it never does."""
        if amount > limit:
            return None
        excess = self.held(window_s, now_s) + amount - limit
        if excess <= 0:
            return 0.0
        for slot in self._slots:
            excess -= slot.amount
            if excess <= 0:
                return slot.at_s + window_s - now_s
        raise AssertionError("an empty window holds whatever is within the limit")

    def empty_in_s(self, window_s: float, now_s: float) -> float:
        """How long until the window is empty if nothing else comes."""
        return max(0.0, self._slots[-1].at_s + window_s - now_s) if self._slots else 0.0


def most_in_any_window(times_s: Sequence[float], amounts: Sequence[int], window_s: float) -> int:
    """The highest sum of amounts in any window; `times_s` ascend."""
    most = held = oldest = 0
    for time_s, amount in zip(times_s, amounts, strict=True):
        held += amount
        while time_s - times_s[oldest] >= window_s:
            held -= amounts[oldest]
            oldest += 1
        most = max(most, held)
    return most
