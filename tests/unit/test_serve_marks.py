"""No way through the engine leads past the mark: real tokens of the tiny model, judged by the lists they should obey.

With a delta of 1000 nothing else decides the colour, so each token has to be green by the one before it.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alpaca_ray.models import load_model, load_tokenizer
from alpaca_ray.safety.watermark import Watermark
from alpaca_ray.serve.decoder import Chunk, Decoder, ModuleDecoder
from alpaca_ray.serve.engine import Delta, EngineError, Health, SamplingParams, TokenRequest
from alpaca_ray.serve.grammar import Grammars
from alpaca_ray.serve.resume import Resuming
from alpaca_ray.serve.text import TextRequest, TokenizedModel
from alpaca_ray.serve.torch_engine import TorchEngine, decoder_for, end_token_ids
from tests.serving import CHAT_TEMPLATE, http
from tests.tiny import write_tiny_model

KEY = 3_141_592_653_589_793_237
TINY = 259  # the tiny model's vocabulary
MAX_LENGTH, PREFILL_CHUNK = 160, 16
DEADLINE_S = 60.0
IDS = st.integers(3, TINY - 1)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> PreTrainedModel:
    return load_model(str(tiny_model), "float32")


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def decisive() -> Watermark:
    return Watermark(KEY, delta=1000.0, vocab_size=TINY)


def engine_over(decoder: Decoder, model: PreTrainedModel, watermark: Watermark, **more: Any) -> TorchEngine:
    return TorchEngine(decoder, end_token_ids(model), marks=watermark.bias, prefill_chunk=PREFILL_CHUNK, **more)


@pytest.fixture(scope="module", params=["own forward pass", "transformers' code"])
def engine(request: pytest.FixtureRequest, model: PreTrainedModel, decisive: Watermark) -> Iterator[TorchEngine]:
    own = request.param == "own forward pass"
    decoder = decoder_for(model, 4, MAX_LENGTH) if own else ModuleDecoder(model, 4, MAX_LENGTH)
    engine = engine_over(decoder, model, decisive)
    yield engine
    engine.close()


async def tokens(engine: TorchEngine, request: TokenRequest, leave_after: int | None = None) -> list[int]:
    """What it emitted, up to the end or until its consumer left."""
    got: list[int] = []
    async with aclosing(engine.generate(request)) as deltas:
        async for delta in deltas:
            got += delta.token_ids
            if leave_after is not None and len(got) >= leave_after:
                break
    return got


def together(engine: TorchEngine, requests: Sequence[tuple[TokenRequest, int | None]]) -> list[list[int]]:
    async def run() -> list[list[int]]:
        async with asyncio.timeout(DEADLINE_S):
            return await asyncio.gather(*(tokens(engine, request, leave) for request, leave in requests))

    return asyncio.run(run())


def red(watermark: Watermark, previous: int, token_ids: Sequence[int]) -> list[tuple[int, int, int]]:
    """(place, previous, token) of each token that the mark did not choose."""
    pairs = enumerate(pairwise([previous, *token_ids]))
    return [(i, before, token) for i, (before, token) in pairs if not watermark.green_mask(before)[token]]


@st.composite
def requests(draw: st.DrawFn) -> tuple[TokenRequest, int | None]:
    sampling = SamplingParams(
        max_tokens=draw(st.integers(8, 24)),
        temperature=draw(st.sampled_from([0.0, 0.01, 0.7, 1.0, 2.0])),
        top_p=draw(st.sampled_from([1.0, 0.9, 1e-9])),
        top_k=draw(st.sampled_from([0, 1, 5, 1000])),
        seed=draw(st.one_of(st.none(), st.integers(0, 100))),
        presence_penalty=draw(st.sampled_from([0.0, 2.0, -2.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 2.0, -2.0])),
        num_logprobs=draw(st.sampled_from([None, 0, 3])),
    )
    request = TokenRequest(
        tuple(draw(st.lists(IDS, min_size=1, max_size=3 * PREFILL_CHUNK))),
        sampling,
        stop_token_ids=frozenset(draw(st.lists(IDS, max_size=2))),
        emitted=tuple(draw(st.lists(IDS, max_size=6))),
        echoes_logprobs=draw(st.booleans()),
    )
    return request, draw(st.sampled_from([None, None, 1, 5]))


@given(batch=st.lists(requests(), min_size=1, max_size=7))  # 7 requests in 4 slots: some wait, some leave
@settings(deadline=None, max_examples=20)
def test_every_token_is_green_whatever_is_asked(
    engine: TorchEngine, decisive: Watermark, batch: list[tuple[TokenRequest, int | None]]
) -> None:
    for (request, _), token_ids in zip(batch, together(engine, batch), strict=True):
        last = (*request.prompt_token_ids, *request.emitted)[-1]
        assert not red(decisive, last, token_ids), request


class Flaky:
    """A Decoder that breaks every second step of several rows, before or after its work is done."""

    def __init__(self, decoder: Decoder) -> None:
        self.num_slots, self.max_length, self.vocab_size = decoder.num_slots, decoder.max_length, decoder.vocab_size
        self.device, self.release, self._decoder = decoder.device, decoder.release, decoder
        self.num_calls = self.num_broken = 0

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        self.num_calls += len(chunks) > 1
        breaks = len(chunks) > 1 and self.num_calls % 2 == 0
        self.num_broken += breaks
        if breaks and self.num_broken % 2 == 0:
            raise RuntimeError("before")
        logits = self._decoder.forward(chunks)
        if breaks:
            raise RuntimeError("after")
        return logits


def test_a_step_that_failed_is_repeated_with_its_marks(model: PreTrainedModel, decisive: Watermark) -> None:
    asked: list[list[int]] = []

    def breaking_marks(previous: Sequence[int]) -> Tensor:
        asked.append(list(previous))
        if len(previous) > 1 and len(asked) % 5 == 0:
            raise RuntimeError("no marks")
        return decisive.bias(previous)

    flaky = Flaky(decoder_for(model, 4, MAX_LENGTH))
    engine = TorchEngine(flaky, marks=breaking_marks, prefill_chunk=PREFILL_CHUNK)
    batch = [TokenRequest(tuple(range(9, 9 + n)), SamplingParams(20, seed=n)) for n in (1, 20, 40)]

    answers = together(engine, [(request, None) for request in batch])
    engine.close()

    assert flaky.num_broken > 4
    for request, token_ids in zip(batch, answers, strict=True):
        assert len(token_ids) == 20
        assert not red(decisive, request.prompt_token_ids[-1], token_ids)


class Mortal:
    """An Engine that dies after so many tokens of each request, and notes what it gave."""

    def __init__(self, engine: TorchEngine, num_tokens: int | None = None) -> None:
        self._engine, self._num_tokens = engine, num_tokens
        self.given: list[tuple[TokenRequest, list[int]]] = []

    async def generate(self, request: TokenRequest) -> AsyncGenerator[Delta, None]:
        mine: list[int] = []
        self.given.append((request, mine))
        async with aclosing(self._engine.generate(request)) as deltas:
            async for delta in deltas:
                mine += delta.token_ids
                yield delta
                if len(mine) == self._num_tokens:
                    raise EngineError("lost")

    async def health(self) -> Health:
        return await self._engine.health()


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_a_stream_is_marked_across_the_deaths_of_its_engines(
    engine: TorchEngine, tokenizer: PreTrainedTokenizerBase, decisive: Watermark, temperature: float
) -> None:
    mortal = Mortal(engine, 7)
    resuming = Resuming(lambda: TokenizedModel(mortal, tokenizer), 6)
    request = TextRequest("Say: ", SamplingParams(30, temperature, seed=1))

    async def run() -> list[int]:
        async with asyncio.timeout(DEADLINE_S), aclosing(resuming.complete(request)) as deltas:
            return [token async for delta in deltas for token in delta.token_ids]

    token_ids = asyncio.run(run())

    assert len(mortal.given) > 3
    assert len(token_ids) == 30
    assert not red(decisive, mortal.given[0][0].prompt_token_ids[-1], token_ids)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_schema_leaves_the_mark_what_choice_it_leaves(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decisive: Watermark, temperature: float
) -> None:
    """Each token is green, or no green one was allowed there."""
    schema = '{"type": "object", "properties": {"name": {"type": "string", "minLength": 40}}, "required": ["name"]}'
    grammars = Grammars(tokenizer, TINY)
    engine = engine_over(decoder_for(model, 4, MAX_LENGTH), model, decisive, grammars=grammars)
    sampling = SamplingParams(60, temperature, seed=3, json_schema=schema)

    (token_ids,) = together(engine, [(TokenRequest((9, 10), sampling), None)])
    engine.close()

    grammar, chosen = grammars.start(schema), 0
    for previous, token in pairwise([10, *token_ids]):
        green = torch.from_numpy(grammar.allowed()) & decisive.green_mask(previous)
        assert green[token] or not green.any()
        chosen += int(green.any())
        grammar.append(token)
    assert chosen > 30


SAMPLED: dict[str, Any] = {"model": "tiny", "temperature": 1.1, "seed": 11, "max_tokens": 120}
CHAT: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."}]
COMPLETIONS: list[dict[str, Any]] = [
    {"prompt": "Say: "},
    {"prompt": ["The sky is", "a", "One, two, three, "]},
    {"prompt": [72, 101, 108], "echo": True},
    {"prompt": "Say: ", "n": 3},
    {"prompt": "Say: ", "logprobs": 2, "echo": True},
    {"prompt": "Say: ", "stop": ["never there", "nor this"]},
    {"prompt": "Say: ", "stream": True, "stream_options": {"include_usage": True}, "n": 2},
    {"prompt": "Say: ", "top_p": 0.8, "top_k": 100},
    {"prompt": "Say: ", "frequency_penalty": 0.5, "presence_penalty": 0.5},
    {"prompt": "Say: ", "seed": None, "temperature": 0.8},
    {"prompt": "x" * 30},
]
CHATS: list[dict[str, Any]] = [
    {},
    {"n": 2, "logprobs": True, "top_logprobs": 3},
    {"stream": True},
    {"max_tokens": None, "max_completion_tokens": 110},
]


def test_every_long_sampled_answer_of_the_api_is_detected(tmp_path: Path) -> None:
    """With the delta that is served. The tiny model has 5.5 nats at each token, nearly all that 259 can have."""
    endless = str(write_tiny_model(tmp_path / "endless", ends=False))
    watermark = Watermark(KEY, vocab_size=TINY)
    model, tokenizer = load_model(endless, "float32"), load_tokenizer(endless)
    tokenizer.chat_template = CHAT_TEMPLATE
    engine = engine_over(decoder_for(model, 8, 256), model, watermark)
    tapped = Mortal(engine)
    api = http(TokenizedModel(tapped, tokenizer))
    for asked in COMPLETIONS:
        assert api.post("/v1/completions", json=SAMPLED | asked).status_code == 200
    for asked in CHATS:
        assert api.post("/v1/chat/completions", json=SAMPLED | {"messages": CHAT} | asked).status_code == 200
    engine.close()

    found = [watermark.detect([request.prompt_token_ids[-1], *ids], 1) for request, ids in tapped.given]
    assert len(found) == 21
    assert all(len(ids) >= 100 for _, ids in tapped.given)
    assert [one.render() for one in found if one.verdict != "marked"] == []


def test_no_field_switches_the_mark_off(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    class Never(Mortal):
        async def generate(self, request: TokenRequest) -> AsyncGenerator[Delta, None]:
            raise AssertionError("it was let through")
            yield

    engine = TorchEngine(decoder_for(model, 1, 64))
    api = http(TokenizedModel(Never(engine), tokenizer))
    invented = {"watermark": False, "watermarking_config": None, "delta": 0, "gamma": 1, "emitted": [5], "marks": None}
    for field, value in (invented | {"logit_bias": {"5": 100}, "logits_processors": []}).items():
        for path, prompt in (("completions", {"prompt": "x"}), ("chat/completions", {"messages": CHAT})):
            response = api.post(f"/v1/{path}", json=SAMPLED | prompt | {field: value})
            assert (response.status_code, response.json()["error"]["param"]) == (400, field)
    engine.close()
