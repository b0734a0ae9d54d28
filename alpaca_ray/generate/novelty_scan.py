"""The duplicates of a text in a small pool, or in one of any size where there is no numba: numpy and rapidfuzz.

Texts lie in buckets of equal length, each with 64 bits that say which groups of words it has. A bit that only one of
two texts has is a token outside of their common subsequence; the few pairs that this leaves go to rapidfuzz.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cpdist

from alpaca_ray.generate.rouge import NeededLcs, f_measure
from alpaca_ray.generate.tokens import Array, CodePoints, Documents, as_code_points, grown

_BLOCK = 4096  # texts that are compared at once
_OWN_BITS = 16  # of 64, for the first words, which are common ones; the others share the rest
_CELLS = 1 << 17  # of a comparison of bits: 1 MiB, which a cache holds


class Bucket(NamedTuple):
    """All texts of one length."""

    bits: Array  # uint64
    text: Array  # int64, index of the text
    size: int

    def extended(self, bits: Array, text: Array) -> "Bucket":
        size = self.size + len(bits)
        longer = Bucket(grown(self.bits, size), grown(self.text, size), size)
        longer.bits[self.size : size], longer.text[self.size : size] = bits, text
        return longer


class Hits(NamedTuple):
    """Pairs above the threshold: row of a block, index of the other text, their ROUGE-L."""

    row: Array  # int64
    other: Array  # int64, in the pool; from the pool's size on: in the block
    score: Array  # float64

    def where(self, chosen: Array) -> "Hits":
        return Hits(self.row[chosen], self.other[chosen], self.score[chosen])


Buckets = dict[int, Bucket]  # by length in tokens


class ScanIndex:
    """A pool of texts. `PostingsIndex` gives the same answers."""

    def __init__(self, needed: NeededLcs) -> None:
        self._needed = needed
        self._buckets: Buckets = {}
        self._texts: list[CodePoints] = []
        self._longest = 0

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, documents: Documents) -> None:
        """Put texts into the pool without a decision."""
        _extend(self._buckets, documents.lengths, _bits(documents), len(self))
        self._texts += as_code_points(documents)
        self._longest = max(self._longest, int(documents.lengths.max(initial=0)))

    def offer(self, documents: Documents, barred: Array) -> tuple[Array, Array]:
        """Decide on each text in turn: (index in the pool of its most similar duplicate or -1, their ROUGE-L or 0).

        A text without a duplicate joins the pool, unless it is barred (bool).
        """
        nearest, scores = np.empty(len(barred), np.int64), np.empty(len(barred))
        for first in range(0, len(barred), _BLOCK):
            block = slice(first, min(first + _BLOCK, len(barred)))
            documents_here = documents.part(block.start, block.stop)
            kept, nearest[block], scores[block] = _resolve(self._hits(documents_here), len(self), barred[block])
            self.add(documents_here.where(kept))
        return nearest, scores

    def _hits(self, block: Documents) -> Hits:
        """All pairs above the threshold of a text in the block, and one in the pool or earlier in the block."""
        size, texts, bits = len(self), as_code_points(block), _bits(block)
        new: Buckets = {}
        _extend(new, block.lengths, bits, size)
        pairs = [np.zeros((2, 0), np.int64), *self._close(block.lengths, bits, [self._buckets, new])]
        row, other = np.concatenate(pairs, axis=1)
        earlier = other < size + row
        row, other = row[earlier], other[earlier]
        others = [self._texts[k] if k < size else texts[k - size] for k in other.tolist()]
        lcs = cpdist([texts[k] for k in row.tolist()], others, scorer=LCSseq.similarity, dtype=np.int32)
        lengths = np.fromiter(map(len, others), np.int64, len(others))
        score = f_measure(np.maximum(lcs, 1), block.lengths[row], lengths)
        return Hits(row, other, score).where((lcs > 0) & (score > self._needed.threshold))

    def _close(self, lengths: Array, bits: Array, pools: list[Buckets]) -> Iterator[Array]:
        """Pairs (2, P) that the bits do not rule out: row of the block, index of the other text."""
        longest = max(self._longest, int(lengths.max(initial=0)))
        for m in np.unique(lengths).tolist():
            rows = np.flatnonzero(lengths == m)
            for n, need in enumerate(self._needed.row(m, longest).tolist()):
                for bucket in (pool[n] for pool in pools if need <= n and n in pool):
                    for row, other in _sharing(bits[rows], bucket, m - need, n - need):
                        yield np.stack((rows[row], other))


def _sharing(bits: Array, bucket: Bucket, spare: int, other_spare: int) -> Iterator[tuple[Array, Array]]:
    """Index into `bits` and text of the bucket, where neither has more bits of its own than it has tokens to spare."""
    least = np.maximum(np.bitwise_count(bits).astype(np.int16) - spare, 0).astype(np.uint8)[:, None]
    width = max(_CELLS // len(bits), 1)
    for first in range(0, bucket.size, width):
        others = bucket.bits[first : min(first + width, bucket.size)]
        other_least = np.maximum(np.bitwise_count(others).astype(np.int16) - other_spare, 0).astype(np.uint8)
        shared = np.bitwise_count(bits[:, None] & others)
        close = ((shared >= least) & (shared >= other_least)).ravel().nonzero()[0]
        if len(close):
            row, other = np.divmod(close, len(others))
            yield row, bucket.text[first + other]


def _resolve(hits: Hits, size: int, barred: Array) -> tuple[Array, Array, Array]:
    """In the order of the block: which texts are kept; index in the pool of the best hit or -1; its score or 0."""
    in_block = hits.other >= size
    kept = ~barred
    kept[hits.row[~in_block]] = False
    row, other = hits.row[in_block], hits.other[in_block] - size
    for later, earlier in sorted(zip(row.tolist(), other.tolist(), strict=True)):
        if kept[earlier]:
            kept[later] = False
    place = np.concatenate((np.arange(size), size + np.cumsum(kept) - 1))  # in the pool, of what is or gets there
    stays = ~in_block
    stays[in_block] = kept[other]
    hits = hits.where(stays)
    nearest, scores = np.full(len(kept), -1), np.zeros(len(kept))
    worst_first = np.lexsort((-place[hits.other], hits.score, hits.row))
    nearest[hits.row[worst_first]] = place[hits.other[worst_first]]  # of equal indices, the last one is stored
    scores[hits.row[worst_first]] = hits.score[worst_first]
    return kept, nearest, scores


def _extend(buckets: Buckets, lengths: Array, bits: Array, first: int) -> None:
    """Put texts, numbered from `first` on, into their buckets."""
    for n in np.unique(lengths).tolist():
        here = np.flatnonzero(lengths == n)
        empty = Bucket(np.zeros(0, np.uint64), np.zeros(0, np.int64), 0)
        buckets[n] = buckets.get(n, empty).extended(bits[here], first + here)


def _bits(documents: Documents) -> Array:
    """The bits of each text's words."""
    ids, starts = documents
    bit = np.uint64(1) << np.where(ids < _OWN_BITS, ids, _OWN_BITS + ids % (64 - _OWN_BITS)).astype(np.uint64)
    bits = np.zeros(len(starts) - 1, np.uint64)
    has_words = np.diff(starts) > 0
    if len(ids):
        bits[has_words] = np.bitwise_or.reduceat(bit, starts[:-1][has_words])
    return bits
