"""The arrays of `PostingsIndex`, and the compiled functions that search and fill them.

A function that is called often takes few arrays: each one costs two atomic counts per call. All compiled code of the
index is in this file, for numba compiles anew when the file of a function changes, but not for what it calls elsewhere.
"""

from typing import NamedTuple

import numpy as np

from alpaca_ray.generate.compiled import Number, compiled
from alpaca_ray.generate.tokens import Array

# A posting's place is q << 20 | n. Either part stops at its largest number, which only weakens a filter.
LENGTH_BITS = 20
MAX_LENGTH = (1 << LENGTH_BITS) - 1
MAX_POSITION = (1 << 32 - LENGTH_BITS) - 1
OWN_BITS = 16  # of 64, for the commonest elements; the others share the rest

# Entries of Index.counts.
ELEMENTS, TEXTS, PENDING, QUERIES = range(4)


class Elements(NamedTuple):
    """Elements (word, k-th occurrence) by word, then by number."""

    of_word: Array  # int32, of its first occurrence; -1: none yet
    next_occurrence: Array  # int32, of the same word; -1: none yet
    order: Array  # int32, rarest first
    bit: Array  # uint64, one bit set
    frequency: Array  # int32, number of texts
    last_user: Array  # int64, the query that has it
    head: Array  # int32, its latest pending posting; -1: none


class Pool(NamedTuple):
    """The texts, and what the query at hand knows of them and of words."""

    ids: Array  # int32, the tokens of all texts, end to end
    starts: Array  # int64
    last_asker: Array  # int64, the query that found it last
    found: Array  # int32, texts, what the query at hand found
    slot_of: Array  # int64, by word: its row among the masks of the query at hand; 0: none


class Sorted(NamedTuple):
    """Postings sorted by (element, place), those of element e from first[e] on."""

    first: Array  # int64
    place: Array  # uint32
    bits: Array  # uint64
    text: Array  # int32


class Pending(NamedTuple):
    """The latest postings, one list per element."""

    link: Array  # int32, an earlier one of the same element; -1: none
    element: Array  # int32
    place: Array  # uint32
    bits: Array  # uint64
    text: Array  # int32


class Index(NamedTuple):
    counts: Array  # int64, see above
    elements: Elements
    pool: Pool
    old: Sorted
    recent: Sorted
    pending: Pending


class Batch(NamedTuple):
    """Texts to look up, and how long a common subsequence must be: text i and another of n tokens need
    `rows[row_starts[i] + n]`, for n from `shortest[i]` to below `row_stops[i] - row_starts[i]`; no other n can match.
    """

    ids: Array  # int32
    starts: Array  # int64
    rows: Array  # int32
    row_starts: Array  # int64
    row_stops: Array  # int64
    shortest: Array  # int64
    # of the text at hand, from each element on, rarest first
    keys: Array  # int64, order << 32 | element
    suffixes: Array  # uint64, bits of the elements from this one on


class Query(NamedTuple):
    """What is wanted of the postings of one element of a text."""

    number: int  # of the text's query
    left: int  # elements of the text from this one on, of which enough must be shared
    bits: int  # uint64, of those
    row: Array  # int32, how many are enough, by the length of the other text
    shortest: int  # length of the other text
    longest: int


@compiled
def offer_all(index: Index, batch: Batch, barred: Array, threshold: float) -> tuple[Array, Array]:
    """`PostingsIndex.offer` for texts that there is room for; above a threshold of 1 it puts all into the pool."""
    nearest, scores = np.full(len(barred), -1), np.zeros(len(barred))
    for i in range(len(barred)):
        _read_elements(index.counts, index.elements, batch, i)
        num_found = _find(index, batch, i) if threshold <= 1 else 0
        if num_found > 0:
            ids = batch.ids[batch.starts[i] : batch.starts[i + 1]]
            nearest[i], scores[i] = _most_similar(index.pool, ids, num_found, threshold)
        if nearest[i] < 0 and not barred[i]:
            _insert(index, batch, i)
    return nearest, scores


