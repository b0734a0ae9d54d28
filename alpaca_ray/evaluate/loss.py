"""How well a model predicts given answers: cross-entropy over the answer and the EOS, given the Alpaca prompt.

B examples of a batch, T tokens of the longest, V vocabulary, N target tokens of one example.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from alpaca_ray.config import UserError
from alpaca_ray.evaluate.scores import AnswerLoss, LossReport, loss_report
from alpaca_ray.prompts import answer_ids, prompt_of
from alpaca_ray.schema import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Encoded:
    index: int  # which of the examples
    input_ids: list[int]
    num_prompt_tokens: int


def answer_loss(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: Sequence[Example],
    max_length: int,
    batch_size: int,
) -> LossReport:
    """Mean loss per target token over all examples that have at most `max_length` tokens, prompt and EOS included."""
    return loss_report(answer_losses(model, tokenizer, examples, max_length, batch_size))


def answer_losses(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: Sequence[Example],
    max_length: int,
    batch_size: int,
) -> list[AnswerLoss | None]:
    """One loss per example, in their order; None for one that is too long (a cut answer would be another question).

    Raises UserError if the tokenizer has no end-of-sequence token.
    """
    encoded = [_encode(tokenizer, index, example) for index, example in enumerate(examples)]
    losses: list[AnswerLoss | None] = [None] * len(encoded)
    for batch in _batches([e for e in encoded if len(e.input_ids) <= max_length], batch_size):
        for e, loss in zip(batch, _score(model, batch), strict=True):
            losses[e.index] = loss
    return losses


def set_threads(num_cpus: float) -> None:
    """Use as many threads as Ray has given CPUs: torch would take every core of the node in every actor."""
    torch.set_num_threads(max(1, int(num_cpus)))


def _encode(tokenizer: "PreTrainedTokenizerBase", index: int, example: Example) -> _Encoded:
    if tokenizer.eos_token_id is None:
        raise UserError("the model's tokenizer has no end-of-sequence token, so its answers can have no end")
    prompt = prompt_of(example)
    prompt_ids = tokenizer(prompt)["input_ids"]
    target_ids = [*answer_ids(prompt, prompt_ids, example.output, tokenizer), tokenizer.eos_token_id]
    return _Encoded(index, [*prompt_ids, *target_ids], len(prompt_ids))


def _batches(encoded: Sequence[_Encoded], batch_size: int) -> Iterator[list[_Encoded]]:
    by_length = sorted(encoded, key=lambda e: len(e.input_ids))  # like lengths together: little padding
    for start in range(0, len(by_length), batch_size):
        yield by_length[start : start + batch_size]


@torch.inference_mode()
def _score(model: "PreTrainedModel", batch: Sequence[_Encoded]) -> list[AnswerLoss]:
    width = max(len(e.input_ids) for e in batch)
    input_ids = torch.zeros(len(batch), width, dtype=torch.long)  # (B, T); 0 pads on the right, any id would do
    attention_mask = torch.zeros_like(input_ids)
    for row, e in enumerate(batch):
        input_ids[row, : len(e.input_ids)] = torch.tensor(e.input_ids)
        attention_mask[row, : len(e.input_ids)] = 1
    input_ids, attention_mask = input_ids.to(model.device), attention_mask.to(model.device)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits  # (B, T, V)
    return [_answer_loss(logits[row], input_ids[row], e) for row, e in enumerate(batch)]


def _answer_loss(logits: torch.Tensor, input_ids: torch.Tensor, e: _Encoded) -> AnswerLoss:
    """`logits` (T, V) at position t are about token t + 1; `input_ids` (T,)."""
    first, end = e.num_prompt_tokens, len(e.input_ids)
    nats = cross_entropy(logits[first - 1 : end - 1].float(), input_ids[first:end], reduction="sum")  # over N
    return AnswerLoss(nats.item(), end - first)
