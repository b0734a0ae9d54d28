"""Which candidates are no training data, and why: Alpaca's filters, then those that users of its data asked for.

A run switches them off by name (generate.skip_filters).
"""

import re
import string
from collections.abc import Callable, Collection

from alpaca_ray.config import UserError, nearest
from alpaca_ray.generate import faults
from alpaca_ray.generate.arithmetic import holds_wrong_arithmetic
from alpaca_ray.generate.contamination import CONTAMINATED
from alpaca_ray.generate.parse import Candidate
from alpaca_ray.generate.privacy import holds_personal_data, holds_secret

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
    # Stanford Alpaca (generate_instruction.py)
    "empty_output": lambda c: not c.output.strip(),
    "too_short": lambda c: len(c.instruction.split()) < MIN_WORDS,
    "too_long": lambda c: len(c.instruction.split()) > MAX_WORDS,
    "blocked_word": lambda c: _BLOCKED.search(c.instruction) is not None,
    "write_a_program": lambda c: c.instruction.startswith("Write a program"),  # without saying what program
    "starts_with_punctuation": lambda c: c.instruction.startswith(tuple(string.punctuation)),
    "starts_with_non_ascii": lambda c: not c.instruction[:1].isascii(),
    # AlpacaDataCleaned's list of faults in Alpaca's data
    "not_applicable_output": faults.has_no_output,
    "control_characters": faults.has_control_characters,
    "merged_tasks": faults.has_merged_tasks,
    "hallucinated_url": faults.has_hallucinated_url,
    "missing_code": faults.lacks_code,
    "inconsistent_input": faults.has_inconsistent_input,
    "wrong_arithmetic": holds_wrong_arithmetic,
    # what chat models add to it
    "refusal": faults.refuses,
    "repeats_instruction": faults.repeats_the_task,
    # what must not be given away
    "personal_data": lambda c: holds_personal_data(faults.whole_text(c)),
    # An instruction about passwords is answered with made-up ones.
    "secret": lambda c: "password" not in c.instruction.lower() and holds_secret(faults.whole_text(c)),
}


def reject_reason(candidate: Candidate, skip: Collection[str] = ()) -> str | None:
    """The name of the first filter against a candidate, those in `skip` left out, or None."""
    return next((name for name, applies in FILTERS.items() if name not in skip and applies(candidate)), None)


def check_filter_names(names: Collection[str]) -> None:
    """Raises UserError for a name that no filter has, contamination.py's included."""
    valid = [*FILTERS, CONTAMINATED]
    for name in names:
        if name not in valid:
            raise UserError(
                f"generate.skip_filters: {name!r} is no filter{nearest(name, valid)} (there are: {', '.join(valid)})"
            )
