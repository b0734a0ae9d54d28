"""Where the sentences of a growing text end: prose, lists, code, and languages without spaces.

An end depends on the text alone, not on the pieces it came in. Precision is no aim: an end too many ("Dr. Smith") costs
one more judgement, an end too few makes the reader wait.
"""

import re

# What ends a sentence of its own; after the others a space has to follow (3.14, example.com).
_WIDE = "。！？｡．।॥۔؟…"  # noqa: RUF001
_ENDING = ".!?" + _WIDE
_CLOSING = re.escape("\"'”’»)]}*_`」』】）")  # noqa: RUF001
_END = re.compile(
    rf"\n|[{_ENDING}]+[{_CLOSING}]*\s|[{_ENDING}]*[{_WIDE}][{_CLOSING}]*(?=[^{_ENDING}{_CLOSING}])",
)
MIN_CHARS, MAX_CHARS = 16, 200


def next_end(text: str, start: int, min_chars: int = MIN_CHARS, max_chars: int = MAX_CHARS) -> int | None:
    """Where the sentence that begins at `start` ends, the space behind it included. None: more text may be part of it.

    What is shorter than `min_chars` ("1. ", "}") goes with the next sentence. A sentence of more than `max_chars` is
    cut, between words where it has any.
    """
    window_end = start + max_chars + 1  # an end may have to see the character behind it
    for found in _END.finditer(text, start, window_end):
        end = found.end()
        if end - start <= max_chars and len(text[start:end].strip()) >= min_chars:
            return end
    if len(text) < window_end:
        return None
    gap = re.search(r"\s(?=\S*$)", text[start + max_chars // 2 : start + max_chars])
    return start + max_chars if gap is None else start + max_chars // 2 + gap.end()
