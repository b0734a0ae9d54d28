"""The similarity report equals Alpaca's metadata computed pair by pair with rouge_score, in both forms."""

import sys
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import _score_lcs
from rouge_score.tokenize import tokenize

from alpaca_ray.generate.similarity import Similarity, similarity_report

words = st.sampled_from(["a", "b", "c", "d", "The", "of", "x1", "é", "-", "?"])
texts = st.lists(words, max_size=9).map(" ".join)
long_texts = st.lists(words | st.integers(0, 30).map(str), min_size=20, max_size=180).map(" ".join)
many = st.lists(texts, max_size=14)
forms = st.sampled_from([0, sys.maxsize])  # always compiled; never


def alpacas(kept: Sequence[str], pool: Sequence[str], num_nearest: int) -> list[Similarity]:
    earlier, report = list(pool), []
    for text in kept:
        scores = [float(_score_lcs(tokenize(text, None), tokenize(other, None)).fmeasure) for other in earlier]
        nearest = [j for _, j in sorted((-score, j) for j, score in enumerate(scores))[:num_nearest]]
        mean = float(np.mean(scores)) if scores else 0.0
        report.append(Similarity([(earlier[j], scores[j]) for j in nearest], mean))
        earlier.append(text)
    return report


@settings(deadline=None, max_examples=100)
@given(many, many, st.integers(1, 4), forms)
def test_it_is_alpacas_metadata(kept: list[str], pool: list[str], num_nearest: int, form: int) -> None:
    assert similarity_report(kept, pool, num_nearest, compile_at=form) == alpacas(kept, pool, num_nearest)


@settings(deadline=None, max_examples=15)
@given(st.lists(texts | long_texts, max_size=9), st.lists(texts | long_texts, max_size=3), forms)
def test_long_texts_are_no_different(kept: list[str], pool: list[str], form: int) -> None:
    assert similarity_report(kept, pool, compile_at=form) == alpacas(kept, pool, 10)


@pytest.mark.parametrize("form", [0, sys.maxsize])
def test_the_means_are_numpys_over_many_scores(form: int) -> None:
    """So many that the order of the sum shows in the last bits, and more than one block of rows."""
    rng = np.random.default_rng(0)
    made = [" ".join(map(str, rng.integers(0, 12, rng.integers(1, 30)))) for _ in range(1400)]
    report = similarity_report(made[300:], made[:300], compile_at=form)
    chosen = [0, 1, 700, 723, 724, 1099]
    for i in chosen:
        assert [report[i]] == alpacas([made[300 + i]], made[: 300 + i], 10)


def test_without_any_before_it_there_is_nothing_to_compare_with() -> None:
    assert similarity_report(["Name a river."], []) == [Similarity([], 0.0)]
    assert similarity_report([], ["Name a river."]) == []
