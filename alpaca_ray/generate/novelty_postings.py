"""The duplicates of a text in a large pool, by exact prefix filtering (Bayardo et al. 2007, Xiao et al. 2008).

A text is a set of elements (word, k-th occurrence), rarest first. Two texts whose longest common subsequence reaches
`need` tokens share at least `need` elements. If the first that they share stands at position p of m and at q of n, then
need <= m - p and need <= n - q: so a text is filed only under its first, rare elements, by length and position, and
little of a posting list has to be read. A posting also holds 64 bits, one for each group of elements from q on, which
rule out most of the rest before any token is looked at. What remains goes through the bit-parallel LCS (Hyyro 2004).

Postings lie sorted by (element, n, q). Those of the latest texts hang in one list per element until there are enough
of them to be merged in. The order of the elements is free as long as it stays: it follows their frequencies in the
pool, is taken anew each time the pool has grown fourfold, and an element not seen by then counts as rarest.
"""

import numpy as np

from alpaca_ray.generate import novelty_kernel as kernel
from alpaca_ray.generate.compiled import keep_on_disk
from alpaca_ray.generate.novelty_kernel import (
    ELEMENTS,
    OWN_BITS,
    PENDING,
    TEXTS,
    Batch,
    Elements,
    Index,
    Pending,
    Pool,
    Sorted,
)
from alpaca_ray.generate.rouge import NeededLcs
from alpaca_ray.generate.tokens import Array, Documents, grown

_FEWEST_TO_SORT = 2048  # texts
_FEWEST_TO_RANK = 1024  # texts
_NO_DUPLICATES = 2.0  # a threshold that no ROUGE-L exceeds
_BLOCK = 8192  # texts that are filed anew at once: room for the worst case of all of them would be much


class PostingsIndex:
    """A pool of texts for fast search, compiled. `ScanIndex` gives the same answers."""

    def __init__(self, needed: NeededLcs) -> None:
        keep_on_disk(kernel.offer_all)
        self._needed = needed
        self._index = _empty()
        self._longest = 0
        self._num_ranked = self._num_sorted = 0  # texts

    def __len__(self) -> int:
        return int(self._index.counts[TEXTS])

    def add(self, documents: Documents) -> None:
        """Put texts into the pool without a decision."""
        self._offer(documents, np.zeros(len(documents.starts) - 1, bool), _NO_DUPLICATES)

    def offer(self, documents: Documents, barred: Array) -> tuple[Array, Array]:
        """Decide on each text in turn: (index in the pool of its most similar duplicate or -1, their ROUGE-L or 0).

        A text without a duplicate joins the pool, unless it is barred (bool).
        """
        return self._offer(documents, barred, self._needed.threshold)

    def _offer(self, documents: Documents, barred: Array, threshold: float) -> tuple[Array, Array]:
        self._make_room(documents)
        answers = kernel.offer_all(self._index, self._batch(documents), barred, threshold)
        self._tidy()
        return answers

    def _batch(self, documents: Documents) -> Batch:
        lengths = documents.lengths
        self._longest = max(self._longest, int(lengths.max(initial=0)))
        distinct, which = np.unique(lengths, return_inverse=True)
        rows = [self._needed.row(m, self._longest) for m in distinct.tolist()]
        sizes = np.array([len(row) for row in rows], np.int64)
        stops = np.cumsum(sizes)
        shortest = np.array([np.argmax(np.append(row, 0) <= np.arange(len(row) + 1)) for row in rows], np.int64)
        flat = np.concatenate([np.zeros(0, np.int32), *rows])
        scratch = np.empty(self._longest, np.int64), np.empty(self._longest, np.uint64)
        return Batch(*documents, flat, (stops - sizes)[which], stops[which], shortest[which], *scratch)

    def _make_room(self, documents: Documents) -> None:
        """For the worst case: every text joins, and every token is a new element."""
        counts, elements, pool, old, recent, pending = self._index
        num_texts, num_tokens = int(counts[TEXTS]) + len(documents.starts) - 1, len(documents.ids)
        num_words = int(documents.ids.max(initial=-1)) + 1
        num_elements = int(counts[ELEMENTS]) + num_tokens
        self._index = Index(
            counts,
            Elements(
                grown(elements.of_word, num_words, -1),
                grown(elements.next_occurrence, num_elements, -1),
                grown(elements.order, num_elements),
                grown(elements.bit, num_elements),
                grown(elements.frequency, num_elements),
                grown(elements.last_user, num_elements),
                grown(elements.head, num_elements, -1),
            ),
            Pool(
                grown(pool.ids, int(pool.starts[counts[TEXTS]]) + num_tokens),
                grown(pool.starts, num_texts + 1),
                grown(pool.last_asker, num_texts),
                grown(pool.found, num_texts),
                grown(pool.slot_of, num_words),
            ),
            old,
            recent,
            Pending(*(grown(a, int(counts[PENDING]) + num_tokens) for a in pending)),
        )

    def _tidy(self) -> None:
        if len(self) >= max(4 * self._num_ranked, _FEWEST_TO_RANK):
            self._rank()
        elif len(self) - self._num_sorted >= _FEWEST_TO_SORT:
            self._sort()

    def _rank(self) -> None:
        """Order the elements by their frequencies so far, and file everything anew."""
        counts, elements, pool, *_ = self._index
        num_elements, num_texts = int(counts[ELEMENTS]), len(self)
        rarest_first = np.argsort(elements.frequency[:num_elements], kind="stable")
        elements.order[rarest_first] = np.arange(num_elements)
        commonness = np.arange(num_elements)[::-1]  # 0: the commonest
        shared = OWN_BITS + commonness % (64 - OWN_BITS)
        bit = np.where(commonness < OWN_BITS, commonness, shared)
        elements.bit[rarest_first] = np.uint64(1) << bit.astype(np.uint64)
        documents = Documents(pool.ids[: pool.starts[num_texts]].copy(), pool.starts[: num_texts + 1].copy())
        counts[[TEXTS, PENDING]] = 0
        elements.frequency[:], elements.head[:] = 0, -1
        self._index = self._index._replace(old=_empty().old, recent=_empty().recent)
        self._num_ranked, self._num_sorted = num_texts, 0
        for first in range(0, num_texts, _BLOCK):
            self.add(documents.part(first, first + _BLOCK))

    def _sort(self) -> None:
        """Sort the pending postings in among the recent ones, and those among the old ones once they are many."""
        counts, elements, _, old, recent, pending = self._index
        size = int(counts[PENDING])
        recent = _merged(recent, pending.element[:size], pending.place[:size], pending.bits[:size], pending.text[:size])
        if len(recent.place) >= len(old.place) // 8:
            old, recent = _merged(old, _elements_of(recent), *recent[1:]), _empty().recent
        elements.head[:] = -1
        counts[PENDING] = 0
        self._index = self._index._replace(old=old, recent=recent)
        self._num_sorted = len(self)


