"""Greedy responses: a ragged batch says what each prompt alone says."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alpaca_ray import models
from alpaca_ray.evaluate.loss import set_threads
from alpaca_ray.evaluate.responses import respond

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]

PROMPTS = ["Hello", "A much longer prompt, so that the batch is ragged", "Why?", "One\ntwo", "a", "Name 3 colours."]


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> Loaded:
    """With larger weights than a fresh model's, so that the best token stands clear of the second."""
    set_threads(1)  # on a busy machine, threads that wait for each other make tiny products slow
    model, tokenizer = models.load_model(str(tiny_model), "float32"), models.load_tokenizer(str(tiny_model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model, tokenizer


def one_by_one(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int
) -> list[int]:
    """Greedy decoding by hand: no padding, no cache, no generate()."""
    ids = tokenizer(prompt)["input_ids"]
    new: list[int] = []
    while len(new) < max_new_tokens and tokenizer.eos_token_id not in new:
        with torch.no_grad():
            new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_a_batch_answers_as_one_by_one(loaded: Loaded, batch_size: int) -> None:
    expected = [one_by_one(*loaded, prompt, 12) for prompt in PROMPTS]
    responses = respond(*loaded, PROMPTS, max_new_tokens=12, batch_size=batch_size)
    assert len(set(map(tuple, expected))) > 1
    assert [r.text for r in responses] == [loaded[1].decode(ids, skip_special_tokens=True) for ids in expected]
    assert [r.num_tokens for r in responses] == [len(ids) - (2 in ids) for ids in expected]


def test_it_ends_at_the_eos_and_says_what_was_cut(loaded: Loaded) -> None:
    model, tokenizer = loaded
    stop = one_by_one(model, tokenizer, PROMPTS[0], 4)[3]
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [stop]  # a stop of the model's own, beside the tokenizer's EOS
    try:
        responses = respond(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=6)
    finally:
        model.generation_config.eos_token_id = before
    first = responses[0]
    assert not first.cut
    assert first.num_tokens <= 3
    assert all(r.cut == (r.num_tokens == 12) for r in responses)
    assert respond(model, tokenizer, PROMPTS[:1], max_new_tokens=2, batch_size=1)[0].cut
