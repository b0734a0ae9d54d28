"""Texts as token ids: rouge_score's default tokens (lower case, [a-z0-9]+, no stemmer), numbered as they come.

Common words come early, so small numbers are the common ones; rapidfuzz is at its fastest on small code points.
"""

from collections import defaultdict
from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
CodePoints = str | list[int]

_ALPHANUMERIC = b"abcdefghijklmnopqrstuvwxyz0123456789"
_OTHERS_TO_SPACE = bytes(byte if byte in _ALPHANUMERIC else 0x20 for byte in range(256))
_MAX_CODE_POINT = 0x10FFFF


class Documents(NamedTuple):
    """Token lists end to end: text i is `ids[starts[i]:starts[i + 1]]`."""

    ids: Array  # int32
    starts: Array  # int64, one more than there are texts

    @property
    def lengths(self) -> Array:
        return np.diff(self.starts)

    def part(self, first: int, stop: int) -> "Documents":
        """The texts from `first` to before `stop`."""
        starts = self.starts[first : stop + 1]
        return Documents(self.ids[starts[0] : starts[-1]], starts - starts[0])

    def where(self, chosen: Array) -> "Documents":
        """The texts that are `chosen` (bool)."""
        starts = np.concatenate(([0], np.cumsum(self.lengths[chosen])))
        return Documents(self.ids[np.repeat(chosen, self.lengths)], starts)


class Vocabulary:
    """Numbers words in the order in which they first come."""

    def __init__(self) -> None:
        self._ids: defaultdict[str, int] = defaultdict()
        self._ids.default_factory = self._ids.__len__

    def __len__(self) -> int:
        return len(self._ids)

    def encode(self, texts: Iterable[str]) -> Documents:
        """Token ids of `texts`; new words get the next numbers."""
        split = [tokenize(text) for text in texts]
        starts = np.zeros(len(split) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, split), np.int64, len(split)), out=starts[1:])
        ids = np.fromiter(map(self._ids.__getitem__, chain.from_iterable(split)), np.int32, int(starts[-1]))
        return Documents(ids, starts)


def tokenize(text: str) -> list[str]:
    """The same tokens as `rouge_score.tokenize.tokenize(text, None)`, three times as fast.

    Lower case comes first: it turns U+212A into "k" and U+0130 into "i" and a mark.
    """
    return text.lower().encode("ascii", "replace").translate(_OTHERS_TO_SPACE).decode("ascii").split()


def by_frequency(documents: Documents) -> Documents:
    """The same texts with the words numbered anew, the commonest 0."""
    order = np.argsort(-np.bincount(documents.ids), kind="stable")
    number = np.empty(len(order), np.int32)
    number[order] = np.arange(len(order))
    return documents._replace(ids=number[documents.ids])


def as_code_points(documents: Documents) -> list[CodePoints]:
    """One sequence per text for rapidfuzz: a string of one character per token, far the fastest form there.

    Past the 1,114,112 code points of Unicode, lists of ints; rapidfuzz gives both forms the same meaning.
    """
    ids, starts = documents
    bounds = zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    if len(ids) and ids.max() > _MAX_CODE_POINT:
        numbers = ids.tolist()
        return [numbers[start:stop] for start, stop in bounds]
    characters = ids.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
    return [characters[start:stop] for start, stop in bounds]


def grown(array: Array, size: int, fill: int = 0) -> Array:
    """`array` with room for `size` entries; at least doubled when it grows, so that growing costs little in sum."""
    if size <= len(array):
        return array
    larger = np.full(max(size, 2 * len(array)), fill, array.dtype)
    larger[: len(array)] = array
    return larger
