"""Response text -> candidates: what was rendered comes back, nothing raises, nothing is dropped."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from alpaca_ray.generate.parse import Candidate, parse_completion
from alpaca_ray.prompts import PromptStyle, stop_sequence
from alpaca_ray.schema import Reject

# Responses as files: one is as asked for, the others have each a fault of real models (its "about"). Those named
# embedded_* were recorded from the embedded model; the others are written by hand.
RESPONSES = {path.stem: json.loads(path.read_text()) for path in Path(__file__).parent.glob("../data/responses/*.json")}
STYLES: tuple[PromptStyle, ...] = ("alpaca", "chat", "json")
REASONS = {
    "no_output", "no_instruction", "mixed_headings", "outside_tasks", "truncated", "bad_json",
}  # fmt: skip

HEADING = re.compile(r"(?:^|###)[\W_]*\d+[ \t]*[.)][\W_]*(instruction|input|output)[\W_]*:", re.I | re.M)
SEPARATOR = re.compile(r"^\s*#{3,}\s*$", re.M)
NO_INPUT = re.compile(r"\W*(no.?inputs?.*|n/a|none|not applicable)?\W*", re.I | re.S)

# Lines that look like the format but are none of its marks.
AWKWARD = (
    "### A heading", "1. First", "It was in 2020.", "20.", "in 2020. Input: two", "Input: x", "Instruction:", "a ###",
    "5. Inputs: x", "4.1. Output", "  indented", "\tx", "", "12:30", "<noinput> or not", "a: b", "#", "1)", "N/A",
    "**bold**", "* bullet", "> quoted", "```",
)  # fmt: skip
lines = st.sampled_from(AWKWARD) | st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20)


def is_plain(text: str) -> bool:
    """Neither a heading nor a separator: those mean something in this format, wherever they stand."""
    return not HEADING.search(text) and not SEPARATOR.search(text)


def without_blank_ends(text: str) -> str:
    return re.sub(r"\A([^\S\n]*\n)+", "", text).rstrip()


plain = st.lists(lines, max_size=4).map("\n".join).map(without_blank_ends).filter(is_plain)
instructions = plain.map(str.strip).filter(bool)
inputs = plain.filter(lambda text: not NO_INPUT.fullmatch(text)) | st.just("")
tasks = st.lists(st.builds(Candidate, instructions, inputs, plain), min_size=1, max_size=5)


def render(tasks: list[Candidate], first: int = 4, end: str = "\n###\n", heading: str = "{}. {}:") -> str:
    """The list as Alpaca's prompt wants it, with all headings."""
    return "".join(
        f"{heading.format(number, 'Instruction')} {task.instruction}\n"
        f"{heading.format(number, 'Input')}\n{task.input or '<noinput>'}\n"
        f"{heading.format(number, 'Output')}\n{task.output}{end}"
        for number, task in enumerate(tasks, start=first)
    )


def continuation(tasks: list[Candidate], first: int = 4, end: str = "\n###\n") -> str:
    """As a teacher goes on after `first - 1` examples: without the first heading."""
    return render(tasks, first, end).removeprefix(f"{first}. Instruction:")


def alpacas_rules(text: str, finish_reason: str, num_examples: int) -> list[Candidate]:
    """What Stanford Alpaca's parser keeps (generate_instruction.py), its filters left out."""
    kept = []
    items = re.split("###", f"{num_examples + 1}. Instruction:" + text)
    for index, item in enumerate(items):
        if index == len(items) - 1 and finish_reason == "length":
            continue
        parts = re.split(rf"{index + num_examples + 1}\.\s+(Instruction|Input|Output):", item)
        if len(parts) == 7:
            instruction, input, output = (part.strip() for part in parts[2::2])
            kept.append(Candidate(instruction, "" if input.lower() == "<noinput>" else input, output))
    return kept


def is_valid(candidate: Candidate) -> bool:
    """Alpaca's rules also let pass what has another task's heading, or none of its own text, in a field."""
    fields = (candidate.instruction, candidate.input, candidate.output)
    inner = re.compile(r"\d+\s*[.)]\W*(instruction|input|output)\W*:", re.I)
    return bool(candidate.instruction and candidate.output) and not any(map(inner.search, fields))


