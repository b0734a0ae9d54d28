"""Which candidates are no training data, and why: the filters of Stanford Alpaca (generate_instruction.py)."""

import re
import string
from collections.abc import Callable

from alpaca_ray.generate.parse import Candidate

MIN_WORDS, MAX_WORDS = 4, 150  # of the instruction

# Tasks that a text-only model cannot do, or that speak of things it cannot see.
BLOCKED_WORDS = (
    "image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot",
    "go to", "video", "audio", "music", "flowchart", "diagram",
)  # fmt: skip
_BLOCKED = re.compile(r"\b(" + "|".join(BLOCKED_WORDS) + r")\b", re.IGNORECASE)


Filter = Callable[[Candidate], bool]

# In this order; the first that applies names the reason.
FILTERS: dict[str, Filter] = {
    "empty_output": lambda c: not c.output,
    "too_short": lambda c: len(c.instruction.split()) < MIN_WORDS,
    "too_long": lambda c: len(c.instruction.split()) > MAX_WORDS,
    "blocked_word": lambda c: _BLOCKED.search(c.instruction) is not None,
    "write_a_program": lambda c: c.instruction.startswith("Write a program"),  # without saying what program
    "starts_with_punctuation": lambda c: c.instruction[0] in string.punctuation,
    "starts_with_non_ascii": lambda c: not c.instruction[0].isascii(),
}


def reject_reason(candidate: Candidate) -> str | None:
    """The name of the first filter against a candidate, or None."""
    return next((reason for reason, applies in FILTERS.items() if applies(candidate)), None)
