"""Response text -> candidates: what was rendered comes back, nothing raises, and nothing is dropped."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from alpaca_ray.generate.parse import Candidate, parse_completion
from alpaca_ray.schema import Reject

HEADING = re.compile(r"^[ \t]*\d+[ \t]*\.[ \t]*(instruction|input|output)[ \t]*:", re.IGNORECASE | re.MULTILINE)

# Lines that look like the format but are none of its headings.
AWKWARD = (
    "###", "### A heading", "1. First", "It was in 2020.", "20.", "in 2020. Input: two", "Input: x", "Instruction:",
    "5. Inputs: x", "4.1. Output", "  indented", "", "12:30", "<noinput> or not", "a: b", "#", "1)", "N/A",
)  # fmt: skip
lines = st.sampled_from(AWKWARD) | st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20)


def is_plain(text: str) -> bool:
    """Neither a heading nor the mark for no input: those mean something in this format, wherever they stand."""
    return not HEADING.search(text) and text.lower().rstrip(".") != "<noinput>"


plain = st.lists(lines, max_size=4).map(lambda block: "\n".join(block).strip()).filter(is_plain)
tasks = st.lists(st.builds(Candidate, plain.filter(bool), plain, plain), min_size=1, max_size=5)


def render(tasks: list[Candidate], first: int = 4, end: str = "\n###\n") -> str:
    """As a teacher goes on after `first - 1` examples: without the first heading."""
    items = [
        f"{number}. Instruction: {task.instruction}\n"
        f"{number}. Input:\n{task.input or '<noinput>'}\n"
        f"{number}. Output:\n{task.output}{end}"
        for number, task in enumerate(tasks, start=first)
    ]
    return "".join(items).removeprefix(f"{first}. Instruction:")


A = Candidate("Name a river.", "", "The Rhine.")
B = Candidate("Add the numbers.", "2\n3", "5")
C = Candidate("Say when it was.", "The year 2020.", "It was in 2020.")


@settings(deadline=None, max_examples=150)
@given(tasks, st.integers(0, 20))
@example([A, B, C], 3)
@example([Candidate("Say when.", "in 2020.", "1. one\n20. twenty\nin 2020."), Candidate("Two", "", "###\n# x\n###")], 3)
def test_what_was_rendered_comes_back(tasks: list[Candidate], num_examples: int) -> None:
    assert parse_completion(render(tasks, num_examples + 1), "stop", num_examples) == tasks


@settings(deadline=None, max_examples=50)
@given(tasks)
def test_a_response_cut_for_its_length_loses_its_last_task_only(tasks: list[Candidate]) -> None:
    parsed = parse_completion(render(tasks), "length", 3)
    assert parsed[:-1] == tasks[:-1]
    last = parsed[-1]
    assert isinstance(last, Reject)
    assert last.reason == "truncated"
    assert tasks[-1].output in last.text


FRAGMENTS = (
    "\n", " ", "###", "\n###\n", "4. Instruction:", "5. Instruction:", "\n5. Instruction:", "\n5. Input:",
    "\n5. Output:", "\n5 . INPUT :", "\n\t6.Output:", "<noinput>", "\n6. Output", "Output:", "7.", "\r\n", "\u2028",
    "\x00", "٣. Input:",
)  # fmt: skip
# "w3" and the like mark the text between, so that one sees where it went
responses = st.lists(st.sampled_from(FRAGMENTS) | st.integers(0, 99).map("w{}".format), max_size=25).map("".join)


@settings(deadline=None, max_examples=150)
@given(responses | st.text(), st.sampled_from(["stop", "length", "content_filter", ""]), st.integers(0, 5))
def test_any_text_gives_candidates_and_rejects_and_nothing_is_dropped(text: str, reason: str, examples: int) -> None:
    parsed = parse_completion(text, reason, examples)
    assert parsed
    found = []
    for item in parsed:
        assert isinstance(item, Candidate | Reject)
        if isinstance(item, Candidate):
            assert item.instruction
            assert not any(HEADING.match(value) for value in (item.instruction, item.input, item.output))
            found += [item.instruction, item.input, item.output]
        else:
            assert item.text
            assert item.reason in {"no_output", "no_instruction", "mixed_headings", "truncated"}
            found.append(item.text)
    assert re.findall(r"w\d+", "\n".join(found)) == re.findall(r"w\d+", text)


@pytest.mark.parametrize("end", ["\n", "\n\n", "\n### \n", "\n\n###\n\n", "###\n"])
def test_a_lost_or_odd_separator_costs_nothing(end: str) -> None:
    assert parse_completion(render([A, B, C], end=end), "stop", 3) == [A, B, C]


def test_headings_count_whatever_their_numbers() -> None:
    repeated = re.sub(r"(?m)^\d+\. ", "4. ", render([A, B, C]))
    assert parse_completion(repeated, "stop", 3) == [A, B, C]
    shifted = render([A, B, C], first=9).removeprefix("9. Instruction:")
    assert parse_completion(shifted, "stop", 3) == [A, B, C]


@pytest.mark.parametrize("headings", ["4.Input:|4.Output:", "  4. input:|\t4. OUTPUT:", "4 . Input :|4. Output :"])
def test_headings_count_however_they_are_spaced_and_capitalised(headings: str) -> None:
    first, second = headings.split("|")
    text = f" Add the numbers.\n{first}\n2\n3\n{second}\n5\n###"
    assert parse_completion(text, "stop", 3) == [B]
    assert parse_completion(text.replace("\n", "\r\n"), "stop", 3) == [
        Candidate(B.instruction, B.input.replace("\n", "\r\n"), B.output)
    ]


@pytest.mark.parametrize("written", ["<noinput>", "<NoInput>", " <noinput> ", "<noinput>.", "", "\n"])
def test_no_input_is_empty(written: str) -> None:
    assert parse_completion(f" Name a river.\n4. Input: {written}\n4. Output:\nThe Rhine.", "stop", 3) == [A]


def test_an_input_that_speaks_of_no_input_is_one() -> None:
    text = " Explain the mark.\n4. Input: <noinput> stands here\n4. Output: It says so."
    assert parse_completion(text, "stop", 3) == [Candidate("Explain the mark.", "<noinput> stands here", "It says so.")]


def test_a_missing_input_heading_means_no_input() -> None:
    assert parse_completion(
        " Name a river.\n4. Output: The Rhine.\n###\n" + "5. Instruction:" + render([B], 5), "stop", 3
    ) == [A, B]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no_output"),
        (" Name a river.", "no_output"),
        (" Name a river.\n4. Input:\n<noinput>", "no_output"),
        ("\n4. Input:\nx\n4. Output:\ny", "no_instruction"),
        (" x\n4. Input:\na\n4. Input:\nb\n4. Output:\ny", "mixed_headings"),
        (" x\n4. Output:\na\n4. Output:\nb", "mixed_headings"),
        (" x\n4. Output:\na\n4. Input:\nb", "mixed_headings"),
    ],
)
def test_what_is_no_task_is_a_reject_and_the_next_one_is_kept(text: str, reason: str) -> None:
    (alone,) = parse_completion(text, "stop", 3)
    assert alone == Reject(reason, "4. Instruction:" + text)
    followed = parse_completion(f"{text}\n###\n5. Instruction:{render([B], 5)}", "stop", 3)
    assert followed == [alone, B]


def test_a_doubled_instruction_heading_costs_one_reject_at_most() -> None:
    on_the_next_line = parse_completion("\n4. Instruction:" + render([A, B]), "stop", 3)
    assert on_the_next_line == [Reject("no_output", "4. Instruction:"), A, B]
    first, second = parse_completion(" 4. Instruction:" + render([A, B]), "stop", 3)
    assert first == A or isinstance(first, Reject)  # but no task whose text begins with a heading
    assert second == B


def test_an_empty_output_is_a_candidate_for_the_filters() -> None:
    assert parse_completion(" x\n4. Output:\n###", "stop", 3) == [Candidate("x", "", "")]