def candidates(parsed: list[Candidate | Reject]) -> list[Candidate]:
    return [item for item in parsed if isinstance(item, Candidate)]


def parse_file(name: str) -> list[Candidate | Reject]:
    response = RESPONSES[name]
    return parse_completion(response["text"], response["finish_reason"], response["num_examples"], response["style"])


A = Candidate("Name a river.", "", "The Rhine.")
B = Candidate("Add the numbers.", "2\n3", "5")
C = Candidate("Say when it was.", "The year 2020.", "It was in 2020.")


@pytest.mark.parametrize("name", [name for name, response in RESPONSES.items() if response["tasks"] is not None])
def test_a_response_gives_its_whole_tasks_and_no_others(name: str) -> None:
    parsed = parse_file(name)
    assert candidates(parsed) == [Candidate(**task) for task in RESPONSES[name]["tasks"]]
    assert {item.reason for item in parsed if isinstance(item, Reject)} <= REASONS


@pytest.mark.parametrize("name", [name for name, response in RESPONSES.items() if response["style"] == "alpaca"])
def test_a_response_gives_at_least_what_alpacas_rules_keep(name: str) -> None:
    response = RESPONSES[name]
    theirs = alpacas_rules(response["text"], response["finish_reason"], response["num_examples"])
    ours = {(task.instruction, task.output.strip()) for task in candidates(parse_file(name))}
    assert {(task.instruction, task.output) for task in theirs if is_valid(task)} <= ours


def test_over_all_responses_we_keep_more_than_alpacas_rules() -> None:
    ours = theirs = 0
    for name, response in RESPONSES.items():
        if response["style"] == "alpaca":
            ours += sum(map(is_valid, candidates(parse_file(name))))
            theirs += sum(map(is_valid, alpacas_rules(response["text"], response["finish_reason"], 3)))
    assert ours > 1.4 * theirs > 0


@pytest.mark.parametrize("name", ["dates_with_20", "list_up_to_20"])
def test_no_output_is_cut_where_alpacas_stop_sequences_cut_it(name: str) -> None:
    text = RESPONSES[name]["text"]
    cut = min(at for stop in ("\n20", "20.") if (at := text.find(stop)) >= 0)
    stump = alpacas_rules(text[:cut], "stop", 3)[-1].output
    whole = [task.output for task in candidates(parse_file(name))]
    assert stump not in whole
    assert any(output.startswith(stump) for output in whole)


@settings(deadline=None, max_examples=50)
@given(tasks, tasks, st.integers(0, 20))
def test_our_stop_sequence_cuts_between_tasks_only(
    first: list[Candidate], more: list[Candidate], examples: int
) -> None:
    text = continuation([*first, *more], examples + 1)
    cut = text.partition(stop_sequence(examples + len(first)))[0]
    assert parse_completion(cut, "stop", examples) == first


@settings(deadline=None, max_examples=75)
@given(tasks, st.integers(0, 20))
@example([A, B, C], 3)
@example([Candidate("Say when.", "in 2020.", "1. one\n20. twenty\nin 2020."), Candidate("Two", "", "### a\n# x")], 3)
def test_what_was_rendered_comes_back(tasks: list[Candidate], num_examples: int) -> None:
    assert parse_completion(continuation(tasks, num_examples + 1), "stop", num_examples) == tasks


@settings(deadline=None, max_examples=50)
@given(
    tasks,
    st.sampled_from(["{}. {}:", "**{}. {}:**", "**{}.** {}:", "{}. **{}**:", "### {}. {}:", "{}) {}:", "- {}. {}:"]),
    st.sampled_from(["\n###\n", "\n\n", "\n\n---\n\n", "\n\n### Task 7\n"]),
    st.sampled_from([1, 4]),
)
def test_what_a_chat_model_rendered_comes_back(tasks: list[Candidate], heading: str, end: str, first: int) -> None:
    assume(not any("```" in task.output for task in tasks))
    assume(not any(task.output.endswith(("---", "***", "###")) for task in tasks))
    text = "Here are the tasks:\n\n" + render(tasks, first, end, heading)
    assert parse_completion(text, "stop", 3, "chat") == [Reject("outside_tasks", "Here are the tasks:"), *tasks]


