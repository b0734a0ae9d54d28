"""Detokenising piece by piece, stop strings, and prompts."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alpaca_ray.models import load_tokenizer
from alpaca_ray.serve.detokenizer import Detokenizer, StopMatcher, TokenBytes
from alpaca_ray.serve.engine import Delta, EngineError, Health, SamplingParams, TokenRequest
from alpaca_ray.serve.resume import Resuming
from alpaca_ray.serve.text import (
    Message,
    PromptError,
    TextDelta,
    TextLogprob,
    TextRequest,
    TokenizedModel,
    TokenPrompt,
    prompt_text,
)
from tests.scripted import END, ScriptedEngine

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


def pieces(tokenizer: PreTrainedTokenizerBase, prompt: str, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, tokenizer(prompt)["input_ids"])
    return [detokenizer.push([i]) for i in ids] + [detokenizer.push([], last=True)]


@settings(deadline=None)
@given(text=st.text(max_size=40))
def test_the_pieces_are_the_text_and_no_character_is_cut(bytes_tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    text = text.replace("\ufffd", "")
    got = pieces(bytes_tokenizer, PROMPT, bytes_tokenizer(text)["input_ids"])

    assert "".join(got) == text
    assert not any("\ufffd" in piece for piece in got)


@settings(deadline=None)
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


@settings(deadline=None)
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


def complete(model: TokenizedModel, request: TextRequest) -> list[TextDelta]:
    async def run() -> list[TextDelta]:
        return [delta async for delta in model.complete(request)]

    return asyncio.run(run())


def tokens_of(deltas: Sequence[TextDelta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


def logprobs_of(deltas: Sequence[TextDelta]) -> list[TextLogprob]:
    return [logprob for delta in deltas for logprob in delta.logprobs]


def test_a_stop_string_drops_the_request_from_the_engine(bytes_tokenizer: PreTrainedTokenizerBase) -> None:
    closed = asyncio.Event()

    class Watched(ScriptedEngine):
        async def generate(self, request: TokenRequest) -> AsyncGenerator[Delta, None]:
            try:
                async for delta in super().generate(request):
                    yield delta
                raise AssertionError("read to its end")
            finally:
                closed.set()

    engine = Watched(script=bytes_tokenizer("abc###def")["input_ids"])
    deltas = complete(TokenizedModel(engine, bytes_tokenizer), TextRequest("x", SamplingParams(), ("###",)))

    assert (deltas[-1].text, deltas[-1].finish_reason) == ("", "stop")
    assert closed.is_set()


def test_tokens_come_with_their_text_and_none_of_a_stop_string(bytes_tokenizer: PreTrainedTokenizerBase) -> None:
    engine = ScriptedEngine(script=bytes_tokenizer("a€#b##c")["input_ids"])
    request = TextRequest("x", SamplingParams(num_logprobs=0), ("##",))
    deltas = complete(TokenizedModel(engine, bytes_tokenizer), request)

    shown = "a€#b"
    assert "".join(delta.text for delta in deltas) == shown
    assert tokens_of(deltas) == bytes_tokenizer(shown)["input_ids"]
    assert b"".join(one.token for one in logprobs_of(deltas)) == shown.encode()
    assert [one.offset for one in logprobs_of(deltas)] == [1, 2, 2, 2, 3, 4]  # the prompt has one character
    assert sum(delta.num_tokens for delta in deltas) == len((shown + "##").encode())
    for so_far in range(len(deltas)):  # no token is told before its text is
        text = "".join(delta.text for delta in deltas[:so_far])
        told = b"".join(one.token for one in logprobs_of(deltas[:so_far]))
        assert text.encode().startswith(told) or told.startswith(text.encode())
        assert len(told.decode()) == len(text)


TEXTS = st.text("ab#€é", max_size=24)
STOPS = st.lists(st.text("ab#€", min_size=1, max_size=4), max_size=2).map(tuple)


@settings(deadline=None)
@given(text=TEXTS, stop=STOPS, chunks=st.lists(st.integers(1, 5), min_size=1, max_size=4), apart=st.booleans())
def test_what_is_shown_does_not_depend_on_the_chunks(
    bytes_tokenizer: PreTrainedTokenizerBase, text: str, stop: tuple[str, ...], chunks: list[int], apart: bool
) -> None:
    script = bytes_tokenizer(text)["input_ids"]
    request = TextRequest("x", SamplingParams(num_logprobs=1), stop)
    one_by_one = complete(TokenizedModel(ScriptedEngine(script), bytes_tokenizer), request)
    cut = TokenizedModel(ScriptedEngine(script, chunks=chunks, finishes_apart=apart), bytes_tokenizer)

    assert summary(complete(cut, request)) == summary(one_by_one)


def summary(deltas: Sequence[TextDelta]) -> tuple[Any, ...]:
    """All that a client can tell of a completion, but for its timing."""
    return (
        "".join(delta.text for delta in deltas),
        tokens_of(deltas),
        logprobs_of(deltas),
        sum(delta.num_tokens for delta in deltas),
        deltas[-1].finish_reason,
        {delta.num_prompt_tokens for delta in deltas},
        [delta.prompt for delta in deltas if delta.prompt is not None],
    )


@settings(deadline=None)
@given(
    text=TEXTS,
    stop=STOPS,
    chunks=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    deaths=st.lists(st.integers(1, 40), max_size=4, unique=True),
    apart=st.booleans(),
    echo=st.booleans(),
    max_tokens=st.one_of(st.none(), st.integers(1, 30)),
)
@example(  # what was shown ends within a stop string's beginning
    text="a#?#b", stop=("#y", "?#z"), chunks=[1], deaths=[5], apart=False, echo=False, max_tokens=None
)
def test_a_completion_outlives_the_engines_that_die(
    bytes_tokenizer: PreTrainedTokenizerBase,
    *,
    text: str,
    stop: tuple[str, ...],
    chunks: list[int],
    deaths: list[int],
    apart: bool,
    echo: bool,
    max_tokens: int | None,
) -> None:
    script = bytes_tokenizer(text)["input_ids"]
    request = TextRequest(PROMPT, SamplingParams(max_tokens=max_tokens, num_logprobs=1), stop, echo)
    undisturbed = complete(TokenizedModel(ScriptedEngine(script), bytes_tokenizer), request)
    engine = ScriptedEngine(script, chunks=chunks, deaths=deaths, finishes_apart=apart)
    model = TokenizedModel(engine, bytes_tokenizer)
    resuming = Resuming(lambda: model, max_attempts=len(deaths) + 1)

    async def run() -> list[TextDelta]:
        return [delta async for delta in resuming.complete(request)]

    assert summary(asyncio.run(run())) == summary(undisturbed)


def test_a_sampled_completion_goes_on_where_it_was(bytes_tokenizer: PreTrainedTokenizerBase) -> None:
    request = TextRequest("x", SamplingParams(max_tokens=50, seed=3))
    undisturbed = complete(TokenizedModel(ScriptedEngine(), bytes_tokenizer), request)
    engine = ScriptedEngine(deaths=range(7, 60, 7))
    model = TokenizedModel(engine, bytes_tokenizer)

    async def run() -> list[TextDelta]:
        return [delta async for delta in Resuming(lambda: model, max_attempts=20).complete(request)]

    assert summary(asyncio.run(run())) == summary(undisturbed)
    assert len(engine.requests) > 5


def test_a_request_is_tried_so_often_and_its_own_errors_never_again(bytes_tokenizer: PreTrainedTokenizerBase) -> None:
    engine = ScriptedEngine(deaths=range(100))
    model = TokenizedModel(engine, bytes_tokenizer)
    asked: list[TextRequest] = []

    class Counted:
        def complete(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
            asked.append(request)
            return model.complete(request)

        async def health(self) -> Health:
            return await model.health()

    async def run(request: TextRequest) -> None:
        async for _ in Resuming(Counted, max_attempts=3).complete(request):
            pass

    with pytest.raises(EngineError, match="died"):
        asyncio.run(run(TextRequest("x", SamplingParams())))
    assert len(asked) == 3
    with pytest.raises(PromptError):
        asyncio.run(run(TextRequest("", SamplingParams())))
    assert len(asked) == 4


def test_a_stream_that_just_ends_has_died() -> None:
    class Ends:
        async def complete(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
            yield TextDelta("ab", 1, 2, "length" if request.emitted else None, (7, 7))

        async def health(self) -> Health:
            return Health(0, 0)

    async def run() -> str:
        request = TextRequest("x", SamplingParams())
        return "".join([delta.text async for delta in Resuming(Ends, max_attempts=2).complete(request)])

    assert asyncio.run(run()) == "abab"


def test_the_prompt_is_echoed_with_its_logprobs(bytes_tokenizer: PreTrainedTokenizerBase) -> None:
    engine = ScriptedEngine(script=bytes_tokenizer("ab")["input_ids"])
    model = TokenizedModel(engine, bytes_tokenizer)
    ids = tuple(bytes_tokenizer("é!")["input_ids"])

    for prompt in ("é!", TokenPrompt(ids)):
        first, *others = complete(model, TextRequest(prompt, SamplingParams(num_logprobs=1), echo=True))
        assert first.prompt is not None
        assert (first.prompt.text, all(delta.prompt is None for delta in others)) == ("é!", True)
        assert [one.token for one in first.prompt.logprobs] == [b"\xc3", b"\xa9", b"!"]
        assert [one.logprob for one in first.prompt.logprobs] == [None, -float(ids[1]), -float(ids[2])]
        assert [one.offset for one in (*first.prompt.logprobs, *logprobs_of([first, *others]))] == [0, 0, 1, 2, 3]
        assert first.num_prompt_tokens == 3


def test_a_prompts_text_needs_no_engine(bytes_tokenizer: PreTrainedTokenizerBase) -> None:
    engine = ScriptedEngine()
    model = TokenizedModel(engine, bytes_tokenizer)
    ids = tuple(bytes_tokenizer("né?")["input_ids"])

    assert asyncio.run(prompt_text(model, TokenPrompt(ids))) == "né?"
    assert engine.requests == []
    with pytest.raises(PromptError, match="token id 259 is none of this model's 259"):
        asyncio.run(prompt_text(model, TokenPrompt((5, 259))))
    with pytest.raises(PromptError, match="empty"):
        asyncio.run(prompt_text(model, TokenPrompt(())))


@settings(deadline=None)
@given(text=st.text(max_size=30))
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(bytes_tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    token_bytes = TokenBytes(bytes_tokenizer)
    assert b"".join(token_bytes[i] for i in bytes_tokenizer(text)["input_ids"]) == text.encode()


def test_bytes_of_special_tokens_and_of_sentencepiece(
    bytes_tokenizer: PreTrainedTokenizerBase, words_tokenizer: PreTrainedTokenizerBase
) -> None:
    assert TokenBytes(bytes_tokenizer)[END] == b"</s>"
    assert TokenBytes(bytes_tokenizer)[100_000] == b""
    assert TokenBytes(words_tokenizer)[2] == b" two"
    backend = Tokenizer(models.BPE({"<unk>": 0, "<0xE2>": 1, "\u2581a": 2}, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    untyped: Any = PreTrainedTokenizerFast
    assert [TokenBytes(untyped(tokenizer_object=backend))[i] for i in (1, 2)] == [b"\xe2", b" a"]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, request: TextRequest, prompt_format: str) -> list[int]:
    engine = ScriptedEngine(script=())
    complete(TokenizedModel(engine, tokenizer, "plain" if prompt_format == "plain" else "chat_template"), request)
    return list(engine.requests[0].prompt_token_ids)


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
