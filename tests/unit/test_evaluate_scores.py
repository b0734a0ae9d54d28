"""Scores and the page: uncertainty over examples, and nothing that a model wrote becomes HTML."""

import random
import statistics
from html.parser import HTMLParser
from typing import Any

import pytest

from alpaca_ray.config import UserError
from alpaca_ray.evaluate.report import render
from alpaca_ray.evaluate.scores import AnswerLoss, Response, compare_losses, loss_report, response_scores


def test_a_token_counts_as_much_as_another_whatever_answer_it_is_in() -> None:
    report = loss_report([AnswerLoss(10.0, 10), None, AnswerLoss(2.0, 1)])
    assert report.loss == pytest.approx(12 / 11)
    assert (report.target_tokens, report.examples, report.skipped_too_long) == (11, 2, 1)


def test_answers_of_equal_length_give_the_textbook_standard_error() -> None:
    before, after = [2.0, 3.0, 2.5, 4.0], [1.5, 2.9, 2.6, 3.0]
    compared = compare_losses([AnswerLoss(10 * x, 10) for x in before], [AnswerLoss(10 * x, 10) for x in after])
    differences = [a - b for b, a in zip(before, after, strict=True)]
    assert compared["difference"] == pytest.approx(statistics.mean(differences))
    assert compared["difference_standard_error"] == pytest.approx(statistics.stdev(differences) / 2)


def test_the_standard_error_is_the_spread_over_new_samples_of_examples() -> None:
    rng = random.Random(0)

    def sample() -> dict[str, Any]:
        tokens = [rng.randint(5, 60) for _ in range(40)]
        before = [AnswerLoss(2.5 * t, t) for t in tokens]
        after = [AnswerLoss((2.5 + rng.gauss(-0.2, 0.3)) * t, t) for t in tokens]
        return compare_losses(before, after)

    samples = [sample() for _ in range(600)]
    spread = statistics.stdev(s["difference"] for s in samples)
    assert statistics.mean(s["difference_standard_error"] for s in samples) == pytest.approx(spread, rel=0.1)


def test_it_says_when_there_are_few_examples_or_none() -> None:
    loss = AnswerLoss(3.0, 2)
    assert compare_losses([None], [None])["difference"] is None
    assert "no example" in compare_losses([None], [None])["note"]
    assert compare_losses([loss], [loss])["difference_standard_error"] is None
    assert "from 8 examples only" in compare_losses([loss] * 8, [loss] * 8)["note"]
    assert compare_losses([loss] * 30, [loss] * 30)["note"] == ""


def test_losses_over_different_tokens_are_not_compared() -> None:
    with pytest.raises(UserError, match="tokenizers"):
        compare_losses([AnswerLoss(3.0, 2)], [AnswerLoss(3.0, 3)])


def test_response_scores() -> None:
    scores = response_scores([Response("abcd", True, 3), Response("", False, 0)])
    assert scores == {"responses": 2, "share_cut": 0.5, "mean_tokens": 1.5, "mean_characters": 2.0}


class Tags(HTMLParser):
    """Which elements a page has, with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_escapes_everything_and_needs_nothing_from_elsewhere() -> None:
    evil = "<script>alert('{}')</script><img src=x onerror=alert(1)>\" onmouseover=\"x"
    names = ("id", "instruction", "input", "reference", "base", "trained")
    row: dict[str, Any] = {name: evil.format(name) for name in names}
    row |= {"base_cut": True, "trained_cut": False, "base_num_tokens": 9, "trained_num_tokens": 9}
    loss = compare_losses([AnswerLoss(3.0, 2), None], [AnswerLoss(2.0, 2), None])
    scores = {
        "models": {"base": evil, "trained": evil},
        "losses": {"heldout": loss, "reference": compare_losses([None], [None])},
        "responses": {m: response_scores([Response(evil, True, 9)]) for m in ("base", "trained")},
    }
    page = Tags(render(evil, scores, [row]))
    assert not page.tags & {"script", "img", "link", "iframe"}
    assert not page.attributes & {"src", "href", "onerror", "onmouseover"}
    assert all(evil.format(name) in page.text for name in names[1:])
    assert "1.5000" in page.text
    assert "-0.5000" in page.text
    assert "from 1 example only" in page.text