@compiled
def _read_elements(counts: Array, elements: Elements, batch: Batch, i: int) -> None:
    """Fill the batch's keys and suffixes for text i."""
    counts[QUERIES] += 1
    ids = batch.ids[batch.starts[i] : batch.starts[i + 1]]
    m, keys = len(ids), batch.keys
    for k in range(m):
        element = elements.of_word[ids[k]]
        if element < 0:
            element = _new_element(counts, elements)
            elements.of_word[ids[k]] = element
        while elements.last_user[element] == counts[QUERIES]:
            if elements.next_occurrence[element] < 0:
                elements.next_occurrence[element] = _new_element(counts, elements)
            element = elements.next_occurrence[element]
        elements.last_user[element] = counts[QUERIES]
        keys[k] = (np.int64(elements.order[element]) << 32) | np.int64(element)
    _sort(keys, m)
    bits = np.uint64(0)
    for k in range(m - 1, -1, -1):
        bits |= elements.bit[keys[k] & 0xFFFFFFFF]
        batch.suffixes[k] = bits


@compiled
def _sort(keys: Array, m: int) -> None:
    """Shell sort of the first m keys: there are few."""
    gap = 1
    while gap < m // 3:
        gap = 3 * gap + 1
    while gap > 0:
        for i in range(gap, m):
            key, k = keys[i], i
            while k >= gap and keys[k - gap] > key:
                keys[k] = keys[k - gap]
                k -= gap
            keys[k] = key
        gap //= 3


@compiled
def _new_element(counts: Array, elements: Elements) -> Number:
    element = counts[ELEMENTS]
    counts[ELEMENTS] += 1
    elements.order[element] = -1 - element  # the newest counts as the rarest
    elements.bit[element] = np.uint64(1) << np.uint64(OWN_BITS + element % (64 - OWN_BITS))
    return np.int32(element)


@compiled
def _insert(index: Index, batch: Batch, i: int) -> None:
    """Put text i into the pool and file it under its first elements: those that a match may share first."""
    counts, elements, pool, pending = index.counts, index.elements, index.pool, index.pending
    m, text = batch.starts[i + 1] - batch.starts[i], counts[TEXTS]
    start = pool.starts[text]
    pool.ids[start : start + m] = batch.ids[batch.starts[i] : batch.starts[i + 1]]
    pool.starts[text + 1] = start + m
    counts[TEXTS] += 1
    for q in range(m):
        elements.frequency[batch.keys[q] & 0xFFFFFFFF] += 1
    if batch.row_starts[i] + batch.shortest[i] >= batch.row_stops[i]:
        return  # nothing matches a text of this length
    least = batch.rows[batch.row_starts[i] + batch.shortest[i]]
    for q in range(m - least + 1):
        element, k = batch.keys[q] & 0xFFFFFFFF, counts[PENDING]
        pending.element[k], pending.text[k], pending.bits[k] = element, text, batch.suffixes[q]
        pending.place[k] = (min(q, MAX_POSITION) << LENGTH_BITS) | min(m, MAX_LENGTH)
        pending.link[k] = elements.head[element]
        elements.head[element] = k
        counts[PENDING] += 1


@compiled
def _find(index: Index, batch: Batch, i: int) -> int:
    """Fill pool.found with the texts that may be duplicates of text i; returns how many there are."""
    pool, row = index.pool, batch.rows[batch.row_starts[i] : batch.row_stops[i]]
    m, shortest, longest = batch.starts[i + 1] - batch.starts[i], batch.shortest[i], len(row) - 1
    num_found = 0
    for position in range(m):
        left = m - position
        while longest >= shortest and row[longest] > left:
            longest -= 1
        if longest < shortest:
            break
        element = batch.keys[position] & 0xFFFFFFFF
        query = Query(index.counts[QUERIES], left, batch.suffixes[position], row, shortest, longest)
        if index.elements.head[element] >= 0:
            num_found = _find_pending(index.pending, index.elements.head[element], query, pool, num_found)
        if _has_postings(index.recent.first, element):
            num_found = _find_sorted(index.recent, element, query, pool, num_found)
        if _has_postings(index.old.first, element):
            num_found = _find_sorted(index.old, element, query, pool, num_found)
    return num_found


@compiled
def _has_postings(first: Array, element: int) -> Number:
    return element + 1 < len(first) and first[element] < first[element + 1]


@compiled
def _find_sorted(postings: Sorted, element: int, query: Query, pool: Pool, num_found: int) -> int:
    """Position by position, each from the smallest length at which enough elements follow to the largest."""
    row, n, longest = query.row, query.shortest, query.longest
    k, stop = postings.first[element], postings.first[element + 1]
    for q in range(min(longest - row[longest], MAX_POSITION) + 1):
        while n - row[n] < q:  # rises with n
            n += 1
        k = _seek(postings.place, k, stop, (q << LENGTH_BITS) | n)
        if k == stop:
            break
        last = (q << LENGTH_BITS) | longest
        while k < stop and postings.place[k] <= last:
            if _may_match(postings.place[k], postings.bits[k], query.left, query.bits, row):
                num_found = _note(pool.last_asker, pool.found, postings.text[k], query.number, num_found)
            k += 1
    return num_found


