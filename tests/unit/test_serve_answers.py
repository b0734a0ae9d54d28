"""Choices, log-probabilities, echo and counts, as the official client reads them."""

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import ASGIApp, Receive, Scope, Send

from alpaca_ray.models import load_tokenizer
from alpaca_ray.serve.answers import token_text
from alpaca_ray.serve.api import create_api
from alpaca_ray.serve.engine import EngineError
from alpaca_ray.serve.protocol import seed_of_choice
from alpaca_ray.serve.text import TextModel, TokenizedModel, TokenPrompt
from alpaca_ray.serve.visit import Ticket
from tests.scripted import ScriptedEngine
from tests.serving import CHAT_TEMPLATE, Pieces, client_of, http


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> TokenizedModel:
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = CHAT_TEMPLATE
    return TokenizedModel(ScriptedEngine(vocabulary=tokenizer("abcdefghij €é")["input_ids"]), tokenizer)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        ([5, 6], [TokenPrompt((5, 6))]),
        ([[5, 6], [7]], [TokenPrompt((5, 6)), TokenPrompt((7,))]),
    ],
)
def test_each_form_of_a_prompt_has_n_choices_in_order(prompt: Any, prompts: list[Any]) -> None:
    model = Pieces("x")
    answer = client_of(model).completions.create(model="tiny", prompt=prompt, n=2, best_of=2, seed=4)

    assert [request.prompt for request in model.requests] == [one for one in prompts for _ in range(2)]
    assert [request.sampling.seed for request in model.requests] == [4, seed_of_choice(4, 1)] * len(prompts)
    assert [choice.index for choice in answer.choices] == list(range(2 * len(prompts)))
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3 * len(prompts), 2 * len(prompts))


@settings(deadline=None)
@given(seed=st.integers(-(2**63), 2**63 - 1))
def test_each_choice_has_a_seed_of_its_own(seed: int) -> None:
    seeds = [seed_of_choice(seed, choice) for choice in range(128)]

    assert seeds[0] == seed
    assert len(set(seeds)) == 128
    assert all(one is not None and -(2**63) <= one < 2**63 for one in seeds)
    assert seed_of_choice(None, 3) is None


def test_the_choices_of_a_streamed_chat_are_the_whole_ones(tiny: TextModel) -> None:
    client = client_of(tiny)
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "seed": 3, "n": 3}
    asked |= {"max_tokens": 9, "logprobs": True, "top_logprobs": 2}

    whole = client.chat.completions.create(**asked)
    events = list(client.chat.completions.create(**asked, stream=True))

    for choice in whole.choices:
        mine = [event.choices[0] for event in events if event.choices[0].index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(one.delta.content or "" for one in mine) == choice.message.content
        assert choice.logprobs is not None
        streamed = [token for one in mine if one.logprobs for token in one.logprobs.content or []]
        assert streamed == choice.logprobs.content
        told = bytes(byte for token in streamed for byte in token.bytes or [])
        assert told.decode("utf-8", "replace") == choice.message.content
        assert [len(token.top_logprobs) for token in streamed] == [2] * len(streamed)
    assert len({choice.message.content for choice in whole.choices}) == 3


def test_logprobs_of_a_completion_are_lists_of_one_length(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    script = tokenizer("€a")["input_ids"]
    client = client_of(TokenizedModel(ScriptedEngine(script=script), tokenizer))

    whole = client.completions.create(model="tiny", prompt="pé", logprobs=1, echo=True).choices[0]
    plain = client.completions.create(model="tiny", prompt="pé", logprobs=0).choices[0]
    events = list(client.completions.create(model="tiny", prompt="pé", logprobs=1, echo=True, stream=True))

    assert whole.text == "pé€a" == "".join(event.choices[0].text for event in events)
    assert whole.logprobs is not None
    pieces = [token_text(bytes([byte])) for byte in "é€".encode()]
    assert pieces[0] == r"bytes:\xc3"
    assert whole.logprobs.tokens == ["p", *pieces, "a"]
    assert whole.logprobs.text_offset == [0, 1, 1, 2, 2, 2, 3]
    assert whole.logprobs.token_logprobs is not None
    assert whole.logprobs.token_logprobs[0] is None
    assert whole.logprobs.token_logprobs[3:] == [-float(token) for token in script]
    assert whole.logprobs.top_logprobs is not None
    assert whole.logprobs.top_logprobs[0] is None
    assert whole.logprobs.top_logprobs[6] == {"!": -1.0, "a": -float(script[3])}  # the token itself comes on top
    assert plain.logprobs is not None
    assert plain.logprobs.text_offset == [2, 2, 2, 3]  # from the beginning of the prompt, as OpenAI counts
    own = [{token: -float(i)} for token, i in zip([*pieces[2:], "a"], script, strict=True)]
    assert plain.logprobs.top_logprobs == own
    streamed = [event.choices[0].logprobs for event in events if event.choices[0].logprobs]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [item for one in streamed for item in getattr(one, name)] == getattr(whole.logprobs, name)


def test_an_echo_of_nothing_more_is_the_prompt(tiny: TextModel) -> None:
    client = client_of(tiny)
    answer = client.completions.create(model="tiny", prompt=["abc", "é"], echo=True, max_tokens=0, logprobs=5)
    without = client.completions.create(model="tiny", prompt="abc", echo=True, max_tokens=0)

    assert [choice.text for choice in answer.choices] == ["abc", "é"]
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert [len(choice.logprobs.tokens or []) for choice in answer.choices if choice.logprobs] == [3, 2]
    assert without.choices[0].text == "abc"
    assert without.choices[0].logprobs is None
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 0)


def test_usage_stands_in_every_event_if_it_was_asked_for() -> None:
    body = {"model": "tiny", "prompt": "x", "stream": True, "stream_options": {"include_usage": True}}
    lines = http(Pieces("a")).post("/v1/completions", json=body).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    assert [event["usage"] for event in events[:-1]] == [None, None]
    assert events[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}


@pytest.mark.parametrize("stream", [True, False])
def test_admission_hears_what_was_spent(stream: bool) -> None:
    tickets = []

    def with_ticket(model: TextModel) -> ASGIApp:
        api = create_api(model, "tiny")

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            tickets.append(Ticket("1", None))
            await api({**scope, "state": {"ticket": tickets[-1]}}, receive, send)

        return app

    body = {"model": "tiny", "prompt": ["x", "y"], "stream": stream}
    for pieces in (("a", "b"), ("a", EngineError("late")), (EngineError("at once"),)):
        TestClient(with_ticket(Pieces(*pieces)), raise_server_exceptions=False).post("/v1/completions", json=body)

    whole, broken, nothing = (ticket.num_tokens for ticket in tickets)
    assert (whole, nothing) == (10, None)
    assert broken in (4, 8)  # one prompt and a token, or both
