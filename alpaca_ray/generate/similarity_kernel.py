"""The compiled part of `similarity_report`: ROUGE-L of a few texts to all earlier ones, a processor lane per text.

The bit-parallel LCS (Hyyro 2004) takes the same steps for every text that is compared with a given other one, so many
of them advance at once, and a word that none of them has takes no step at all.

All compiled code of the report is in this file, for numba compiles anew when the file of a function changes, but not
for what it calls elsewhere.
"""

from typing import NamedTuple

import numpy as np

from alpaca_ray.generate.compiled import Number, compiled
from alpaca_ray.generate.tokens import Array

_TILE = 128  # columns whose LCS are found before they are turned into scores


class Texts(NamedTuple):
    """All texts, and the F-measures of their lengths."""

    ids: Array  # int32, small ones for common words: what the search for a word touches stays in the cache
    starts: Array  # int64
    length_rank: Array  # int32, by text: place of its length among the distinct lengths
    f: Array  # float64, (m, length rank, LCS), for m and LCS up to the largest of a row
    slot_of: Array  # int32, by word: its row among the masks at hand, 0: none


@compiled
def score_rows(texts: Texts, rows: Array, state: Array, scores: Array, nearest: Array) -> None:
    """Fill `scores[lane, j]` with the ROUGE-L of texts rows[lane] and j, for all j below the largest of `rows`.

    `nearest[lane]`, full of -1 before, gets the most similar ones of j < rows[lane], the earlier of equals first.
    `state` has room for one number per lane; no text of `rows` has more tokens than such a number has bits.
    """
    masks = _lane_masks(texts, rows, state)
    lowest = np.full(len(rows), -1.0)
    lcs = np.empty((_TILE, len(rows)), np.uint8)
    for first in range(0, scores.shape[1], _TILE):
        stop = min(first + _TILE, scores.shape[1])
        _step_lanes(texts, np.arange(first, stop), masks, state, lcs)
        for lane in range(len(rows)):
            row, by_length = scores[lane], texts.f[texts.starts[rows[lane] + 1] - texts.starts[rows[lane]]]
            for j in range(first, stop):
                row[j] = by_length[texts.length_rank[j], lcs[j - first, lane]]
            for j in range(first, min(stop, rows[lane])):
                if row[j] > lowest[lane]:
                    lowest[lane] = _note(row, nearest[lane], j)
    for row in rows:
        for word in texts.ids[texts.starts[row] : texts.starts[row + 1]]:
            texts.slot_of[word] = 0


@compiled
def _note(scores: Array, nearest: Array, j: int) -> float:
    """Put j among the nearest, after those at least as near; returns the score that the next one must exceed."""
    k = len(nearest) - 1
    while k > 0 and (nearest[k - 1] < 0 or scores[nearest[k - 1]] < scores[j]):
        nearest[k] = nearest[k - 1]
        k -= 1
    nearest[k] = j
    return scores[nearest[-1]] if nearest[-1] >= 0 else -1.0


@compiled
def _lane_masks(texts: Texts, rows: Array, state: Array) -> Array:
    """(slots, lanes): bit i of a word's entry says that it stands at i in the lane's text."""
    ids, starts, slot_of, num_slots = texts.ids, texts.starts, texts.slot_of, 1
    for row in rows:
        for word in ids[starts[row] : starts[row + 1]]:
            if slot_of[word] == 0:
                slot_of[word] = num_slots
                num_slots += 1
    masks = np.zeros((num_slots, len(rows)), state.dtype)
    for lane in range(len(rows)):
        start = starts[rows[lane]]
        for i in range(starts[rows[lane] + 1] - start):
            masks[slot_of[ids[start + i]], lane] |= np.uint64(1) << np.uint64(i)
    return masks


@compiled
def _step_lanes(texts: Texts, columns: Array, masks: Array, state: Array, lcs: Array) -> None:
    """Fill lcs[k, lane] with the length of the longest common subsequence of text columns[k] and the lane's."""
    ids, starts, slot_of, num_lanes = texts.ids, texts.starts, texts.slot_of, len(state)
    for column, j in enumerate(columns):
        for lane in range(num_lanes):
            state[lane] = ~np.uint64(0)
        for k in range(starts[j], starts[j + 1]):
            slot = slot_of[ids[k]]
            if slot > 0:
                for lane in range(num_lanes):
                    matches = state[lane] & masks[slot, lane]
                    state[lane] = (state[lane] + matches) | (state[lane] - matches)
        for lane in range(num_lanes):
            state[lane] = ~state[lane]
            lcs[column, lane] = _popcount(np.uint64(state[lane]))


@compiled
def _popcount(x: Number) -> Number:
    """Number of bits set in a uint64; LLVM knows this pattern and makes it one instruction."""
    x -= (x >> np.uint64(1)) & np.uint64(0x5555555555555555)
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))
