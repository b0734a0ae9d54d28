"""Novelty equals a plain loop over rouge_score's own function, to the last bit, in every form."""

import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import _score_lcs
from rouge_score.tokenize import tokenize as rouge_score_tokenize

from alpaca_ray.generate.novelty import Novelty, NoveltyFilter, rouge_l
from alpaca_ray.generate.rouge import NeededLcs
from alpaca_ray.generate.tokens import Documents, Vocabulary, as_code_points, tokenize

words = st.sampled_from(["a", "b", "c", "The", "the", "of", "of,", "x1", "Ü", "é", "-", "K", "日本"])
texts = st.lists(words, max_size=11).map(" ".join)
many = st.lists(texts, max_size=8)
thresholds = st.sampled_from([0.7, 0.5, 2 / 3, 1.0]) | st.floats(0, 1, exclude_min=True)
# The pool's size from which code is compiled: always, in the middle of a test, never.
forms = st.sampled_from([0, 5, sys.maxsize])


def f_measure(a: str, b: str) -> float:
    """As `rouge_score.RougeScorer(["rougeL"])` without a stemmer has it."""
    first, second = rouge_score_tokenize(a, None), rouge_score_tokenize(b, None)
    return float(_score_lcs(first, second).fmeasure) if first and second else 0.0


def greedy(seeds: Sequence[str], offers: Sequence[str], threshold: float = 0.7) -> list[Novelty]:
    pool, decisions = list(seeds), []
    for text in offers:
        scores = [f_measure(text, other) for other in pool]
        highest = max(scores, default=0.0)
        if highest > threshold:
            decisions.append(Novelty(False, highest, pool[scores.index(highest)]))
        else:
            decisions.append(Novelty(True, None, ""))
            pool.append(text)
    return decisions


@settings(deadline=None, max_examples=150)
@given(many, many, thresholds, forms)
@example(["a b c d e f g h i j"], ["a b c d e f g x y z"], 0.7, 0)
def test_it_decides_as_a_loop_over_rouge_score(
    seeds: list[str], offers: list[str], threshold: float, form: int
) -> None:
    assert NoveltyFilter(seeds, threshold, compile_at=form).offer_many(offers) == greedy(seeds, offers, threshold)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.lists(words | st.integers(0, 40).map(str), min_size=30, max_size=220).map(" ".join), max_size=5), forms
)
def test_long_texts_are_no_different(offers: list[str], form: int) -> None:
    assert NoveltyFilter([], 0.5, compile_at=form).offer_many(offers) == greedy([], offers, 0.5)


def tied(length: int, m: int, n: int) -> tuple[str, str]:
    """Two texts of m and n words whose longest common subsequence has `length` words."""
    fresh = (f"w{i}" for i in count())
    shared = [next(fresh) for _ in range(length)]
    return (
        " ".join([*shared, *(next(fresh) for _ in range(m - length))]),
        " ".join([*(next(fresh) for _ in range(n - length)), *shared]),
    )


@pytest.mark.parametrize("form", [0, sys.maxsize])
def test_exact_ties_fall_on_the_side_where_rouge_scores_floats_put_them(form: int) -> None:
    ties = [tied(length, m, n) for m in range(1, 65) for n in range(1, 65) for length in range(1, min(m, n) + 1)
            if 20 * length == 7 * (m + n)]  # fmt: skip
    kept = [NoveltyFilter([a], compile_at=form).offer(b).kept for a, b in ties]
    assert kept == [f_measure(a, b) <= 0.7 for a, b in ties]
    assert len(set(kept)) == 2  # on paper they are all equal


@pytest.mark.parametrize("threshold", [0.7, 0.5, 2 / 3, 1.0, 0.01, 0.0])
def test_the_needed_length_is_the_first_above_the_threshold(threshold: float) -> None:
    needed = NeededLcs(threshold)
    for m in (1, 2, 7, 13, 64, 65):
        row = needed.row(m, 140)
        for n in range(1, 141):
            above = [
                lcs for lcs in range(1, min(m, n) + 1) if 2 * (lcs / m) * (lcs / n) / (lcs / m + lcs / n) > threshold
            ]
            reached = n < len(row) and row[n] <= n
            assert (row[n] if reached else None) == (above[0] if above else None)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_outside_the_scores_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        NoveltyFilter([], threshold)


