"""Encoded examples as the loop reads them: an Arrow table that the processes of a node share, a row at a time."""

import time
from collections.abc import Sequence
from typing import overload

import pyarrow as pa

from alpaca_ray.train.encoding import Encoded


class Examples(Sequence[Encoded]):
    """A table of ENCODED_SCHEMA. Python's lists of numbers take ten times its bytes, so a row is one when asked for."""

    def __init__(self, table: pa.Table) -> None:
        self._columns = [table.column(name) for name in ("id", "input_ids", "labels")]
        self._lengths = [int(n) for n in pa.compute.list_value_length(table.column("input_ids")).to_pylist()]
        self.read_s = 0.0  # spent in reading rows so far

    def __len__(self) -> int:
        return len(self._lengths)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        started_s = time.perf_counter()
        row = Encoded(*(column[index].as_py() for column in self._columns))
        self.read_s += time.perf_counter() - started_s
        return row

    @property
    def mean_length(self) -> float:
        """Length in tokens of the example that a random token stands in."""
        return sum(n * n for n in self._lengths) / sum(self._lengths)