def _merged(old: Sorted, element: Array, place: Array, bits: Array, text: Array) -> Sorted:
    """The sorted postings and others, in any order, as one."""
    key = _key(element, place)
    by_key = np.argsort(key)
    at = np.searchsorted(_key(_elements_of(old), old.place), key[by_key]) + np.arange(len(key))
    is_old = np.ones(len(old.place) + len(key), bool)
    is_old[at] = False
    columns = [np.empty(len(is_old), column.dtype) for column in old[1:]]
    for column, before, more in zip(columns, old[1:], (place, bits, text), strict=True):
        column[at], column[is_old] = more[by_key], before
    sizes = np.bincount(element, minlength=len(old.first) - 1)
    sizes[: len(old.first) - 1] += np.diff(old.first)
    return Sorted(np.concatenate(([0], np.cumsum(sizes))), *columns)


def _elements_of(postings: Sorted) -> Array:
    return np.repeat(np.arange(len(postings.first) - 1), np.diff(postings.first))


def _key(element: Array, place: Array) -> Array:
    return element.astype(np.uint64) << np.uint64(32) | place


def _empty() -> Index:
    def ints() -> Array:
        return np.zeros(0, np.int32)

    def longs(size: int = 0) -> Array:
        return np.zeros(size, np.int64)

    def bits() -> Array:
        return np.zeros(0, np.uint64)

    def places() -> Array:
        return np.zeros(0, np.uint32)

    return Index(
        longs(4),
        Elements(ints(), ints(), ints(), bits(), ints(), longs(), ints()),
        Pool(ints(), longs(1), longs(), ints(), longs()),
        Sorted(longs(1), places(), bits(), ints()),
        Sorted(longs(1), places(), bits(), ints()),
        Pending(ints(), ints(), places(), bits(), ints()),
    )