@settings(deadline=None, max_examples=40)
@given(many, many, thresholds, forms)
def test_offering_many_is_offering_each(seeds: list[str], offers: list[str], threshold: float, form: int) -> None:
    one_by_one, at_once = (NoveltyFilter(seeds, threshold, compile_at=form) for _ in range(2))
    assert at_once.offer_many(offers) == [one_by_one.offer(text) for text in offers]
    assert at_once.offer_many(offers) == [one_by_one.offer(text) for text in offers]  # nor does the next call differ


@settings(deadline=None, max_examples=40)
@given(many, many, many, forms)
def test_a_resumed_filter_decides_as_the_first_would_have(
    seeds: list[str], before: list[str], after: list[str], form: int
) -> None:
    first, resumed = (NoveltyFilter(seeds, compile_at=form) for _ in range(2))
    answers = first.offer_many(before)
    resumed.add_many([text for text, answer in zip(before, answers, strict=True) if answer.kept])
    assert resumed.offer_many(after) == first.offer_many(after)


@pytest.fixture(scope="module")
def scanned() -> tuple[list[str], list[Novelty]]:
    """Offers, one in three of them a near-duplicate, and what the form for small pools decides."""
    offers = [f"{k // 3} {k // 3 * 7919} {k if k % 3 else 'and'} {k // 1000} of the {k % 2}" for k in range(6000)]
    return offers, NoveltyFilter([], compile_at=sys.maxsize).offer_many(offers)


@pytest.mark.parametrize("form", [0, 3000])
def test_a_pool_that_grows_past_every_merge_decides_the_same(
    form: int, scanned: tuple[list[str], list[Novelty]]
) -> None:
    offers, expected = scanned
    novelty = NoveltyFilter([], compile_at=form)
    answers = [answer for k in range(0, len(offers), 300) for answer in novelty.offer_many(offers[k : k + 300])]
    assert answers == expected
    assert 1000 < sum(answer.kept for answer in answers) < 5000
    again = novelty.offer_many(offers)
    assert not any(answer.kept for answer in again)


def test_the_form_for_small_pools_is_right_in_large_ones_too(scanned: tuple[list[str], list[Novelty]]) -> None:
    offers, answers = scanned
    places = {text: place for place, text in enumerate(offers)}
    for place, answer in enumerate(answers):
        if not answer.kept:
            assert places[answer.nearest] < place
            assert answer.rouge_l == f_measure(offers[place], answer.nearest) > 0.7


@settings(deadline=None, max_examples=40)
@given(many, many, texts, forms)
def test_what_was_kept_is_a_duplicate_the_next_time(seeds: list[str], offers: list[str], text: str, form: int) -> None:
    novelty = NoveltyFilter(seeds, compile_at=form)
    novelty.offer_many(offers)
    novelty.offer(text)
    again = novelty.offer(text)
    has_tokens = bool(rouge_score_tokenize(text, None))
    assert again.kept == (not has_tokens)
    assert not has_tokens or (again.rouge_l or 0) > 0.7


@settings(deadline=None, max_examples=40)
@given(many, many, forms)
def test_no_two_kept_instructions_are_similar(seeds: list[str], offers: list[str], form: int) -> None:
    answers = NoveltyFilter(seeds, compile_at=form).offer_many(offers)
    kept = [text for text, answer in zip(offers, answers, strict=True) if answer.kept]
    for i, text in enumerate(kept):
        assert all(f_measure(text, other) <= 0.7 for other in [*seeds, *kept[:i]])


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