def as_json(tasks: list[Candidate]) -> str:
    return json.dumps({"tasks": [vars(task) for task in tasks]}, ensure_ascii=False)


@settings(deadline=None, max_examples=50)
@given(tasks, st.data())
def test_a_json_answer_gives_every_task_that_was_whole_where_it_was_cut(tasks: list[Candidate], data: Any) -> None:
    text = as_json(tasks)
    assert parse_completion(text, "stop", 3, "json") == tasks
    cut = data.draw(st.integers(1, len(text)))
    ends = [len(as_json(tasks[: number + 1])) - len("]}") for number in range(len(tasks))]
    whole = [task for task, end in zip(tasks, ends, strict=True) if end <= cut]
    parsed = parse_completion(text[:cut], "length", 3, "json")
    assert candidates(parsed) == whole
    assert [item.reason for item in parsed if isinstance(item, Reject)] in ([], ["truncated"], ["bad_json"])


@settings(deadline=None, max_examples=40)
@given(tasks)
def test_a_response_cut_for_its_length_loses_its_last_task_only(tasks: list[Candidate]) -> None:
    text = continuation(tasks)
    assert parse_completion(text, "length", 3) == tasks  # the separator shows that the last one is whole
    assume(not tasks[-1].output.endswith("###"))
    cut = text.removesuffix("\n###\n")
    parsed = parse_completion(cut, "length", 3)
    assert parsed[:-1] == tasks[:-1]
    last = parsed[-1]
    assert isinstance(last, Reject)
    assert last.reason == "truncated"
    assert tasks[-1].output.strip() in last.text


@settings(deadline=None, max_examples=100)
@given(tasks, st.data())
def test_a_fault_in_one_task_loses_no_other(tasks: list[Candidate], data: Any) -> None:
    texts = [render([task], number, end="") for number, task in enumerate(tasks, start=4)]
    broken = data.draw(st.integers(0, len(tasks) - 1))
    text = texts[broken]
    start, end = sorted(data.draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
    texts[broken] = text[:start] + data.draw(st.sampled_from(["", "x", "\n", "Output:", "20."])) + text[end:]
    assume(not re.search(r"(?m)^#+$", texts[broken]))  # that would be a separator
    parsed = iter(candidates(parse_completion("\n###\n".join([*texts, ""]).removeprefix("4. Instruction:"), "stop", 3)))
    others = tasks[:broken] + tasks[broken + 1 :]
    assert all(task in parsed for task in others)  # and in this order: the iterator goes on


# None puts "###" into the line where a response was cut: Alpaca's rules take it for a separator, we for Markdown.
EDITS = (
    ("\n###\n", "\n"), ("\n###\n", "\n\n###\n\n"), ("\n###\n5", " ### 5"), ("\n###\n6", "\n### 6"),
    ("\n###\n", "\n###\n###\n"), ("\n###\n", "\n###\nNext: "),
    ("Instruction:", "Instuction:"), ("Input:", "Inpt:"), ("Output:", "output:"),
    ("5. ", "6. "), ("5. ", "1. "), ("5. ", "**5.** "), ("6. ", "6.\n"), ("\n4. ", " 4. "), ("\n5. ", " 5. "),
    ("\n6. ", " 6. "), ("<noinput>", ""), (". Input:\n", ". Input: "), (". Output:\n", ". Output: "),
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.sampled_from([A, B, C, Candidate("Write it down.", "", "### Heading\ntext")]), min_size=1, max_size=4),
    st.lists(st.tuples(st.sampled_from(EDITS), st.integers(1, 3)), max_size=2),
    st.sampled_from(["stop", "length"]),
)
def test_alpacas_rules_keep_no_valid_task_that_we_lose(
    tasks: list[Candidate], edits: list[tuple[tuple[str, str], int]], finish_reason: str
) -> None:
    text = continuation(tasks)
    for (old, new), count in edits:
        text = text.replace(old, new, count)
    theirs = [task for task in alpacas_rules(text, finish_reason, 3) if is_valid(task)]
    ours = [task for task in candidates(parse_completion(text, finish_reason, 3)) if is_valid(task)]
    assert len(ours) >= len(theirs)


