"""Greedy responses of a model to prompts, a padded batch at a time."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from alpaca_ray.config import UserError
from alpaca_ray.evaluate.scores import Response

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def respond(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
) -> list[Response]:
    """One response per prompt, in their order. A response ends at the EOS or is cut after `max_new_tokens`.

    Raises UserError if neither model nor tokenizer has an end-of-sequence token.
    """
    encoded: list[list[int]] = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # like lengths together: little padding
    responses: dict[int, Response] = {}
    for start in range(0, len(by_length), batch_size):
        indices = by_length[start : start + batch_size]
        batch = _respond(model, tokenizer, [encoded[i] for i in indices], max_new_tokens)
        responses.update(zip(indices, batch, strict=True))
    return [responses[i] for i in range(len(prompts))]


def _respond(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[list[int]], max_new_tokens: int
) -> list[Response]:
    """`prompts`: token ids of each prompt of one batch."""
    from transformers import BatchEncoding

    stops = _stop_ids(model, tokenizer)
    width = max(len(ids) for ids in prompts)
    # Left padding: every prompt ends where its response begins. Masked, so any id would do.
    padded = {
        "input_ids": [[stops[0]] * (width - len(ids)) + ids for ids in prompts],
        "attention_mask": [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts],
    }
    # What is not said here would come from the model's own generation_config.json.
    generated = model.generate(  # type: ignore[operator]
        **BatchEncoding(padded, tensor_type="pt").to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=stops,
        pad_token_id=stops[0],
    )  # (batch, width + at most max_new_tokens)
    return [_read(tokenizer, ids, stops) for ids in generated[:, width:].tolist()]


def _stop_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokenizer's EOS, which training teaches, and those that the base model was trained with."""
    declared = model.generation_config.eos_token_id if model.generation_config is not None else None
    own = declared if isinstance(declared, list) else [declared]
    stops = list(dict.fromkeys(i for i in [tokenizer.eos_token_id, *own] if i is not None))
    if not stops:
        raise UserError("the model's tokenizer has no end-of-sequence token, so its responses could not end")
    return stops


def _read(tokenizer: "PreTrainedTokenizerBase", ids: list[int], stops: list[int]) -> Response:
    """`ids`: what was generated for one prompt; after a stop only padding follows."""
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    return Response(str(text), cut=end is None, num_tokens=len(ids[:end]))
