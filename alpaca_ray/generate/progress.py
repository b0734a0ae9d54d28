"""How a run stands: a live table in a terminal, a line every few seconds in a log."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

LINE_EVERY_S = 10.0
LIVE_EVERY_S = 1.0

log = logging.getLogger("alpaca_ray")


@dataclass(frozen=True)
class Figures:
    """One moment of a run. Limits and budget None: none is set."""

    kept: int
    wanted: int
    reasons: Mapping[str, int]
    asked: int  # requests of this round
    answered: int
    failed: int
    requests_per_minute: int
    tokens_per_minute: int
    requests_limit: float | None
    tokens_limit: float | None
    usd: float
    max_usd: float | None
    waits: str | None  # why nothing goes out just now


class Progress:
    """Shows `figures()` until the block is left. The time left is judged by what was kept since it was entered."""

    def __init__(
        self,
        figures: Callable[[], Figures],
        console: Console,
        clock: Callable[[], float] = time.monotonic,
        every_s: float | None = None,
    ) -> None:
        self._figures, self._console, self._clock = figures, console, clock
        self._every_s = every_s or (LIVE_EVERY_S if console.is_terminal else LINE_EVERY_S)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True)
        self._started_s, self._kept_before = clock(), 0

    def __enter__(self) -> "Progress":
        self._started_s, self._kept_before = self._clock(), self._figures().kept
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def left_s(self, figures: Figures) -> float | None:
        """Seconds until the dataset is full at the rate so far; None while nothing has been kept."""
        kept = figures.kept - self._kept_before
        if kept <= 0:
            return None
        return (figures.wanted - figures.kept) * (self._clock() - self._started_s) / kept

    def _show(self) -> None:
        if not self._console.is_terminal:
            while not self._ended.wait(self._every_s):
                figures = self._figures()
                log.info("%s", line(figures, self.left_s(figures)))
            return
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            while not self._ended.wait(self._every_s):
                figures = self._figures()
                live.update(table(figures, self.left_s(figures)), refresh=True)


def line(figures: Figures, left_s: float | None) -> str:
    """Everything that matters, in one line of a log."""
    parts = [
        f"kept {figures.kept} of {figures.wanted}",
        f"{figures.answered} of {figures.asked} requests answered, {figures.failed} failed",
        f"{_of(figures.requests_per_minute, figures.requests_limit)} requests/min",
        f"{_of(figures.tokens_per_minute, figures.tokens_limit)} tokens/min",
        f"${_of(round(figures.usd, 4), figures.max_usd)}",
        f"{_duration(left_s)} left",
    ]
    return "; ".join(parts + ([figures.waits] if figures.waits else []))


def table(figures: Figures, left_s: float | None) -> Table:
    """The same for a terminal, rejects by reason included."""
    view = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    reasons = ", ".join(f"{reason} {count}" for reason, count in list(figures.reasons.items())[:8])
    view.add_row("kept", f"[bold green]{figures.kept}[/] of {figures.wanted}, {_duration(left_s)} left")
    view.add_row("rejected", f"{sum(figures.reasons.values())}  [dim]{reasons}[/]")
    view.add_row("requests", f"{figures.answered} of {figures.asked} answered, {figures.failed} failed")
    view.add_row("a minute", f"{_of(figures.requests_per_minute, figures.requests_limit)} requests")
    view.add_row("", f"{_of(figures.tokens_per_minute, figures.tokens_limit)} tokens")
    view.add_row("dollars", _of(round(figures.usd, 4), figures.max_usd))
    if figures.waits:
        view.add_row("waits", f"[yellow]{figures.waits}[/]")
    return view


def _of(value: float, limit: float | None) -> str:
    return f"{value:,}" if limit is None else f"{value:,} of {limit:,.4g}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
