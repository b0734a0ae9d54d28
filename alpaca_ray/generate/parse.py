"""Response text -> candidates. What cannot be one is a Reject with its reason; no text is dropped.

Headings decide, not separators or numbers: a lost "###" or a list that begins at 1 again costs nothing.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from alpaca_ray.prompts import SEPARATOR, PromptStyle, first_number
from alpaca_ray.schema import Reject

# "7. Input:" at the start of a line or right after a separator, and what chat models make of it: "**7. Input:**",
# "### 7. Input:", "7) **Input**:", "- Input:". Without a number it counts only where nothing better is found.
_HEADING = re.compile(
    r"""(?: ^[ \t]* (?:\#{1,6}[ \t]*)? | \#\#\#[ \t]* ) (?: [-*>\u2022][ \t]+ )?
    (?P<mark>[*_]{1,3})?
    (?: (?P<number>\d{1,6}) [ \t]* [.)] [*_]{0,3} [ \t]* (?P<inner_mark>[*_]{1,3})? )?
    (?P<name>Instruction|Input|Output) [*_]{0,3} [ \t]* :
    (?(mark) [*_]{0,3} | (?(inner_mark) [*_]{0,3} ) )""",
    re.VERBOSE | re.MULTILINE | re.IGNORECASE,
)
# The same within a line, as Alpaca finds it: trusted only with the task's own number, or after a separator.
_INLINE_HEADING = re.compile(r"(?<!\w)(?P<number>\d{1,6})\.\s+(?P<name>Instruction|Input|Output):")
_SEPARATOR_LINE = re.compile(r"^[ \t]*#{3,}[ \t\r]*$", re.MULTILINE)

_FORMS = (["instruction", "input", "output"], ["instruction", "output"])

# Each of these stands for no input in answers that were asked for "<noinput>".
_NO_INPUT = re.compile(
    r"""[<(\["'`*_]* \s* (?: no[ _-]?inputs?(?:[ ](?:is[ ])?(?:required|needed|necessary|provided|given))?
    | n/a | none | not[ ]applicable ) \s* [>)\]"'`*_]* \.? | [-\u2013\u2014]{1,3}""",
    re.VERBOSE | re.IGNORECASE,
)

_FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)
# What chat models put between tasks, at the end of what stands before: a rule, a title.
_CHAT_TAIL = re.compile(
    r"(?:^|\n)[ \t]*(?:-{3,}|\*{3,}|[#*_ ]*task[ \t]*#?\d*[ \t]*[:.]?[*_]*)[ \t\r]*\Z", re.IGNORECASE
)
# JSON around tasks that says nothing.
_JSON_GLUE = re.compile(r'(?:[\s\[\]{},`]|json\b|"tasks"\s*:)*')

_CUT = ("length", "content_filter")  # the answer may end anywhere


@dataclass(frozen=True)
class Candidate:
    """A task as the teacher wrote it; `input` is "" where it wrote <noinput>."""

    instruction: str
    input: str
    output: str


def parse_completion(
    text: str, finish_reason: str, num_examples: int, style: PromptStyle = "alpaca"
) -> list[Candidate | Reject]:
    """Split a response into its tasks, in order; at least one item, whatever the text.

    `text` answers `prompts.generation_prompt` with `num_examples` examples in the same style; in style "alpaca" it
    goes on inside the first new instruction. The last task of an answer that ended for its length is a Reject
    ("truncated"), unless a separator or a closing brace shows that it is whole.
    """
    if style == "json":
        return _parse_json(text, finish_reason)
    whole = text
    if style == "alpaca" and not _opens_with_number(text, "instruction"):
        whole = f"{first_number(num_examples)}. Instruction:{text}"
    stretches = list(_stretches(whole, style)) or [whole]
    parsed = [_parse_stretch(stretch, style) for stretch in stretches]
    if finish_reason in _CUT and not whole.rstrip().endswith(SEPARATOR):
        parsed[-1] = Reject("truncated", stretches[-1])
    return parsed


def _opens_with_number(text: str, *names: str) -> bool:
    """Whether the text begins with a numbered heading, one of `names` if any are given."""
    heading = _HEADING.match(text.lstrip())
    return heading is not None and heading["number"] is not None and (not names or _name(heading) in names)


def _stretches(text: str, style: PromptStyle) -> Iterator[str]:
    """Tasks, each from its instruction's heading on, and what stands before, between and behind them."""
    headings = [heading for heading in _HEADING.finditer(text) if _name(heading) == "instruction"]
    numbered = [heading for heading in headings if heading["number"] is not None]
    starts = [heading.start() for heading in numbered or headings]
    for start, end in zip([0, *starts], [*starts, len(text)], strict=True):
        stretch = text[start:end] if style == "alpaca" else _without_chat_tail(text[start:end])
        yield from (piece for piece in _split_at_separator(stretch) if _says_something(piece))


