"""The fault table: what each fault cost, as the tests of this folder have measured it.

make faults
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

FAULTS = (
    "generation actor", "generation node", "driver", "job stop", "limiter", "GCS restarted", "head killed",
    "train worker", "train node", "preemption notice", "serve replica", "serve node", "storage unreachable",
    "spill disk full", "out of memory",
)  # fmt: skip
# fault_row("driver", lost=..., repeated=..., recovery_s=..., until=...)
FaultRow = Callable[..., None]
HEAD = ("fault", "lost", "repeated", "time", "until", "held")


@dataclass(frozen=True)
class Row:
    """`repeated`: with its bound. `recovery_s`: from the fault, as a client or the run's next step saw it."""

    fault: str
    lost: str
    repeated: str
    recovery_s: float
    until: str
    held: bool = False

    def cells(self) -> tuple[str, ...]:
        """As the table has them."""
        time = f"{self.recovery_s:.1f} s"
        return (self.fault, self.lost, self.repeated, time, self.until, "yes" if self.held else "NO")


def ordered(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """The cells in the order of FAULTS; what was not run says so."""
    by_fault = {row.fault: row.cells() for row in rows}
    return [by_fault.get(fault, (fault, "", "", "", "", "not run")) for fault in FAULTS]


def as_text(rows: Iterable[Row]) -> list[str]:
    """Lines for a terminal."""
    lines = [HEAD, *ordered(rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    return [_join(line, widths, "  ") for line in lines]


def as_markdown(rows: Iterable[Row]) -> str:
    """For docs/operations.md."""
    lines = [HEAD, ("---",) * len(HEAD), *ordered(rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _join(cells: Sequence[str], widths: Sequence[int], between: str) -> str:
    return between.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