FRAGMENTS = (
    "\n", " ", "###", "\n###\n", "4. Instruction:", "5. Instruction:", "\n5. Instruction:", "\n5. Input:",
    "\n5. Output:", "\n5 . INPUT :", "\n\t6.Output:", "<noinput>", "\n6. Output", "Output:", "7.", "\r\n", "\u2028",
    "\x00", "٣. Input:", "\n**6. Instruction:**", "\nInput:", "\n### Output:", "\n```\n", "\n---\n", "\nTask 5\n", "**",
    '{"tasks": [', '{"instruction": "', '", "output": "', '"}', "]}", '"', "{", "}", "\\ud83d",
)  # fmt: skip
# "w3" and the like mark the text between, so that one sees where it went
responses = st.lists(st.sampled_from(FRAGMENTS) | st.integers(0, 99).map("w{}".format), max_size=25).map("".join)


@settings(deadline=None, max_examples=200)
@given(responses | st.text(), st.sampled_from(["stop", "length", ""]), st.integers(0, 5), st.sampled_from(STYLES))
def test_any_text_gives_candidates_and_rejects_and_nothing_is_dropped(
    text: str, reason: str, examples: int, style: PromptStyle
) -> None:
    parsed = parse_completion(text, reason, examples, style)
    assert parsed
    found = []
    for item in parsed:
        if isinstance(item, Candidate):
            assert item.instruction
            assert not item.output[-1:].isspace()
            found += [item.instruction, item.input, item.output]
        else:
            assert item.reason in REASONS
            found.append(item.text)
    "".join(found).encode()  # Parquet takes no half surrogate pairs
    if style != "json":  # a JSON object has its fields in any order
        assert re.findall(r"w\d+", "\n".join(found)) == re.findall(r"w\d+", text)
    assert sorted(re.findall(r"w\d+", "\n".join(found))) == sorted(re.findall(r"w\d+", text))


@pytest.mark.parametrize("text", ['{"a":' * 50_000, "[" * 50_000, '{"tasks": [' + '{"instruction": [' * 20_000])
def test_deep_nesting_is_no_failure(text: str) -> None:
    assert {item.reason for item in parse_completion(text, "stop", 3, "json") if isinstance(item, Reject)} <= REASONS


@pytest.mark.parametrize("end", ["\n", "\n\n", "\n### \n", "\n\n###\n\n", "###\n", " ### "])
def test_a_lost_or_odd_separator_costs_nothing(end: str) -> None:
    assert parse_completion(continuation([A, B, C], end=end), "stop", 3) == [A, B, C]


def test_headings_count_whatever_their_numbers() -> None:
    repeated = re.sub(r"(?m)^\d+\. ", "4. ", continuation([A, B, C]))
    assert parse_completion(repeated, "stop", 3) == [A, B, C]
    shifted = continuation([A, B, C], first=9)
    assert parse_completion(shifted, "stop", 3) == [A, B, C]


@pytest.mark.parametrize("headings", ["4.Input:|4.Output:", "  4. input:|\t4. OUTPUT:", "4 . Input :|4. Output :"])
def test_headings_count_however_they_are_spaced_and_capitalised(headings: str) -> None:
    first, second = headings.split("|")
    text = f" Add the numbers.\n{first}\n2\n3\n{second}\n5\n###"
    assert parse_completion(text, "stop", 3) == [B]
    assert parse_completion(text.replace("\n", "\r\n"), "stop", 3) == [
        Candidate(B.instruction, B.input.replace("\n", "\r\n"), B.output)
    ]


@pytest.mark.parametrize(
    "written",
    ["<noinput>", "<NoInput>", " <noinput> ", "<noinput>.", "", "\n", "<no input>", "noinput", "No input", "no-input",
     "N/A", "None", "<none>", "(no input)", "-", "\u2014", "[No input required]", "**None**", "Not applicable."],
)  # fmt: skip
def test_no_input_is_empty(written: str) -> None:
    assert parse_completion(f" Name a river.\n4. Input: {written}\n4. Output:\nThe Rhine.", "stop", 3) == [A]
    assert parse_completion(as_json([Candidate(A.instruction, written, A.output)]), "stop", 3, "json") == [A]


