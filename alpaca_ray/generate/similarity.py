"""How similar each instruction is to all before it, as Stanford Alpaca's metadata has it.

All pairs, so a pass of its own after the dataset is complete, over blocks of rows. Quadratic: seconds for 50,000
instructions, an hour for a million.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cdist

from alpaca_ray.generate.novelty import COMPILE_AT
from alpaca_ray.generate.rouge import f_measure
from alpaca_ray.generate.tokens import Array, CodePoints, Documents, Vocabulary, as_code_points, by_frequency

log = logging.getLogger("alpaca_ray")

LONGEST_ROW = 64  # tokens, one bit each, in compiled code
_BLOCK = 1024  # rows from which groups of similar length are made
_GROUP = 64  # rows that are scored at once: 512 bytes of memory per text

# Rows -> their scores (R, max row), and the nearest of each (R, num_nearest), padded with -1.
ScoreRows = Callable[[Array], tuple[Array, Array]]


@dataclass(frozen=True, slots=True)
class Similarity:
    """Of one instruction to all before it: the nearest with their ROUGE-L, nearest first, earliest first among equals,
    and the mean over all. Without any before it, [] and 0.0.
    """

    most_similar: list[tuple[str, float]]
    mean_rouge_l: float


def similarity_report(
    kept: Sequence[str], pool: Sequence[str], num_nearest: int = 10, *, compile_at: int = COMPILE_AT
) -> list[Similarity]:
    """For each kept instruction i, its similarity to `[*pool, *kept[:i]]`: what stood there when it was added.

    Scores are rouge_score's, and each mean is numpy's over the list of them, to the last bit. From `compile_at`
    instructions on it takes compiled code, where there is numba.
    """
    texts = [*pool, *kept]
    documents = by_frequency(Vocabulary().encode(texts))
    score_rows = _scorer(documents, num_nearest, compiled=len(texts) >= compile_at)
    report: dict[int, Similarity] = {}
    for rows in _groups(documents.lengths, len(pool)):
        scores, nearest = score_rows(rows)
        for lane, row in enumerate(rows.tolist()):
            report[row] = _similarity(texts, scores[lane, :row], nearest[lane])
    return [report[row] for row in range(len(pool), len(texts))]


def _similarity(texts: list[str], scores: Array, nearest: Array) -> Similarity:
    most_similar = [(texts[j], float(scores[j])) for j in nearest.tolist() if j >= 0]
    return Similarity(most_similar, float(scores.mean()) if len(scores) else 0.0)


def _groups(lengths: Array, first: int) -> Iterator[Array]:
    """All rows from `first` on in groups that are near each other, in place and in length."""
    for start in range(first, len(lengths), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(lengths)))
        for shortest, longest in ((0, 32), (33, LONGEST_ROW), (LONGEST_ROW + 1, np.inf)):
            rows = block[(shortest <= lengths[block]) & (lengths[block] <= longest)]
            for k in range(0, len(rows), _GROUP):
                yield rows[k : k + _GROUP]


def _scorer(documents: Documents, num_nearest: int, *, compiled: bool) -> ScoreRows:
    scan = partial(_scan, as_code_points(documents), documents.lengths, num_nearest)
    if not compiled:
        return scan
    try:
        from alpaca_ray.generate import similarity_kernel  # imports numba: 0.5 s, and not on every machine
        from alpaca_ray.generate.compiled import keep_on_disk
    except (ImportError, OSError) as error:
        log.warning("numba cannot be loaded (%s): comparing instructions takes longer, with the same result", error)
        return scan
    keep_on_disk(similarity_kernel.score_rows)
    lengths = documents.lengths
    distinct, rank = np.unique(lengths, return_inverse=True)
    m, lcs = np.arange(LONGEST_ROW + 1)[:, None, None], np.arange(LONGEST_ROW + 1)
    f = _f_measure(np.broadcast_to(lcs, (len(m), len(distinct), len(lcs))), m, distinct[:, None])
    all_scores = np.empty(_GROUP * len(lengths))  # one for all groups: the system takes as long to hand out new memory
    slot_of = np.zeros(int(documents.ids.max(initial=-1)) + 1, np.int32)
    texts = similarity_kernel.Texts(*documents, rank.astype(np.int32), f, slot_of)

    def score_rows(rows: Array) -> tuple[Array, Array]:
        longest = int(lengths[rows].max())
        if longest > LONGEST_ROW:
            return scan(rows)
        state = np.zeros(len(rows), np.uint32 if longest <= 32 else np.uint64)
        scores = all_scores[: len(rows) * rows.max()].reshape(len(rows), rows.max())
        nearest = np.full((len(rows), num_nearest), -1)
        similarity_kernel.score_rows(texts, rows, state, scores, nearest)
        return scores, nearest

    return score_rows


def _scan(texts: list[CodePoints], lengths: Array, num_nearest: int, rows: Array) -> tuple[Array, Array]:
    """ScoreRows with numpy and rapidfuzz."""
    columns = int(rows.max())
    lcs = cdist([texts[row] for row in rows], texts[:columns], scorer=LCSseq.similarity, dtype=np.int32)
    scores, nearest = np.empty(lcs.shape), np.full((len(rows), num_nearest), -1)
    for lane, row in enumerate(rows.tolist()):
        scores[lane] = _f_measure(lcs[lane], lengths[row], lengths[:columns])
        best = _nearest(scores[lane, :row], num_nearest)
        nearest[lane, : len(best)] = best
    return scores, nearest


def _nearest(scores: Array, num_nearest: int) -> Array:
    """Places of the highest scores, highest first, earliest first among equals."""
    if len(scores) > num_nearest:
        lowest = np.partition(scores, -num_nearest)[-num_nearest]
        places = np.flatnonzero(scores >= lowest)
    else:
        places = np.arange(len(scores))
    return places[np.argsort(-scores[places], kind="stable")][:num_nearest]


def _f_measure(lcs: Array, m: Array, n: Array) -> Array:
    return np.where(lcs > 0, f_measure(np.maximum(lcs, 1), np.maximum(m, 1), np.maximum(n, 1)), 0.0)
