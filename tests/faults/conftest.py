"""`fault_row`: what a test of this folder has measured goes into one table, printed when all have run."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.faults.table import FAULTS, FaultRow, Row, as_markdown, as_text

PROPERTY = "fault_row"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Seen by pytest when this folder is named on its command line, as `make faults` does."""
    parser.addoption("--fault-table", type=Path, help="a file for the fault table, as Markdown")


@pytest.fixture
def fault_row(record_property: Callable[[str, object], None]) -> FaultRow:
    """`fault_row("driver", lost=..., repeated=..., recovery_s=..., until=...)`, before the test judges them."""

    def record(fault: str, *, lost: str, repeated: str, recovery_s: float, until: str) -> None:
        assert fault in FAULTS
        # With several processes it travels in the test's report.
        record_property(PROPERTY, asdict(Row(fault, lost, repeated, recovery_s, until)))

    return record


def _rows(reporter: pytest.TerminalReporter) -> Iterator[Row]:
    for outcome, reports in reporter.stats.items():
        for report in reports:
            if isinstance(report, pytest.TestReport) and report.when == "call":
                for name, value in report.user_properties:
                    if name == PROPERTY and isinstance(value, dict):
                        yield replace(Row(**value), held=outcome == "passed")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table, if anything was measured."""
    rows = list(_rows(terminalreporter))
    if not rows:
        return
    terminalreporter.section("faults")
    for line in as_text(rows):
        terminalreporter.write_line(line)
    path: Path | None = terminalreporter.config.getoption("--fault-table", None)
    if path is not None:
        path.write_text(as_markdown(rows))
