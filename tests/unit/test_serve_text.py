"""Detokenising piece by piece, stop strings, and prompts."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alpaca_ray.models import load_tokenizer
from alpaca_ray.serve.engine import Delta, Health, SamplingParams, TokenRequest
from alpaca_ray.serve.text import Detokenizer, Message, PromptError, StopMatcher, TextRequest, TokenizedModel

PROMPT = "Été: "


@pytest.fixture(scope="module")
def bytes_tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny_model))


@pytest.fixture(scope="module")
def words_tokenizer() -> PreTrainedTokenizerBase:
    """Words with the space in front, dropped at the beginning of a text, as SentencePiece models have it."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "▁one", "▁two", "▁three"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    untyped: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerBase = untyped(tokenizer_object=backend, unk_token="<unk>")
    return tokenizer


class Script:
    """An Engine that says what it was given, token by token, and remembers what it was asked."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids = token_ids
        self.num_sent = 0
        self.request: TokenRequest | None = None
        self.closed = False

    async def generate(self, request: TokenRequest) -> AsyncGenerator[Delta, None]:
        self.request = request
        try:
            for token_id in self.token_ids:
                self.num_sent += 1
                yield Delta((token_id,))
            yield Delta((), "stop")
        finally:
            self.closed = True

    async def health(self) -> Health:
        return Health(0, 0)


def pieces(tokenizer: PreTrainedTokenizerBase, prompt: str, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, tokenizer(prompt)["input_ids"])
    return [detokenizer.push([i]) for i in ids] + [detokenizer.push([], last=True)]


@given(text=st.text(max_size=40))
def test_the_pieces_are_the_text_and_no_character_is_cut(bytes_tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    text = text.replace("\ufffd", "")
    got = pieces(bytes_tokenizer, PROMPT, bytes_tokenizer(text)["input_ids"])

    assert "".join(got) == text
    assert not any("\ufffd" in piece for piece in got)


@given(ids=st.lists(st.integers(3, 258), max_size=30))
def test_broken_bytes_come_out_as_in_one_decoding(bytes_tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    assert "".join(pieces(bytes_tokenizer, PROMPT, ids)) == bytes_tokenizer.decode(ids)


def test_a_euro_sign_waits_for_its_third_byte(bytes_tokenizer: PreTrainedTokenizerBase) -> None:
    assert pieces(bytes_tokenizer, "a", bytes_tokenizer("€")["input_ids"]) == ["", "", "€", ""]


def test_the_space_before_a_word_is_kept_right_after_the_prompt(words_tokenizer: PreTrainedTokenizerBase) -> None:
    ids = words_tokenizer("two three")["input_ids"]
    assert words_tokenizer.decode(ids) == "two three"
    assert pieces(words_tokenizer, "one", ids) == [" two", " three", ""]


def shown(stop: Sequence[str], chunks: Sequence[str]) -> tuple[list[str], bool]:
    matcher = StopMatcher(stop)
    out: list[str] = []
    for i, chunk in enumerate(chunks):
        text, stopped = matcher.push(chunk, last=i == len(chunks) - 1)
        out.append(text)
        if stopped:
            return out, True
    return out, False


@given(
    text=st.text("ab#\n", max_size=20),
    stop=st.text("ab#\n", min_size=1, max_size=4),
    cuts=st.sets(st.integers(0, 20)),
)
def test_the_text_ends_before_the_stop_string_wherever_it_is_cut(text: str, stop: str, cuts: set[int]) -> None:
    borders = sorted({0, len(text)} | {cut for cut in cuts if cut < len(text)})
    chunks = [text[a:b] for a, b in pairwise(borders)] or [""]

    out, stopped = shown([stop], chunks)

    assert "".join(out) == text.partition(stop)[0]
    assert stopped == (stop in text)


def test_what_may_begin_a_stop_string_is_held_back_and_then_let_go() -> None:
    assert shown(["###"], ["a#", "#", "b", "#"]) == (["a", "", "##b", "#"], False)
    assert shown(["\n\n", "END"], ["x E", "ND y"]) == (["x ", ""], True)


def test_a_stop_string_drops_the_request_from_the_engine(bytes_tokenizer: PreTrainedTokenizerBase) -> None:
    engine = Script(bytes_tokenizer("abc###def")["input_ids"])

    async def run() -> list[tuple[str, str | None]]:
        request = TextRequest("x", SamplingParams(), ("###",))
        return [(d.text, d.finish_reason) async for d in TokenizedModel(engine, bytes_tokenizer).complete(request)]

    assert asyncio.run(run())[-1] == ("", "stop")
    assert engine.num_sent == len("abc###")
    assert engine.closed


def prompt_ids(tokenizer: PreTrainedTokenizerBase, request: TextRequest, prompt_format: str) -> list[int]:
    engine = Script([])

    async def run() -> None:
        model = TokenizedModel(engine, tokenizer, "plain" if prompt_format == "plain" else "chat_template")
        async for _ in model.complete(request):
            pass

    asyncio.run(run())
    assert engine.request is not None
    return list(engine.request.prompt_token_ids)


def test_prompts_reach_the_engine_as_their_format_says(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    chat = TextRequest((Message("system", "S"), Message("user", "U")), SamplingParams())

    with pytest.raises(PromptError, match="no chat template"):
        prompt_ids(tokenizer, chat, "chat_template")
    assert tokenizer.decode(prompt_ids(tokenizer, chat, "plain")) == "S\nU"
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    assert tokenizer.decode(prompt_ids(tokenizer, chat, "chat_template")) == "[system]S[user]U[assistant]"
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(PromptError, match="roles must alternate"):
        prompt_ids(tokenizer, chat, "chat_template")
    with pytest.raises(PromptError, match="empty"):
        prompt_ids(tokenizer, TextRequest("", SamplingParams()), "plain")
