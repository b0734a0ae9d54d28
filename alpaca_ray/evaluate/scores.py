"""The numbers of the evaluation: losses before and after training, and the form of the responses."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from alpaca_ray.config import UserError

FEW_EXAMPLES = 30  # below this a standard error is itself too uncertain to rely on


@dataclass(frozen=True)
class AnswerLoss:
    """Cross-entropy of one answer, summed over its tokens, in nats. The EOS is one of the target tokens."""

    nats: float
    target_tokens: int


@dataclass(frozen=True)
class LossReport:
    """`loss` is in nats per target token; None where no example was scored."""

    loss: float | None
    target_tokens: int
    examples: int
    skipped_too_long: int


@dataclass(frozen=True)
class Response:
    """`cut`: the model did not end by itself. `num_tokens` counts what was generated, without the EOS."""

    text: str
    cut: bool
    num_tokens: int


def loss_report(answers: Sequence[AnswerLoss | None]) -> LossReport:
    """The mean over target tokens, so that a long answer weighs more. None stands for an example that is too long."""
    scored = [answer for answer in answers if answer is not None]
    tokens = sum(answer.target_tokens for answer in scored)
    loss = sum(answer.nats for answer in scored) / tokens if scored else None
    return LossReport(loss, tokens, len(scored), len(answers) - len(scored))


def compare_losses(before: Sequence[AnswerLoss | None], after: Sequence[AnswerLoss | None]) -> dict[str, Any]:
    """Both reports and their difference, paired by example; the two sequences are in the same order.

    Raises UserError if the two tokenizers differ: losses per token would not be comparable.
    """
    pairs = [(b, a) for b, a in zip(before, after, strict=True) if b is not None and a is not None]
    if len(pairs) != len(before) - before.count(None) or any(b.target_tokens != a.target_tokens for b, a in pairs):
        raise UserError(
            "the tokenizers of the base and the trained model cut the same answers into different tokens, so their "
            "losses cannot be compared: train again with the tokenizer of the base model"
        )
    difference, standard_error = _paired_difference(pairs)
    return {
        "before": asdict(loss_report(before)),
        "after": asdict(loss_report(after)),
        "difference": difference,
        "difference_standard_error": standard_error,
        "note": _note(len(pairs)),
    }


def _paired_difference(pairs: Sequence[tuple[AnswerLoss, AnswerLoss]]) -> tuple[float | None, float | None]:
    """after - before in nats per token, and its standard error over examples.

    A ratio of sums (nats over tokens), so the error is that of the ratio estimator (Cochran, Sampling Techniques,
    section 6.4): examples are what varies, the tokens of one answer are not independent.
    """
    if not pairs:
        return None, None
    nats = [after.nats - before.nats for before, after in pairs]
    tokens = [after.target_tokens for _, after in pairs]
    difference = sum(nats) / sum(tokens)
    if len(pairs) == 1:
        return difference, None
    squares = sum((n - difference * t) ** 2 for n, t in zip(nats, tokens, strict=True))
    return difference, math.sqrt(squares * len(pairs) / (len(pairs) - 1)) / sum(tokens)


def _note(num_examples: int) -> str:
    if num_examples == 0:
        return "no example fits max_length, so there is no loss"
    if num_examples < FEW_EXAMPLES:
        return f"from {num_examples} example{'s' if num_examples > 1 else ''} only: too few to rely on the difference"
    return ""


def response_scores(responses: Sequence[Response]) -> dict[str, Any]:
    """How many responses, which share was cut at the token limit, and their mean lengths."""
    count = len(responses)
    return {
        "responses": count,
        "share_cut": sum(response.cut for response in responses) / count,
        "mean_tokens": sum(response.num_tokens for response in responses) / count,
        "mean_characters": sum(len(response.text) for response in responses) / count,
    }
