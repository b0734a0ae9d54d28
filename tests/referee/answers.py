"""Answers that depend on the request alone: numbered tasks, as a teacher would write them.

The pieces lie in words.txt. Some tasks are bad on purpose: repeated, about pictures, or with a broken heading.
"""

import hashlib
import json
import math
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.referee.bodies import Ask
from tests.referee.settings import Answers

_HEADING = ". Instruction:"
_SENTENCE = "%s %s %s %s, %s"
BAD_KINDS = ("repeated", "blocked", "broken")


@dataclass(frozen=True, slots=True)
class Task:
    instruction: str
    input: str
    output: str
    broken: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice of a response."""

    text: str
    finish_reason: str
    tokens: int


def num_tokens(text: str) -> int:
    """Four bytes of UTF-8 make a token; nothing is free."""
    return max(1, math.ceil(len(text.encode()) / 4))


def answers_to(ask: Ask, settings: Answers) -> list[Answer]:
    """A choice for each sample of each prompt."""
    return [
        _ended(_text(ask, prompt, _rng(f"{ask.seed}/{sample}/{prompt}"), settings), ask)
        for prompt in ask.prompts
        for sample in range(ask.num_samples)
    ]


def latency_s(ask: Ask, settings: Answers) -> float:
    """How long the answer takes, drawn from the request."""
    least_s, most_s = settings.latency_s
    return least_s if least_s == most_s else _rng(f"latency/{ask.seed}/{ask.prompts}").uniform(least_s, most_s)


def _rng(text: str) -> random.Random:
    return random.Random(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]))


def _text(ask: Ask, prompt: str, rng: random.Random, settings: Answers) -> str:
    tasks = [_task(rng, settings) for _ in range(rng.randint(*settings.num_tasks))]
    if ask.json_answer:
        rows = [{"instruction": task.instruction, "input": task.input, "output": task.output} for task in tasks]
        return json.dumps({"tasks": rows})
    first, inside = next_number(prompt)
    text = "\n".join(_numbered(number, task) for number, task in enumerate(tasks, start=first))
    # A completion goes on inside the heading; a chat model begins its answer with one.
    return text.removeprefix(f"###\n{first}{_HEADING}") if inside and not ask.chat else text


def next_number(prompt: str) -> tuple[int, bool]:
    """The number of the next task, and whether the prompt ends inside its heading."""
    at = prompt.rfind(_HEADING)
    number = re.search(r"\d+$", prompt[max(0, at - 9) : at]) if at >= 0 else None
    if number is None:
        return 1, False
    inside = not prompt[at + len(_HEADING) :].strip()
    return int(number[0]) + (not inside), inside


def _numbered(number: int, task: Task) -> str:
    output = "Output" if not task.broken else "Outcome"
    return (
        f"###\n{number}. Instruction: {task.instruction}\n{number}. Input:\n{task.input or '<noinput>'}\n"
        f"{number}. {output}:\n{task.output}"
    )


def _task(rng: random.Random, settings: Answers) -> Task:
    kind = rng.choice(BAD_KINDS) if rng.random() < settings.bad_share else "good"
    if kind in ("repeated", "blocked"):
        section = "known" if kind == "repeated" else "blocked"
        return Task(_filled(_pick(section, rng), rng), "", _prose(rng, settings.output_words))
    with_input = rng.random() < 0.35
    instruction = _filled(_pick("with_input" if with_input else "without_input", rng), rng)
    text = _prose(rng, (12, 40)) if with_input else ""
    return Task(instruction, text, _prose(rng, settings.output_words), broken=kind == "broken")


def _pick(section: str, rng: random.Random) -> str:
    pieces = _words()[section]
    return pieces[int(rng.random() * len(pieces))]


def _filled(template: str, rng: random.Random) -> str:
    """A template with its places filled; a sentence begins with a capital."""
    parts = template.split("{")
    filled = [parts[0]]
    for part in parts[1:]:
        name, _, rest = part.partition("}")
        filled += (_pick(name, rng), rest)
    return "".join(filled)


def _prose(rng: random.Random, num_words: tuple[int, int]) -> str:
    """Whole sentences until a length drawn from the range is reached; cut only where the range ends."""
    wanted, length, random = rng.randint(*num_words), 0, rng.random
    sentences = []
    while length < wanted:
        # Most of the time of an answer goes here: no call but random().
        sentence = _SENTENCE % tuple([pieces[int(random() * len(pieces))] for pieces in _sentence_pieces()])
        sentences.append(sentence)
        length += sentence.count(" ") + 1
    text = " ".join(sentences)
    return text if length <= num_words[1] else " ".join(text.split(" ", num_words[1])[:-1])


@cache
def _sentence_pieces() -> tuple[tuple[str, ...], ...]:
    return tuple(_words()[section] for section in ("subject", "action", "modifier", "noun", "ending"))


def _ended(text: str, ask: Ask) -> Answer:
    """Cut at the first stop sequence and at max_tokens, whichever comes first."""
    ends = [at for stop in ask.stop if stop and (at := text.find(stop)) >= 0]
    text = text[: min(ends)] if ends else text
    if num_tokens(text) <= ask.max_tokens:
        return Answer(text, "stop", num_tokens(text))
    return Answer(text.encode()[: 4 * ask.max_tokens].decode(errors="ignore"), "length", ask.max_tokens)


@cache
def _words() -> dict[str, tuple[str, ...]]:
    sections: dict[str, tuple[str, ...]] = {}
    lines = (Path(__file__).parent / "words.txt").read_text(encoding="utf-8").splitlines()
    for name, pieces in zip(lines[1::2], lines[2::2], strict=True):
        sections[name.strip("[]")] = tuple(pieces.split("|"))
    return sections