@pytest.mark.parametrize("written", ["<noinput> stands here", "()", "[]", "0", "-5", "none of them", "...", "''"])
def test_an_input_that_looks_like_none_is_one(written: str) -> None:
    text = f" Explain the mark.\n4. Input: {written}\n4. Output: It says so."
    assert parse_completion(text, "stop", 3) == [Candidate("Explain the mark.", written, "It says so.")]


def test_a_missing_input_heading_means_no_input() -> None:
    text = " Name a river.\n4. Output: The Rhine.\n###\n" + render([B], 5)
    assert parse_completion(text, "stop", 3) == [A, B]


def test_the_first_lines_indentation_stays_where_a_field_begins_on_a_line_of_its_own() -> None:
    text = " Go on.\n4. Input:\n\n  \tx = 1\n\n4. Output:   \n    y = 2\n    z = 3  \n\n###\n"
    assert parse_completion(text, "stop", 3) == [Candidate("Go on.", "  \tx = 1", "    y = 2\n    z = 3")]
    assert parse_completion(" Go on.\n4. Output:   y = 2", "stop", 3) == [Candidate("Go on.", "", "y = 2")]


def test_a_numbered_list_with_the_formats_own_words_belongs_to_the_output() -> None:
    listed = Candidate("Name the three steps.", "", "These:\n1. Input: read it\n2. Work\n3. Output: write it")
    assert parse_completion(continuation([A, B, listed]), "stop", 3) == [A, B, listed]


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
        (" x\n4. Output:\na\n5. Input:\nb\n5. Output:\nc", "mixed_headings"),
    ],
)
def test_what_is_no_task_is_a_reject_and_the_next_one_is_kept(text: str, reason: str) -> None:
    (alone,) = parse_completion(text, "stop", 3)
    assert alone == Reject(reason, "4. Instruction:" + text)
    followed = parse_completion(f"{text}\n###\n{render([B], 5)}", "stop", 3)
    assert followed == [alone, B]


@pytest.mark.parametrize("between", ["\n", " ", "", "\n\n"])
def test_a_doubled_instruction_heading_costs_nothing(between: str) -> None:
    assert parse_completion(between + render([A, B]), "stop", 3) == [A, B]


def test_an_empty_output_is_a_candidate_for_the_filters() -> None:
    assert parse_completion(" x\n4. Output:\n###", "stop", 3) == [Candidate("x", "", "")]


def test_json_values_become_text() -> None:
    text = '{"tasks": [{"instruction": "x", "input": null, "output": 42}, {"instruction": "y", "output": ["a", 1]}]}'
    assert parse_completion(text, "stop", 3, "json") == [Candidate("x", "", "42"), Candidate("y", "", '["a", 1]')]
    (half,) = parse_completion(r'{"tasks": [{"instruction": "x", "output": "\ud83d"}]}', "stop", 3, "json")
    assert half == Candidate("x", "", "\ufffd")


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ('{"instruction": "x"}', "no_output"),
        ('{"instruction": " ", "output": "y"}', "no_instruction"),
        ("7", "no_instruction"),
    ],
)
def test_a_json_task_without_a_field_is_a_reject(task: str, reason: str) -> None:
    parsed = parse_completion(f'{{"tasks": [{task}, {json.dumps(vars(B))}]}}', "stop", 3, "json")
    assert parsed == [Reject(reason, task), B]


@pytest.mark.parametrize(
    "text", ["", "{}", '{"tasks": []}', "null", "Sorry, no.", "<html></html>", '{"error": {"code": 1}}']
)
def test_an_answer_without_tasks_leaves_a_trace(text: str) -> None:
    for style in STYLES:
        (reject,) = parse_completion(text, "stop", 3, style)
        assert isinstance(reject, Reject)
        assert text in reject.text
        assert (reject.reason == "bad_json") == (style == "json")