def _split_at_separator(stretch: str) -> Iterator[str]:
    """A task that has an output ends at the first separator. What follows may hold a task within a line."""
    separator = _separator(stretch, _output_start(stretch))
    if separator is None:
        yield _without_separator(stretch.strip())
        return
    yield stretch[: separator[0]].strip()
    rest = stretch[separator[1] :].strip()
    inline = next((h for h in _INLINE_HEADING.finditer(rest) if _name(h) == "instruction"), None)
    yield rest[: inline.start()] if inline else rest
    if inline:
        yield from _split_at_separator(rest[inline.start() :])


def _separator(stretch: str, output_start: int) -> tuple[int, int] | None:
    """Start and end of the separator after an output: on a line of its own, or within one where a task follows."""
    line = _SEPARATOR_LINE.search(stretch, output_start)
    end = line.start() if line else len(stretch)
    headings = _headings(stretch)
    following = _following(headings[0]) if headings else None
    for heading in [*headings, *_INLINE_HEADING.finditer(stretch)]:
        if following and heading["number"] == following and output_start <= heading.start() < end:
            within = stretch.rfind(SEPARATOR, output_start, heading.start())
            if within >= 0:
                return within, within + len(SEPARATOR)
    return line.span() if line else None


def _output_start(stretch: str) -> int:
    """Where the task's output begins, or the end of the text."""
    headings = _headings(stretch)
    numbered = [heading for heading in headings if heading["number"] is not None]
    inline = list(_INLINE_HEADING.finditer(stretch))
    own = [heading for heading in inline if headings and heading["number"] == headings[0]["number"]]
    for found in (numbered + own, inline, headings):
        if ends := [heading.end() for heading in found if _name(heading) == "output"]:
            return min(ends)
    return len(stretch)


def _parse_stretch(stretch: str, style: PromptStyle) -> Candidate | Reject:
    headings = _headings(stretch)
    names = [_name(heading) for heading in headings]
    if not headings or headings[0].start() > 0 or names[0] != "instruction":
        return Reject("no_instruction" if "output" in names else "outside_tasks", stretch)
    for reading in _readings(stretch, headings):
        if [_name(heading) for heading in reading] in _FORMS:
            return _candidate(stretch, reading, style)
    return Reject("mixed_headings" if "output" in names else "no_output", stretch)


def _headings(stretch: str) -> list[re.Match[str]]:
    """Those at line starts; the first may be as Alpaca finds it, with a line break after its number."""
    headings = list(_HEADING.finditer(stretch))
    first = _INLINE_HEADING.match(stretch)
    if first and not (headings and headings[0].start() == 0):
        headings = [first, *(heading for heading in headings if heading.start() >= first.end())]
    return headings


def _readings(stretch: str, headings: list[re.Match[str]]) -> Iterator[list[re.Match[str]]]:
    """Which headings are the task's own, the most trusted reading first."""
    first, number = headings[0], headings[0]["number"]
    numbered = [heading for heading in headings if heading["number"] is not None]
    own = [heading for heading in headings if heading["number"] == number]
    if not _holds_another_task(own, [heading for heading in numbered if heading["number"] != number]):
        inline = [heading for heading in _INLINE_HEADING.finditer(stretch) if heading["number"] == number]
        ends = {heading.end() for heading in own}
        yield sorted([*own, *(h for h in inline if h.end() not in ends)], key=lambda heading: heading.start())
        yield own
    yield numbered
    if not any(_name(heading) == "output" for heading in numbered):
        output = next((heading for heading in headings if _name(heading) == "output"), first)
        input = next((h for h in headings if _name(h) == "input" and h.start() < output.start()), None)
        yield [first, *([input] if input else []), output]


def _holds_another_task(own: list[re.Match[str]], others: list[re.Match[str]]) -> bool:
    """Whether headings with other numbers are more than a list in the output ("1. Input: read it")."""
    following = _following(own[0])
    output = next((heading.start() for heading in own if _name(heading) == "output"), None)
    return any(output is None or h.start() < output or h["number"] == following for h in others)


def _following(heading: re.Match[str]) -> str | None:
    """The number after a heading's."""
    return None if heading["number"] is None else str(int(heading["number"]) + 1)


def _candidate(stretch: str, headings: list[re.Match[str]], style: PromptStyle) -> Candidate | Reject:
    ends = [heading.start() for heading in headings[1:]] + [len(stretch)]
    values = {_name(h): _value(stretch[h.end() : end], h) for h, end in zip(headings, ends, strict=True)}
    instruction = values.pop("instruction").strip()
    while _opens_with_number(instruction, "instruction"):  # "4. Instruction: 4. Instruction: ..."
        instruction = instruction[_HEADING.match(instruction).end() :].strip()  # type: ignore[union-attr]
    if not instruction:
        return Reject("no_instruction", stretch)
    if any(_opens_with_number(value) for value in (instruction, *values.values())):
        return Reject("mixed_headings", stretch)
    output = _without_wrapping_fences(values["output"]) if style == "chat" else values["output"]
    return Candidate(instruction, _parse_input(values.get("input", "")), output)


