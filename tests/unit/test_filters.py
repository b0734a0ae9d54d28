"""Alpaca's filters, each at its boundary."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca_ray.generate.filters import FILTERS, reject_reason
from alpaca_ray.generate.parse import Candidate

# generate_instruction.py of Stanford Alpaca: its block list, which it matches as whole words in any case
ALPACAS_BLOCK_LIST = (
    "image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot",
    "go to", "video", "audio", "music", "flowchart", "diagram",
)  # fmt: skip


def reason(instruction: str, output: str = "Fine.") -> str | None:
    return reject_reason(Candidate(instruction, "", output))


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("Name three long rivers", None),
        ("Name three rivers", "too_short"),
        ("  Name   three\n\n rivers ", "too_short"),
        ("Name", "too_short"),
        ("", "too_short"),
        (" ".join(["word"] * 150), None),
        (" ".join(["word"] * 151), "too_long"),
        ("Write a program that sorts words", "write_a_program"),
        ("Write a programme for the concert", "write_a_program"),
        ("Write a poem about a program", None),
        ("Please Write a program for me", None),
        ("'Tis the season: explain it", "starts_with_punctuation"),
        ("(Briefly) explain how rain forms", "starts_with_punctuation"),
        ("$5 are how many cents", "starts_with_punctuation"),
        ("5 dollars are how many cents", None),
        ("Écrivez une phrase en français", "starts_with_non_ascii"),
        ("“Quote” something that is wise", "starts_with_non_ascii"),
        ("Explain the word “café” briefly", None),
    ],
)
def test_an_instruction_and_its_reason(instruction: str, expected: str | None) -> None:
    assert reason(instruction) == expected


@pytest.mark.parametrize("word", ALPACAS_BLOCK_LIST)
def test_a_blocked_word_is_rejected_as_a_whole_word_in_any_case(word: str) -> None:
    for text in (word, word.upper(), word.title()):
        for sentence in (f"Explain how {text} works", f"Explain this thing: {text}.", f"Explain ({text}) to me"):
            assert reason(sentence) == "blocked_word", sentence
    for sentence in (f"Explain how {word}type works", f"Explain how un{word} works", f"Explain {word}_1 to me"):
        assert reason(sentence) is None, sentence


@pytest.mark.parametrize(
    "word", ["filetype", "profile", "graphical", "paragraph", "mapped", "drawing", "musical", "plots"]
)
def test_a_word_that_only_holds_a_blocked_one_passes(word: str) -> None:
    assert reason(f"Explain the word {word} briefly") is None


def test_only_the_instruction_is_searched_for_blocked_words() -> None:
    candidate = Candidate("Summarise the following short text", "A file of music.", "An image.")
    assert reject_reason(candidate) is None


def test_an_answer_must_not_be_empty() -> None:
    assert reason("Name three long rivers", output="") == "empty_output"
    assert reason("Name three long rivers", output="0") is None


def test_the_first_filter_that_applies_names_the_reason() -> None:
    worst = '"File '
    assert reason(worst, output="") == "empty_output"
    assert reason(worst) == "too_short"
    assert reason(worst + "word " * 151) == "too_long"
    assert reason(worst + "word " * 9) == "blocked_word"
    assert reason('"Explain ' + "word " * 9) == "starts_with_punctuation"
    assert list(FILTERS).index("write_a_program") > list(FILTERS).index("blocked_word")


@settings(deadline=None, max_examples=100)
@given(st.builds(Candidate, st.text(), st.text(), st.text()))
def test_any_candidate_has_a_known_reason_or_none(candidate: Candidate) -> None:
    assert reject_reason(candidate) in {None, *FILTERS}
