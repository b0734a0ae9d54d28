"""ROUGE-L novelty (Wang et al. 2023, section 2.2): an instruction too like an earlier one is a duplicate.

Greedy: what was kept before decides, so the order of offers matters. Every decision and score is the one that a loop
over rouge_score comes to, to the last bit.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Protocol

import numpy as np

from alpaca_ray.generate.novelty_scan import ScanIndex
from alpaca_ray.generate.rouge import NeededLcs, rouge_l
from alpaca_ray.generate.tokens import Array, Documents, Vocabulary

__all__ = ["COMPILE_AT", "KEPT", "Novelty", "NoveltyFilter", "TextPool", "rouge_l"]

log = logging.getLogger("alpaca_ray")

# Texts in the pool from which compiled code is worth loading: that takes 1 s, and a first compilation 10 s or more.
COMPILE_AT = 10_000
_BLOCK = 4096  # texts that are tokenized at once


@dataclass(frozen=True, slots=True)
class Novelty:
    """The decision on one instruction.

    For a duplicate, its highest ROUGE-L with the pool and the first instruction there that has it. For one that is
    kept, None and "": it takes far longer to find out, and `similarity_report` does it for all at once.
    """

    kept: bool
    rouge_l: float | None
    nearest: str


KEPT = Novelty(True, None, "")


class NoveltyFilter:
    """Keeps instructions whose ROUGE-L F-measure to every seed and every kept one is at most `threshold`.

    A resumed run gives what it kept before to `add_many`. Raises ValueError for a threshold outside 0 to 1.
    """

    def __init__(
        self, seed_instructions: Iterable[str], threshold: float = 0.7, *, compile_at: int = COMPILE_AT
    ) -> None:
        self._pool = TextPool(threshold, compile_at)
        self.add_many(list(seed_instructions))

    def add_many(self, instructions: Sequence[str]) -> None:
        """Put instructions into the pool without a decision."""
        self._pool.add(instructions)

    def offer(self, instruction: str) -> Novelty:
        """Decide on one instruction; a kept one joins the pool. One without any token is always kept."""
        return self.offer_many([instruction])[0]

    def offer_many(self, instructions: Sequence[str]) -> list[Novelty]:
        """The same answers as `offer`, one by one, but much faster."""
        nearest, scores = self._pool.offer(instructions)
        return [
            KEPT if where < 0 else Novelty(False, score, self._pool.texts[where])
            for where, score in zip(nearest.tolist(), scores.tolist(), strict=True)
        ]


class Index(Protocol):
    """A pool of tokenized texts. Both kinds decide alike, so which one serves is a question of speed only."""

    def add(self, documents: Documents) -> None: ...

    def offer(self, documents: Documents, barred: Array) -> tuple[Array, Array]: ...


class TextPool:
    """A pool of texts, known by their places in `texts`: scanned while it is small, searched by compiled code later."""

    def __init__(self, threshold: float, compile_at: int = COMPILE_AT) -> None:
        self.texts: list[str] = []
        self._needed = NeededLcs(threshold)
        self._compile_at: int | None = compile_at
        self._vocabulary = Vocabulary()
        self._index: Index = ScanIndex(self._needed)

    def add(self, texts: Sequence[str]) -> None:
        """Put texts into the pool without a decision."""
        self._choose_index(len(texts))
        for first in range(0, len(texts), _BLOCK):
            block = texts[first : first + _BLOCK]
            self._index.add(self._vocabulary.encode(block))
            self.texts += block

    def offer(self, texts: Sequence[str], barred: Array | None = None) -> tuple[Array, Array]:
        """Decide on each text in turn: (place of its most similar duplicate or -1, their ROUGE-L or 0).

        The first of equally similar ones counts. A text without a duplicate joins the pool, unless it is barred (bool).
        """
        self._choose_index(len(texts))
        barred = np.zeros(len(texts), bool) if barred is None else barred
        nearest, scores = np.empty(len(texts), np.int64), np.empty(len(texts))
        for first in range(0, len(texts), _BLOCK):
            block = slice(first, min(first + _BLOCK, len(texts)))
            documents = self._vocabulary.encode(texts[block])
            nearest[block], scores[block] = self._index.offer(documents, barred[block])
            kept = (nearest[block] < 0) & ~barred[block]
            self.texts += compress(texts[block], kept)
        return nearest, scores

    def _choose_index(self, num_more: int) -> None:
        """Go over to compiled code for good once it pays."""
        if self._compile_at is None or len(self.texts) + num_more < self._compile_at:
            return
        self._compile_at = None
        try:
            from alpaca_ray.generate.novelty_postings import PostingsIndex  # numba: 0.5 s, and not on every machine
        except (ImportError, OSError) as error:
            log.warning("numba cannot be loaded (%s): finding duplicates takes longer, with the same result", error)
            return
        self._index = PostingsIndex(self._needed)
        pool, self.texts = self.texts, []
        self.add(pool)