@compiled
def _seek(place: Array, k: int, stop: int, wanted: int) -> int:
    """The first index from k on with a place of at least `wanted`; in steps that double, for it is often near."""
    step = 1
    while k + step < stop and place[k + step] < wanted:
        k += step
        step *= 2
    stop = min(stop, k + step)
    while k < stop:
        middle = (k + stop) >> 1
        if place[middle] < wanted:
            k = middle + 1
        else:
            stop = middle
    return k


@compiled
def _find_pending(postings: Pending, k: int, query: Query, pool: Pool, num_found: int) -> int:
    while k >= 0:
        n = np.int64(postings.place[k]) & MAX_LENGTH
        if query.shortest <= n <= query.longest and _may_match(
            postings.place[k], postings.bits[k], query.left, query.bits, query.row
        ):
            num_found = _note(pool.last_asker, pool.found, postings.text[k], query.number, num_found)
        k = postings.link[k]
    return num_found


@compiled
def _may_match(place: int, other_bits: int, left: int, bits: int, row: Array) -> Number:
    """Whether enough elements can be shared from here on: each bit on one side only is an element that is not."""
    n = np.int64(place) & MAX_LENGTH
    other_left, need = n - (np.int64(place) >> LENGTH_BITS), row[n]
    return left - _popcount(bits & ~other_bits) >= need and other_left - _popcount(other_bits & ~bits) >= need


@compiled
def _popcount(x: Number) -> Number:
    """Number of bits set in a uint64; LLVM knows this pattern and makes it one instruction."""
    x -= (x >> np.uint64(1)) & np.uint64(0x5555555555555555)
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))


@compiled
def _note(last_asker: Array, found: Array, text: int, query: int, num_found: int) -> int:
    """Note a text once."""
    if last_asker[text] == query:
        return num_found
    last_asker[text] = query
    found[num_found] = text
    return num_found + 1


@compiled
def _most_similar(pool: Pool, ids: Array, num_found: int, threshold: float) -> tuple[Number, float]:
    """(index, ROUGE-L) of the most similar of the texts found, the first of equals; (-1, 0) if none is above."""
    best, highest = np.int64(-1), 0.0
    masks = _masks(pool.slot_of, ids)
    for k in range(num_found):
        text = pool.found[k]
        other = pool.ids[pool.starts[text] : pool.starts[text + 1]]
        lcs = _lcs(pool.slot_of, masks, other)
        precision, recall = lcs / len(other), lcs / len(ids)
        score = 2 * precision * recall / (precision + recall) if lcs > 0 else 0.0  # as rouge.f_measure has it
        if score > threshold and (score > highest or (score == highest and text < best)):
            best, highest = np.int64(text), score
    for word in ids:
        pool.slot_of[word] = 0
    return best, highest


@compiled
def _masks(slot_of: Array, ids: Array) -> Array:
    """(slots, words of 64 bits): bit i of a word's row says that it stands at i in `ids`; row 0 has none."""
    num_slots = 1
    for word in ids:
        if slot_of[word] == 0:
            slot_of[word] = num_slots
            num_slots += 1
    masks = np.zeros((num_slots, (len(ids) + 63) // 64), np.uint64)
    for i in range(len(ids)):
        masks[slot_of[ids[i]], i >> 6] |= np.uint64(1) << np.uint64(i & 63)
    return masks


@compiled
def _lcs(slot_of: Array, masks: Array, other: Array) -> int:
    """Length of the longest common subsequence: a step per token of one text, a bit per token of the other."""
    length, num_words = 0, masks.shape[1]
    state = np.full(num_words, ~np.uint64(0))
    for word in other:
        row, carry = masks[slot_of[word]], np.uint64(0)
        for k in range(num_words):
            matches = state[k] & row[k]
            partial = state[k] + matches
            total = partial + carry
            carry = np.uint64(partial < matches) | np.uint64(total < carry)
            state[k] = total | (state[k] - matches)
    for k in range(num_words):
        length += _popcount(~state[k])
    return length