@pytest.mark.parametrize("form", [0, sys.maxsize])
def test_the_first_of_equally_similar_ones_is_named(form: int) -> None:
    novelty = NoveltyFilter(["a b c d e x", "a b c d e y"], compile_at=form)
    assert novelty.offer("a b c d e z").nearest == "a b c d e x"
    closer = NoveltyFilter(["a b c d e f g x", "a b c d e f g h i", "A B C D E F G H I"], compile_at=form)
    assert closer.offer("a b c d e f g h i!") == Novelty(False, 1.0, "a b c d e f g h i")


@pytest.mark.parametrize("form", [0, sys.maxsize])
@pytest.mark.parametrize("text", ["", "   ", "?!", "日本語", "…"])
def test_a_text_without_tokens_is_always_kept(text: str, form: int) -> None:
    novelty = NoveltyFilter(["Name a river.", text], compile_at=form)
    assert novelty.offer_many([text, text]) == [Novelty(True, None, "")] * 2
    assert not novelty.offer("name a RIVER").kept


def test_case_and_punctuation_do_not_make_an_instruction_new() -> None:
    novelty = NoveltyFilter(["Name three rivers of Europe."])
    assert novelty.offer("NAME three (rivers) of... europe!") == Novelty(False, 1.0, "Name three rivers of Europe.")


@settings(deadline=None, max_examples=40)
@given(st.lists(words, max_size=70), st.lists(words, max_size=70))
def test_rouge_l_is_rouge_scores_and_symmetric(a: list[str], b: list[str]) -> None:
    expected = float(_score_lcs(a, b).fmeasure) if a and b else 0.0
    assert rouge_l(a, b) == rouge_l(b, a) == expected


@settings(max_examples=300)
@given(st.text() | st.text("aZ09 -_\u212a\u0130\u0131\u017f\u00df\u0660\uff21\u1e9e\u03a3\ud800\n\t\x00\u2028"))
@example("\u212aelvin \u0130stanbul 3½ \u0661 ﬁ \ud800 a\x00b")
def test_the_tokens_are_rouge_scores(text: str) -> None:
    assert tokenize(text) == rouge_score_tokenize(text, None)


def test_a_word_past_the_last_code_point_is_still_itself() -> None:
    vocabulary = Vocabulary()
    few, many_more = vocabulary.encode(["a b c"]), vocabulary.encode(["c b d"])
    shifted = Documents(many_more.ids + (many_more.ids > 2) * 2_000_000, many_more.starts)
    a, b = *as_code_points(few), *as_code_points(shifted)
    assert isinstance(b, list)
    assert rouge_l(a, b) == f_measure("a b c", "c b d")  # type: ignore[arg-type]


def test_small_pools_are_filtered_without_numba(tmp_path: Path) -> None:
    """Nor is it missed in large ones, but for the time, and a warning."""
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 2.2 or less')")
    program = (
        "import sys; from alpaca_ray.generate.novelty import NoveltyFilter as F\n"
        "small = F([]).offer_many(['a b', 'a b', 'c']); assert 'numba' not in sys.modules\n"
        "assert F([], compile_at=2).offer_many(['a b', 'a b', 'c']) == small\n"
        "from alpaca_ray.generate.similarity import similarity_report as r\n"
        "assert r(['a b', 'a c'], [], compile_at=0) == r(['a b', 'a c'], [])"
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.count("numba cannot be loaded (Numba needs NumPy 2.2 or less)") == 2


def test_compiled_code_that_cannot_be_kept_still_runs(tmp_path: Path) -> None:
    (tmp_path / "__pycache__").write_text("not a directory")
    (tmp_path / "once.py").write_text(
        "from alpaca_ray.generate.compiled import compiled, keep_on_disk\n"
        "@compiled\ndef double(x): return 2 * x\n"
        "keep_on_disk(double); print(double(21))"
    )
    nowhere = {"HOME": str(tmp_path / "once.py"), "XDG_CACHE_HOME": str(tmp_path / "once.py")}
    env = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"} | nowhere
    done = subprocess.run([sys.executable, tmp_path / "once.py"], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "42\n"
