"""Whether a generated task repeats an evaluation instruction, which would make its scores worthless."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from alpaca_ray.generate.parse import Candidate
from alpaca_ray.generate.rouge import rouge_l
from alpaca_ray.generate.tokens import tokenize
from alpaca_ray.schema import EvaluationTask

CONTAMINATED = "contaminated"

# Brown et al. 2020, appendix C: 13-grams, and for shorter examples their whole text where it has at least 8 words.
MAX_NGRAM, MIN_NGRAM = 13, 8


@dataclass(frozen=True)
class Contamination:
    """The evaluation task that is repeated. `rouge_l` between the instructions; None where an n-gram is shared."""

    task_id: str
    instruction: str
    rouge_l: float | None


class ContaminationFilter:
    """Finds candidates whose instruction has a ROUGE-L F-measure above `threshold` with an evaluation instruction, or
    whose text shares a 13-gram with an evaluation task's instruction, inputs and outputs."""

    def __init__(self, evaluation_tasks: Sequence[EvaluationTask], threshold: float = 0.7) -> None:
        self._threshold = threshold
        self._instructions = [(task, tokenize(task.instruction)) for task in evaluation_tasks]
        self._ngrams: dict[int, dict[tuple[str, ...], EvaluationTask]] = {}  # by length; shorter texts as a whole
        for task in evaluation_tasks:
            tokens = tokenize("\n".join([task.instruction, *(t for i in task.instances for t in (i.input, i.output))]))
            length = min(len(tokens), MAX_NGRAM)
            if length >= MIN_NGRAM:
                known = self._ngrams.setdefault(length, {})
                for ngram in _ngrams(tokens, length):
                    known.setdefault(ngram, task)

    def reason(self, candidate: Candidate) -> str | None:
        """The name under which a contaminated candidate is rejected, or None."""
        return CONTAMINATED if self.match(candidate) else None

    def match(self, candidate: Candidate) -> Contamination | None:
        """The evaluation task that the candidate repeats: the nearest by ROUGE-L, else the first with an n-gram."""
        tokens = tokenize(candidate.instruction)
        scored = [
            (rouge_l(tokens, other), task) for task, other in self._instructions if self._may_match(tokens, other)
        ]
        score, nearest = max(scored, key=lambda pair: pair[0], default=(0.0, None))
        if nearest is not None and score > self._threshold:
            return Contamination(nearest.id, nearest.instruction, score)
        tokens += tokenize(f"{candidate.input}\n{candidate.output}")
        shared = (known.get(ngram) for length, known in self._ngrams.items() for ngram in _ngrams(tokens, length))
        task = next((task for task in shared if task is not None), None)
        return Contamination(task.id, task.instruction, None) if task else None

    def _may_match(self, a: Sequence[str], b: Sequence[str]) -> bool:
        """Whether the lengths alone let the score reach the threshold: for most pairs they do not."""
        return 2 * min(len(a), len(b)) > 0.999 * self._threshold * (len(a) + len(b))


def _ngrams(tokens: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    return (tuple(tokens[start : start + length]) for start in range(len(tokens) - length + 1))
