"""The loss of given answers, against transformers' own."""

import math
import re
from pathlib import Path
from typing import cast

import pytest
import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from alpaca_ray import models
from alpaca_ray.evaluate.loss import _encode, answer_loss, answer_losses, set_threads
from alpaca_ray.prompts import prompt_of
from alpaca_ray.schema import Example
from alpaca_ray.train.encoding import Encoded, encode

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]

EXAMPLES = [
    Example("a", "Name a colour.", "", "Red."),
    Example("b", "Translate to French.", "Good morning, my friend", "Bonjour, mon ami. C'est une belle journée."),
    Example("c", "Say nothing much.", "", "x"),
    Example("d", "Add the numbers.", "3 and 4", "7\n\nbecause 3 + 4 = 7"),
]


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> Loaded:
    set_threads(1)  # on a busy machine, threads that wait for each other make tiny products slow
    return models.load_model(str(tiny_model), "float32"), models.load_tokenizer(str(tiny_model))


def independent_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[float, int]:
    """Summed nats and target tokens from transformers' `labels=`, one example at a time, no padding.

    The byte-level tokenizer gives one token a byte, so that the text alone says how many tokens are answer.
    """
    text = prompt_of(example) + example.output
    ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    targets = len(example.output.encode()) + 1
    labels = ids.clone()
    labels[:, :-targets] = -100
    with torch.no_grad():
        return model(input_ids=ids, labels=labels).loss.item() * targets, targets


def test_equals_the_loss_of_transformers(loaded: Loaded) -> None:
    expected = [independent_loss(*loaded, example) for example in EXAMPLES]
    losses = answer_losses(*loaded, EXAMPLES, max_length=1024, batch_size=3)
    assert [loss.target_tokens for loss in losses if loss] == [tokens for _, tokens in expected]
    assert [loss.nats for loss in losses if loss] == pytest.approx([nats for nats, _ in expected], rel=1e-4)

    report = answer_loss(*loaded, EXAMPLES, max_length=1024, batch_size=3)
    assert report.loss == pytest.approx(sum(n for n, _ in expected) / sum(t for _, t in expected), rel=1e-4)
    assert (report.examples, report.skipped_too_long) == (4, 0)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 9])
def test_neither_the_batch_size_nor_the_padding_changes_it(loaded: Loaded, batch_size: int) -> None:
    alone = [answer_loss(*loaded, [example], 1024, 1).loss for example in EXAMPLES]
    losses = answer_losses(*loaded, EXAMPLES, 1024, batch_size)
    assert [x.nats / x.target_tokens for x in losses if x] == pytest.approx(alone, rel=1e-4)


def test_an_untrained_model_knows_nothing(loaded: Loaded) -> None:
    report = answer_loss(*loaded, EXAMPLES, max_length=1024, batch_size=4)
    assert report.loss == pytest.approx(math.log(loaded[0].config.vocab_size), rel=0.1)


def test_what_is_too_long_is_counted_and_left_out(loaded: Loaded) -> None:
    longest = max(len((prompt_of(e) + e.output).encode()) + 1 for e in EXAMPLES)
    everything = answer_loss(*loaded, EXAMPLES, max_length=longest, batch_size=4)
    one_less = answer_losses(*loaded, EXAMPLES, max_length=longest - 1, batch_size=4)
    assert everything.skipped_too_long == 0
    assert [loss is None for loss in one_less] == [e.id == "b" for e in EXAMPLES]
    nothing = answer_loss(*loaded, EXAMPLES, max_length=5, batch_size=4)
    assert (nothing.loss, nothing.examples, nothing.skipped_too_long) == (None, 0, 4)


class MergingTokenizer:
    """Of characters, but ":)" is one token (1), as is "</s>" (2) unless special tokens are split."""

    eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool = True, split_special_tokens: bool = False) -> BatchEncoding:
        tokens = re.findall(r":\)|." if split_special_tokens else r":\)|</s>|.", text, re.DOTALL)
        return BatchEncoding({"input_ids": [{":)": 1, "</s>": 2}.get(token) or ord(token) for token in tokens]})


@pytest.mark.parametrize("answer", ["Red.", ") a smile", "</s> ends a text", "\n1. One"])
def test_it_scores_the_very_ids_that_training_learns(loaded: Loaded, answer: str) -> None:
    """Two stages may not import each other, so that each has the rule; here they are held together."""
    example = Example("a", "Name a colour.", "", answer)
    for tokenizer in (loaded[1], cast(PreTrainedTokenizerBase, MergingTokenizer())):
        ours, theirs = _encode(tokenizer, 0, example), encode(example, tokenizer, "alpaca", max_length=9999)
        assert isinstance(theirs, Encoded)
        assert ours.input_ids == theirs.input_ids
        assert len(ours.input_ids) - ours.num_prompt_tokens == theirs.num_targets
