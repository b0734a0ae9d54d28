"""What the model is to learn from an example: its answer and the end, no more and no less."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alpaca_ray.prompts import prompt_of
from alpaca_ray.schema import Example, Reject
from alpaca_ray.train.encoding import IGNORE_INDEX, Encoded, encode

LONG = 100_000
ODD = st.sampled_from(
    ["</s>", "<s>", "### Response:", "\n\n", " ", ":)", "é", "e\u0301", "👩‍🚀", "\u2028", "\x00", "{x}"]
)
TEXT = st.lists(st.one_of(ODD, st.text(st.characters(exclude_categories=["Cs"]), max_size=8)), max_size=6).map("".join)
ANSWER = TEXT.filter(str.strip)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_model)
    return loaded


def wrap(backend: Tokenizer) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def llama_like() -> PreTrainedTokenizerBase:
    """As Llama's: a BOS before plain text, and a "▁" before the first word of what it sees."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    backend = Tokenizer(
        tokenizer_models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrap(backend)


def merging() -> PreTrainedTokenizerBase:
    """A byte-level BPE that writes ":)" as one token."""
    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), ":)"]
    backend = Tokenizer(tokenizer_models.BPE({w: i for i, w in enumerate(words)}, [(":", ")")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return wrap(backend)


def encoded(example: Example, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    result = encode(example, tokenizer, "alpaca", LONG)
    assert isinstance(result, Encoded)
    return result


def targets(row: Encoded) -> list[int]:
    return [label for label in row.labels if label != IGNORE_INDEX]


@settings(max_examples=200, deadline=None)
@given(instruction=TEXT, input=TEXT, answer=ANSWER)
def test_the_labels_decode_to_the_answer_and_the_end(
    tokenizer: PreTrainedTokenizerBase, instruction: str, input: str, answer: str
) -> None:
    example = Example("a", instruction, input, answer)
    row = encoded(example, tokenizer)
    prompt_ids = tokenizer(prompt_of(example)).input_ids

    assert tokenizer.decode(targets(row)) == answer + "</s>"
    assert row.input_ids == prompt_ids + targets(row)
    assert row.labels[: len(prompt_ids)] == [IGNORE_INDEX] * len(prompt_ids)
    assert row.num_targets == len(row.labels) - len(prompt_ids)


@pytest.mark.parametrize("answer", [":)", ")", "):) fine", "plain"])
def test_a_merge_over_the_border_takes_nothing_from_the_answer(answer: str) -> None:
    tokenizer = merging()
    example = Example("a", "Smile", "", answer)
    assert tokenizer(":)").input_ids == [tokenizer.convert_tokens_to_ids(":)")]

    row = encoded(example, tokenizer)

    assert tokenizer.decode(targets(row)) == answer + "</s>"
    assert row.input_ids[: -row.num_targets] == tokenizer(prompt_of(example)).input_ids


def test_llama_gets_its_bos_and_no_space_before_the_answer() -> None:
    tokenizer = llama_like()
    row = encoded(Example("a", "Say hello", "", "Hello you"), tokenizer)

    assert row.input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.convert_ids_to_tokens(targets(row)[:1]) == ["<0x48>"]
    assert tokenizer.decode(targets(row)) == "Hello you</s>"


def test_a_quoted_end_token_is_no_end(tokenizer: PreTrainedTokenizerBase) -> None:
    row = encoded(Example("a", "How does a sentence end?", "", "With </s>, then more"), tokenizer)
    assert row.input_ids.count(tokenizer.eos_token_id) == 1


def test_an_example_is_kept_whole_or_rejected(tokenizer: PreTrainedTokenizerBase) -> None:
    example = Example("a", "Count", "", "one two three")
    length = len(encoded(example, tokenizer).input_ids)

    assert isinstance(encode(example, tokenizer, "alpaca", length), Encoded)
    too_long = encode(example, tokenizer, "alpaca", length - 1)
    assert isinstance(too_long, Reject)
    assert too_long.reason == "too_long"
    assert too_long.text.endswith("one two three")


@pytest.mark.parametrize("blank", ["", " ", "\n\t"])
def test_a_blank_answer_is_rejected(tokenizer: PreTrainedTokenizerBase, blank: str) -> None:
    rejected = encode(replace(Example("a", "Count", "", "x"), output=blank), tokenizer, "alpaca", LONG)
    assert isinstance(rejected, Reject)
    assert rejected.reason == "empty_answer"
