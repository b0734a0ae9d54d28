"""Response text -> candidates. What cannot be one is a Reject with its reason; nothing is dropped."""

import re
from dataclasses import dataclass

from alpaca_ray.prompts import NO_INPUT, SEPARATOR, first_number
from alpaca_ray.schema import Reject

# "7. Input:" at the start of a line. Headings decide, not separators: one lost "###" costs nothing.
_HEADING = re.compile(r"^[ \t]*\d+[ \t]*\.[ \t]*(Instruction|Input|Output)[ \t]*:", re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True)
class Candidate:
    """A task as the teacher wrote it; `input` is "" where it wrote <noinput>."""

    instruction: str
    input: str
    output: str


def parse_completion(text: str, finish_reason: str, num_examples: int) -> list[Candidate | Reject]:
    """Split a response into its tasks, in order.

    `text` goes on where `prompts.generation_prompt` with `num_examples` examples ends, inside the first new
    instruction. The last task of a response that ended for its length is a Reject: it may be cut anywhere.
    """
    whole = f"{first_number(num_examples)}. Instruction:{text}"
    starts = [match.start() for match in _HEADING.finditer(whole) if match[1].lower() == "instruction"]
    items = [whole[start:end] for start, end in zip(starts, [*starts[1:], len(whole)], strict=True)]
    parsed = [_parse_item(_strip_separator(item)) for item in items]
    if finish_reason == "length":
        parsed[-1] = Reject("truncated", _strip_separator(items[-1]))
    return parsed


def _parse_item(item: str) -> Candidate | Reject:
    headings = list(_HEADING.finditer(item))
    names = [heading[1].lower() for heading in headings]
    if "output" not in names:
        return Reject("no_output", item)
    if names not in (["instruction", "input", "output"], ["instruction", "output"]):
        return Reject("mixed_headings", item)
    ends = [heading.start() for heading in headings[1:]] + [len(item)]
    values = [item[heading.end() : end].strip() for heading, end in zip(headings, ends, strict=True)]
    if any(_HEADING.match(value) for value in values):
        return Reject("mixed_headings", item)  # "4. Instruction: 4. Instruction: ..."
    fields = dict(zip(names, values, strict=True))
    if not fields["instruction"]:
        return Reject("no_instruction", item)
    return Candidate(fields["instruction"], _parse_input(fields.get("input", "")), fields["output"])


def _parse_input(value: str) -> str:
    return "" if value.lower().rstrip(".") == NO_INPUT else value


def _strip_separator(item: str) -> str:
    return item.strip().removesuffix(SEPARATOR).strip()
