"""ROUGE-L (Lin 2004) in rouge_score's own float arithmetic.

2 * LCS / (m + n) is the same number on paper, but falls on the other side of 0.7 for half of the exact ties.
"""

from collections.abc import Sequence

import numpy as np
from rapidfuzz.distance import LCSseq

from alpaca_ray.generate.tokens import Array


def rouge_l(a: Sequence[str], b: Sequence[str]) -> float:
    """ROUGE-L F-measure of two token lists; 0 if one is empty."""
    length = LCSseq.similarity(a, b)
    return float(f_measure(np.asarray(length), len(a), len(b))) if length else 0.0


def f_measure(lcs: Array, m: Array | int, n: Array | int) -> Array:
    """F-measures of texts of m and n tokens whose longest common subsequence has `lcs` > 0; symmetric in m and n."""
    precision, recall = lcs / n, lcs / m
    return 2 * precision * recall / (precision + recall)


class NeededLcs:
    """How long a common subsequence must be for the F-measure to exceed a threshold, as a table that grows on demand.

    Raises ValueError for a threshold outside 0 to 1.
    """

    def __init__(self, threshold: float) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"the novelty threshold is {threshold}, but ROUGE-L lies between 0 and 1")
        self.threshold = float(threshold)
        self._longest = 64
        self._rows: dict[int, Array] = {}

    def row(self, m: int, longest: int) -> Array:
        """Entry n: the smallest LCS of texts of m and n tokens that exceeds the threshold (int32).

        It rises with n. The row ends where it would pass m, or at `longest` or later; its first entries may pass n.
        """
        if longest > self._longest:
            self._longest = 2 * longest
            self._rows.clear()
        if m not in self._rows:
            self._rows[m] = self._compute(m)
        return self._rows[m]

    def _compute(self, m: int) -> Array:
        if m == 0:
            return np.zeros(0, np.int32)
        # F > t is about LCS > t (m + n) / 2, and LCS <= m; two more for the rounding.
        last = min(self._longest, int(m * (2 / max(self.threshold, 1e-9) - 1)) + 2)
        n = np.arange(1, last + 1)
        guess = np.floor(self.threshold * (m + n) / 2).astype(np.int64)
        options = np.maximum(guess + np.arange(-1, 3)[:, None], 1)  # the answer is among these four
        above = f_measure(options, m, n) > self.threshold
        needed = np.take_along_axis(options, above.argmax(0)[None], 0)[0]
        return np.concatenate(([1], needed[needed <= m])).astype(np.int32)
