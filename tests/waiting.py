"""Waiting for what another process or thread does: with a deadline, and never for a time in the hope of order."""

import time
from collections.abc import Callable

DEADLINE_S = 600.0  # of work of half a minute: other clusters may have the cores
POLL_S = 0.05


def wait(holds: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Until something is so. Raises AssertionError where it never is: a hang is a failure."""
    until_s = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < until_s, f"not seen in {deadline_s:.0f} s: {what}"
        time.sleep(POLL_S)
