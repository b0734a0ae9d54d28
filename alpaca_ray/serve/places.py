"""A bounded queue before the engine: so many requests at once, so many in line, and the next one is turned away."""

import asyncio
import math
from collections import deque

MAX_RETRY_S = 60
LEARNING_RATE = 0.1  # of the mean time that a request holds its turn


class Places:
    """First come, first served. Belongs to one event loop."""

    def __init__(self, max_in_flight: int, max_waiting: int) -> None:
        self._max_in_flight, self._max_waiting = max_in_flight, max_waiting
        self._line: deque[asyncio.Future[None]] = deque()
        self._mean_s: float | None = None
        self.num_inside = 0  # with those whose body is still coming: each holds memory
        self.num_in_flight = 0

    @property
    def num_waiting(self) -> int:
        """For their turn."""
        return len(self._line)

    def enter(self) -> bool:
        """False where all places are taken. One `leave` for each True."""
        if self.num_inside >= self._max_in_flight + self._max_waiting:
            return False
        self.num_inside += 1
        return True

    def leave(self) -> None:
        """Another may enter."""
        self.num_inside -= 1

    def line_up(self) -> "asyncio.Future[None]":
        """A turn that is done when it has come; wait for it with asyncio.wait, which never cancels it.

        One `step_out` for each, come or not.
        """
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        self._call_up()
        return turn

    def step_out(self, turn: "asyncio.Future[None]", held_s: float | None = None) -> None:
        """`held_s`: how long the turn took, for `retry_after_s`."""
        if turn in self._line:
            self._line.remove(turn)
            turn.cancel()
            return
        self.num_in_flight -= 1
        self._call_up()
        if held_s is not None:
            mean_s = held_s if self._mean_s is None else self._mean_s
            self._mean_s = mean_s + LEARNING_RATE * (held_s - mean_s)

    def retry_after_s(self) -> int:
        """When those that are here now should be through, by the mean so far; at least a second."""
        rounds = (self.num_inside + 1) / self._max_in_flight
        return min(max(math.ceil((self._mean_s or 0.0) * rounds), 1), MAX_RETRY_S)

    def _call_up(self) -> None:
        while self._line and self.num_in_flight < self._max_in_flight:
            self.num_in_flight += 1
            self._line.popleft().set_result(None)
