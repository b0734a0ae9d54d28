"""Novelty equals a plain loop over rouge_score's own function, to the last bit."""

from collections.abc import Sequence
from itertools import count

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import _score_lcs
from rouge_score.tokenize import tokenize

from alpaca_ray.generate.novelty import Novelty, NoveltyFilter, rouge_l

words = st.sampled_from(["a", "b", "c", "The", "the", "of", "of,", "x1", "Ü", "é", "-", "K", "日本"])
texts = st.lists(words, max_size=11).map(" ".join)
many = st.lists(texts, max_size=8)
thresholds = st.sampled_from([0.7, 0.5, 2 / 3, 1.0]) | st.floats(0, 1, exclude_min=True)


def f_measure(a: str, b: str) -> float:
    """As `rouge_score.RougeScorer(["rougeL"])` without a stemmer has it."""
    first, second = tokenize(a, None), tokenize(b, None)
    return float(_score_lcs(first, second).fmeasure) if first and second else 0.0


def greedy(seeds: Sequence[str], offers: Sequence[str], threshold: float) -> list[tuple[bool, float]]:
    pool, decisions = list(seeds), []
    for text in offers:
        highest = max((f_measure(text, other) for other in pool), default=0.0)
        decisions.append((highest <= threshold, highest))
        if highest <= threshold:
            pool.append(text)
    return decisions


def decisions(answers: list[Novelty]) -> list[tuple[bool, float]]:
    return [(answer.kept, answer.rouge_l) for answer in answers]


@settings(deadline=None, max_examples=120)
@given(many, many, thresholds)
@example(["a b c d e f g h i j"], ["a b c d e f g x y z"], 0.7)
def test_it_decides_as_a_loop_over_rouge_score(seeds: list[str], offers: list[str], threshold: float) -> None:
    assert decisions(NoveltyFilter(seeds, threshold).offer_many(offers)) == greedy(seeds, offers, threshold)


def tied(length: int, m: int, n: int) -> tuple[str, str]:
    """Two texts of m and n words whose longest common subsequence has `length` words."""
    fresh = (f"w{i}" for i in count())
    shared = [next(fresh) for _ in range(length)]
    return (
        " ".join([*shared, *(next(fresh) for _ in range(m - length))]),
        " ".join([*(next(fresh) for _ in range(n - length)), *shared]),
    )


def test_exact_ties_fall_on_the_side_where_rouge_scores_floats_put_them() -> None:
    ties = [tied(length, m, n) for m in range(1, 65) for n in range(1, 65) for length in range(1, min(m, n) + 1)
            if 20 * length == 7 * (m + n)]  # fmt: skip
    kept = [NoveltyFilter([a]).offer(b).kept for a, b in ties]
    assert kept == [f_measure(a, b) <= 0.7 for a, b in ties]
    assert len(set(kept)) == 2  # on paper they are all equal


@settings(deadline=None, max_examples=40)
@given(many, many, thresholds)
def test_offering_many_is_offering_each(seeds: list[str], offers: list[str], threshold: float) -> None:
    one_by_one, at_once = NoveltyFilter(seeds, threshold), NoveltyFilter(seeds, threshold)
    assert at_once.offer_many(offers) == [one_by_one.offer(text) for text in offers]
    assert at_once.offer_many(offers) == [one_by_one.offer(text) for text in offers]  # nor does the next call differ


@settings(deadline=None, max_examples=40)
@given(many, many, texts)
def test_what_was_kept_is_a_duplicate_the_next_time(seeds: list[str], offers: list[str], text: str) -> None:
    novelty = NoveltyFilter(seeds)
    novelty.offer_many(offers)
    novelty.offer(text)
    again = novelty.offer(text)
    has_tokens = bool(tokenize(text, None))
    assert again.kept == (not has_tokens)
    assert again.rouge_l > 0.7 or not has_tokens


@settings(deadline=None, max_examples=40)
@given(many, many)
def test_no_two_kept_instructions_are_similar(seeds: list[str], offers: list[str]) -> None:
    answers = NoveltyFilter(seeds).offer_many(offers)
    kept = [text for text, answer in zip(offers, answers, strict=True) if answer.kept]
    for i, text in enumerate(kept):
        assert all(f_measure(text, other) <= 0.7 for other in [*seeds, *kept[:i]])


@settings(deadline=None, max_examples=40)
@given(many, texts)
def test_the_nearest_is_one_that_has_the_score(seeds: list[str], text: str) -> None:
    answer = NoveltyFilter(seeds).offer(text)
    if answer.rouge_l == 0:
        assert answer.nearest == ""
    else:
        assert answer.nearest in seeds
        assert f_measure(answer.nearest, text) == answer.rouge_l


def test_rejected_instructions_do_not_reject_others() -> None:
    first, second, third = "a b c d e f g h i j", "a b c d e f g h x y", "a b c d e f x y p q"
    assert f_measure(first, second) > 0.7 >= f_measure(first, third)
    assert f_measure(second, third) > 0.7
    kept = [answer.kept for answer in NoveltyFilter([]).offer_many([first, second, third])]
    assert kept == [True, False, True]
    reverse = [answer.kept for answer in NoveltyFilter([]).offer_many([third, second, first])]
    assert reverse == [True, False, True]


def test_the_order_of_offers_decides() -> None:
    first, second, third = "a b c d e f g h i j", "a b c d e f g h x y", "a b c d e f x y p q"
    assert [a.kept for a in NoveltyFilter([]).offer_many([second, first, third])] == [True, False, False]


@pytest.mark.parametrize("text", ["", "   ", "?!", "日本語", "…"])
def test_a_text_without_tokens_is_always_kept(text: str) -> None:
    novelty = NoveltyFilter(["Name a river.", text])
    assert novelty.offer_many([text, text]) == [Novelty(True, 0.0, "")] * 2
    assert not novelty.offer("name a RIVER").kept


def test_case_and_punctuation_do_not_make_an_instruction_new() -> None:
    novelty = NoveltyFilter(["Name three rivers of Europe."])
    assert novelty.offer("NAME three (rivers) of... europe!") == Novelty(False, 1.0, "Name three rivers of Europe.")


@settings(deadline=None, max_examples=40)
@given(st.lists(words, max_size=70), st.lists(words, max_size=70))
def test_rouge_l_is_rouge_scores_and_symmetric(a: list[str], b: list[str]) -> None:
    expected = float(_score_lcs(a, b).fmeasure) if a and b else 0.0
    assert rouge_l(a, b) == rouge_l(b, a) == expected