def _value(text: str, heading: re.Match[str]) -> str:
    """A field's text. Where it begins on a line of its own, that line's indentation belongs to it."""
    same_line = text.partition("\n")[0].strip()
    value = text.strip() if same_line else _without_blank_ends(text)
    if (separator := _SEPARATOR_LINE.search(value)) and separator.end() == len(value):
        value = value[: separator.start()].rstrip()
    mark = heading.groupdict().get("mark")
    return value.removesuffix(mark).rstrip() if mark and heading[0].count(mark) == 1 else value


def _without_blank_ends(text: str) -> str:
    return re.sub(r"\A(?:[^\S\n]*\n)+", "", text).rstrip()


def _without_separator(text: str) -> str:
    return text.removesuffix(SEPARATOR).rstrip()


def _without_chat_tail(text: str) -> str:
    while tail := _CHAT_TAIL.search(text.rstrip()):
        text = text[: tail.start()]
    return text


def _without_wrapping_fences(output: str) -> str:
    """Without the fences that stand around whole tasks: one that nothing in the output opens, or a pair of a task's
    end and the next one's beginning."""
    fences = [match.start() for match in _FENCE.finditer(output)]
    if not fences or re.fullmatch(r"[ \t]*```\w*", output[fences[-1] :]) is None:
        return output
    if len(fences) % 2 == 1:
        return output[: fences[-1]].rstrip()
    if re.fullmatch(r"[ \t]*```\s*", output[fences[-2] : fences[-1]]):
        return output[: fences[-2]].rstrip()
    return output


def _parse_input(value: str) -> str:
    return "" if _NO_INPUT.fullmatch(value.strip()) else value


def _says_something(stretch: str) -> bool:
    """Whether there is more than separators, fences and rules."""
    return re.search(r"[^\s#*_=-]", re.sub(r"(?m)^[ \t]*```\w*[ \t]*$", "", stretch)) is not None


def _name(heading: re.Match[str]) -> str:
    return heading["name"].lower()


def _parse_json(text: str, finish_reason: str) -> list[Candidate | Reject]:
    """Every whole object is a task, those of an answer that was cut or is broken elsewhere too."""
    parsed: list[Candidate | Reject] = []
    end = 0
    for start, stop, tasks in _json_tasks(text):
        parsed += _json_rest(text[end:start], "bad_json")
        parsed += [_json_candidate(task) for task in tasks]
        end = stop
    parsed += _json_rest(text[end:], "truncated" if finish_reason in _CUT else "bad_json")
    # An answer without any object is none of JSON's, however it ended.
    return parsed if "{" in text and parsed else [Reject("bad_json", text)]


def _json_rest(text: str, reason: str) -> list[Candidate | Reject]:
    """What stands around the tasks: nothing, a remark, or a broken object."""
    if _JSON_GLUE.fullmatch(text):
        return []
    return [Reject(reason if "{" in text else "outside_tasks", text.strip())]


def _json_tasks(text: str) -> Iterator[tuple[int, int, list[Any]]]:
    """(start, end, tasks) of every JSON object that is a task or a list of tasks, from the outermost inwards."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        next_start = start + 1
        try:
            value, end = decoder.raw_decode(text, start)
        except RecursionError:  # nested a thousand deep: no task, and as slow again at every further brace
            return
        except ValueError:
            value, end = None, start
        if tasks := _tasks_in(value):
            yield start, end, tasks
            next_start = end
        start = text.find("{", next_start)


def _tasks_in(value: Any) -> list[Any]:
    if not isinstance(value, dict):
        return []
    if value.keys() & {"instruction", "output"}:
        return [value]
    lists = [item for item in value.values() if isinstance(item, list)]
    return lists[0] if len(value) == len(lists) == 1 else []


def _json_candidate(task: Any) -> Candidate | Reject:
    fields = {k: _json_text(v) for k, v in task.items()} if isinstance(task, dict) else {}
    if not fields.get("instruction", "").strip() or "output" not in fields:
        reason = "no_output" if fields.get("instruction", "").strip() else "no_instruction"
        return Reject(reason, _encodable(json.dumps(task, ensure_ascii=False)))
    values = [_without_blank_ends(fields.get(name, "")) for name in ("input", "output")]
    return Candidate(fields["instruction"].strip(), _parse_input(values[0]), values[1])


def _json_text(value: Any) -> str:
    if value is None:
        return ""
    return _encodable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _encodable(text: str) -> str:
    r"""JSON can spell half a surrogate pair ("\ud83d"), which no Parquet file takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
