"""What a log line and the live view say, and that they are said while a run works."""

import io
import logging
import threading
from dataclasses import replace

import pytest
from rich.console import Console

from alpaca_ray.generate.progress import Figures, Progress, line, table

FIGURES = Figures(
    kept=10, wanted=40, reasons={"duplicate": 5, "too_short": 1}, asked=20, answered=8, failed=1,
    requests_per_minute=54, tokens_per_minute=12000, requests_limit=60.0, tokens_limit=None, usd=0.0421, max_usd=1.0,
    waits=None,
)  # fmt: skip


def test_a_line_has_all_that_matters() -> None:
    said = line(FIGURES, left_s=3725)
    for part in ("kept 10 of 40", "8 of 20 requests answered, 1 failed", "54 of 60 requests/min", "12,000 tokens/min",
                 "$0.0421 of 1", "1 h 2 min left"):  # fmt: skip
        assert part in said
    assert "outage" in line(replace(FIGURES, waits="outage"), None)


def test_the_live_view_names_the_reasons() -> None:
    console = Console(file=io.StringIO(), width=100)
    with console.capture() as captured:
        console.print(table(FIGURES, left_s=None))
    assert "duplicate 5, too_short 1" in captured.get()
    assert "unknown time" in captured.get()


def test_the_time_left_follows_from_what_was_kept_since_the_start() -> None:
    now_s = [100.0]
    kept = [10]
    view = Progress(lambda: replace(FIGURES, kept=kept[0]), Console(file=io.StringIO()), lambda: now_s[0])
    with view:
        assert view.left_s(replace(FIGURES, kept=10)) is None
        now_s[0] = 160.0
        assert view.left_s(replace(FIGURES, kept=20)) == 120.0  # ten a minute, twenty to go


@pytest.mark.parametrize("terminal", [False, True])
def test_it_is_shown_while_the_work_goes_on(terminal: bool, caplog: pytest.LogCaptureFixture) -> None:
    asked = threading.Semaphore(0)

    def figures() -> Figures:
        asked.release()
        return FIGURES

    output = io.StringIO()
    with (
        caplog.at_level(logging.INFO, "alpaca_ray"),
        Progress(figures, Console(file=output, force_terminal=terminal, width=100), every_s=0.01),
    ):
        for _ in range(3):  # once at the start, then by the view itself
            assert asked.acquire(timeout=30)
    assert "tokens" in (output.getvalue() if terminal else caplog.text)
