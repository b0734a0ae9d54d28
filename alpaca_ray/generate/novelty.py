"""ROUGE-L novelty (Wang et al. 2023, section 2.2): an instruction too like an earlier one is a duplicate.

Greedy: what was kept before decides, so the order of offers matters.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rapidfuzz.distance import LCSseq
from rouge_score.tokenize import tokenize


@dataclass(frozen=True)
class Novelty:
    """The decision on one instruction, and its highest ROUGE-L with the instruction that has it ("" if none)."""

    kept: bool
    rouge_l: float
    nearest: str


class NoveltyFilter:
    """Keeps instructions whose ROUGE-L F-measure to every seed and every kept one is at most `threshold`."""

    def __init__(self, seed_instructions: Iterable[str], threshold: float = 0.7) -> None:
        self._threshold = threshold
        self._pool = [(text, _tokens(text)) for text in seed_instructions]

    def offer(self, instruction: str) -> Novelty:
        """Decide on one instruction; a kept one joins the pool. One without any token is always kept."""
        tokens = _tokens(instruction)
        scores = [(rouge_l(tokens, other), text) for text, other in self._pool]
        highest, nearest = max(scores, key=lambda scored: scored[0], default=(0.0, ""))
        kept = highest <= self._threshold
        if kept:
            self._pool.append((instruction, tokens))
        return Novelty(kept, highest, nearest if highest > 0 else "")

    def offer_many(self, instructions: Sequence[str]) -> list[Novelty]:
        """The same answers as `offer`, one by one."""
        return [self.offer(instruction) for instruction in instructions]


def rouge_l(a: Sequence[str], b: Sequence[str]) -> float:
    """ROUGE-L F-measure of two token lists in rouge_score's own float arithmetic.

    2 * LCS / (m + n) is the same number on paper, but falls on the other side of 0.7 for half of the exact ties.
    """
    if not a or not b:
        return 0.0
    length = LCSseq.similarity(a, b)
    precision, recall = length / len(b), length / len(a)
    return 2 * precision * recall / (precision + recall) if length else 0.0


def _tokens(text: str) -> list[str]:
    tokens: list[str] = tokenize(text, None)  # rouge_score's default: lower case, [a-z0-9]+, no stemmer
    return tokens
