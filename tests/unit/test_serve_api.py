"""The HTTP API, read by the official client: over ASGI where that is enough, over a real port for disconnects."""

import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from alpaca_ray.config import UserError
from alpaca_ray.models import load_tokenizer
from alpaca_ray.safety.detection import Detection, detection
from alpaca_ray.safety.verdict import ModerationUnavailableError
from alpaca_ray.serve.engine import EngineError, Health
from alpaca_ray.serve.moderated import ContentFilterError
from alpaca_ray.serve.text import Message, TextDelta, TextModel, TextRequest, TokenizedModel
from tests.scripted import ScriptedEngine
from tests.serving import CHAT_TEMPLATE, Pieces, client_of, error_of, http, served

DEADLINE_S = 20.0
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> TokenizedModel:
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = CHAT_TEMPLATE
    return TokenizedModel(ScriptedEngine(vocabulary=tokenizer("abcdefghij €é")["input_ids"]), tokenizer)


def test_the_models_are_listed_and_found(tiny: TextModel) -> None:
    client = client_of(tiny)
    assert [(m.id, m.created) for m in client.models.list()] == [("tiny", 7)]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.models.retrieve("other/model")


def test_it_lives_without_an_engine_but_is_not_ready() -> None:
    class Dead(Pieces):
        async def health(self) -> Health:
            raise EngineError("at /secret/path")

    assert http(Dead()).get("/health").json() == {"status": "ok"}
    assert http(Pieces()).get("/ready").json() == {"status": "ok", "num_running": 0, "num_waiting": 0}
    response = http(Dead()).get("/ready")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_error")
    assert "secret" not in response.text


def test_a_streamed_completion_is_the_whole_one(tiny: TextModel) -> None:
    client = client_of(tiny)
    asked: dict[str, Any] = {"model": "tiny", "prompt": "Say: ", "max_tokens": 40, "temperature": 1.2, "seed": 5}

    whole = client.completions.create(**asked)
    events = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))

    assert "".join(event.choices[0].text for event in events[:-1]) == whole.choices[0].text
    assert [event.choices[0].finish_reason for event in events[:-1]][-1] == whole.choices[0].finish_reason == "length"
    assert events[-1].choices == []
    assert events[-1].usage == whole.usage
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (5, 40, 45)


def test_a_streamed_chat_is_the_whole_one(tiny: TextModel) -> None:
    client = client_of(tiny)
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "max_completion_tokens": 12,
        "temperature": 0,
    }

    whole = client.chat.completions.create(**asked)
    events = list(client.chat.completions.create(**asked, stream=True))

    assert whole.choices[0].message.role == events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events) == whole.choices[0].message.content
    assert events[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len("user: Hi\nassistant:")


def test_a_chat_without_a_limit_fills_the_context(tiny: TextModel) -> None:
    answer = client_of(tiny).chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x" * 200}], temperature=0
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == 256 or answer.choices[0].finish_reason == "stop"


def test_a_list_of_prompts_gives_a_choice_each(tiny: TextModel) -> None:
    client = client_of(tiny)
    prompts = ["a", "bcd", "ef"]
    alone = [client.completions.create(model="tiny", prompt=p, temperature=0).choices[0].text for p in prompts]

    whole = client.completions.create(model="tiny", prompt=prompts, temperature=0)
    streamed = ["", "", ""]
    for event in client.completions.create(model="tiny", prompt=prompts, temperature=0, stream=True):
        streamed[event.choices[0].index] += event.choices[0].text

    assert [choice.text for choice in whole.choices] == streamed == alone
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (6, 48)


def test_a_stop_string_cuts_whole_and_streamed_answers_alike(tiny: TextModel) -> None:
    client = client_of(tiny)
    asked: dict[str, Any] = {"model": "tiny", "prompt": "Say: ", "max_tokens": 60, "temperature": 1.0, "seed": 3}
    full = client.completions.create(**asked).choices[0].text
    stop = full[10:13]  # three characters: most of them span tokens of one byte

    whole = client.completions.create(**asked, stop=["never there", stop])
    streamed = "".join(e.choices[0].text for e in client.completions.create(**asked, stop=stop, stream=True))

    assert whole.choices[0].text == streamed == full[: full.index(stop)]
    assert whole.choices[0].finish_reason == "stop"


def test_the_wire_is_server_sent_events() -> None:
    body = {"model": "tiny", "prompt": "x", "stream": True}
    response = http(Pieces("é", "\n")).post("/v1/completions", json=body)

    lines = response.text.split("\n\n")
    assert response.headers["content-type"].startswith("text/event-stream")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-2]] == ["é", "\n", ""]


def test_defaults_are_those_of_openai() -> None:
    model = Pieces("x")
    client = client_of(model)
    client.completions.create(model="tiny", prompt="p")
    client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "c"}], max_tokens=4, n=1)
    client.chat.completions.create(
        model="tiny", messages=[{"role": "developer", "content": "d"}], logprobs=True, extra_body={"top_k": 5}
    )
    first, second, third = (request.sampling for request in model.requests)

    assert (first.max_tokens, first.temperature, first.top_p, first.top_k, first.seed) == (16, 1.0, 1.0, 0, None)
    assert (first.presence_penalty, first.frequency_penalty, first.num_logprobs) == (0, 0, None)
    assert second.max_tokens == 4
    assert (third.max_tokens, third.num_logprobs, third.top_k) == (None, 0, 5)
    assert model.requests[2].prompt == (Message("system", "d"),)


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        ("completions", {"prompt": "x", "temprature": 1}, "temprature", "did you mean 'temperature'"),
        ("completions", {}, "prompt", "Field required"),
        ("completions", {"prompt": ""}, None, "empty"),
        ("completions", {"prompt": "x", "max_tokens": "5"}, "max_tokens", "valid integer"),
        ("completions", {"prompt": "x", "max_tokens": 0}, "max_tokens", "without echo"),
        ("completions", {"prompt": "x", "temperature": 2.5}, "temperature", "less than or equal to 2"),
        ("completions", {"prompt": "x", "top_p": 0}, "top_p", "greater than 0"),
        ("completions", {"prompt": "x", "top_k": -1}, "top_k", "greater than or equal to 0"),
        ("completions", {"prompt": "x", "seed": 2**63}, "seed", "less than"),
        ("completions", {"prompt": "x", "presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
        ("completions", {"prompt": "x", "stop": list("abcde")}, "stop", "at most 4"),
        ("completions", {"prompt": "x", "stop": ""}, "stop.0", "at least 1"),
        ("completions", {"prompt": "x", "n": 0}, "n", "greater than or equal to 1"),
        ("completions", {"prompt": "x", "n": True}, "n", "valid integer"),
        ("completions", {"prompt": ["x"] * 65, "n": 2}, "n", "128 at most"),
        ("completions", {"prompt": "x", "n": 2, "best_of": 3}, "best_of", "must equal n"),
        ("completions", {"prompt": "x", "logprobs": 6}, "logprobs", "less than or equal to 5"),
        ("completions", {"prompt": "x", "logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ("completions", {"prompt": "x", "suffix": "y"}, "suffix", "not supported"),
        ("completions", {"prompt": "x", "stream_options": {}}, "stream_options", "only allowed with stream"),
        ("completions", {"prompt": []}, "prompt", "token ids"),
        ("completions", {"prompt": ["x", [3, -1]]}, "prompt", "token ids"),
        ("completions", {"prompt": [[3, 1000]]}, None, "token id 1000 is none"),
        ("completions", {"prompt": [[]]}, None, "empty"),
        ("completions", {"prompt": "\ud800"}, "prompt", "surrogate"),
        ("completions", {"prompt": "x", "my secret prompt": 1}, None, "has an unknown field"),
        ("chat/completions", {"messages": []}, "messages", "at least 1"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content", "Field required"),
        ("chat/completions", {"messages": [{"role": "you", "content": "x"}]}, "messages.0.role", "'user'"),
        ("chat/completions", {**ASKED, "logprobs": 3}, "logprobs", "valid boolean"),
        ("chat/completions", {**ASKED, "top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ("chat/completions", {**ASKED, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "equal to 20"),
        ("chat/completions", {**ASKED, "tools": [{}]}, "tools", "not supported"),
        ("chat/completions", {**ASKED, "response_format": {"type": "xml"}}, "response_format.type", "'json_schema'"),
        ("chat/completions", {**ASKED, "max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "differ"),
    ],
)
def test_what_is_wrong_is_refused_by_name(
    tiny: TextModel, path: str, body: dict[str, Any], param: str | None, says: str
) -> None:
    status, error = error_of(tiny, f"/v1/{path}", body)

    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert says in error["message"]


def test_neutral_values_of_unsupported_fields_pass() -> None:
    answer = client_of(Pieces("ok")).chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        n=1,
        logprobs=False,
        presence_penalty=0,
        response_format={"type": "text"},
        tools=[],
        user="somebody",
    )
    assert answer.choices[0].message.content == "ok"


def test_other_refusals_have_openais_form(tiny: TextModel) -> None:
    client = client_of(tiny)
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-5", prompt="x")
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model="tiny", prompt="x" * 300)
    with pytest.raises(openai.BadRequestError) as too_long_stream:
        client.completions.create(model="tiny", prompt="x" * 300, stream=True)
    bad_json = http(tiny).post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
    nowhere, wrong_verb = http(tiny).get("/v2/x"), http(tiny).get("/v1/completions")

    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert too_long.value.code == too_long_stream.value.code == "context_length_exceeded"
    assert (bad_json.status_code, bad_json.json()["error"]["code"]) == (400, "invalid_json")
    assert (nowhere.status_code, nowhere.json()["error"]["type"]) == (404, "invalid_request_error")
    assert (wrong_verb.status_code, wrong_verb.json()["error"]["message"]) == (405, "Method Not Allowed")


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (EngineError("canary"), 503, "engine_error"),
        (ModerationUnavailableError("canary"), 503, "moderation_unavailable"),
        (ContentFilterError(("hate",)), 400, "content_filter"),
        (KeyError("canary"), 500, "internal_error"),
    ],
)
def test_a_failure_is_an_error_before_and_within_a_stream(
    failure: Exception, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = error_of(Pieces("a", failure), "/v1/completions", {"prompt": "x"})
    at_once, _ = error_of(Pieces(failure), "/v1/completions", {"prompt": "x", "stream": True})
    events = client_of(Pieces("a", failure)).completions.create(model="tiny", prompt="x", stream=True)
    first = next(events).choices[0].text
    with pytest.raises(openai.APIError) as within:
        next(events)

    kind = "server_error" if status >= 500 else "invalid_request_error"
    assert (whole[0], whole[1]["code"], whole[1]["type"]) == (status, code, kind)
    assert (at_once, first, within.value.code) == (status, "a", code)
    assert "canary" not in f"{whole}{within.value.body}{caplog.text}"
    assert ("failed with KeyError" in caplog.text) == (status == 500)


def test_a_client_hears_when_to_try_again() -> None:
    body = {"model": "tiny", "prompt": "x"}
    assert http(Pieces(EngineError(""))).post("/v1/completions", json=body).headers["retry-after"] == "1"


def test_one_prompt_that_fails_ends_the_others() -> None:
    class FirstFails(Pieces):
        async def complete(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
            if request.prompt == "bad":
                raise EngineError("no")
            async for delta in super().complete(request):
                yield delta

    model = FirstFails("a", None)
    status, _ = error_of(model, "/v1/completions", {"prompt": ["good", "bad"]})

    assert status == 503
    assert model.closed.wait(DEADLINE_S)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_cancels_its_request(stream: bool) -> None:
    model = Pieces("a", None)
    body = {"model": "tiny", "prompt": "x", "stream": stream}
    with served(model) as url:
        if stream:
            with httpx2.stream("POST", f"{url}/v1/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx2.ReadTimeout):
                httpx2.post(f"{url}/v1/completions", json=body, timeout=0.5)
        assert model.closed.wait(DEADLINE_S)


def found_in(content: str | tuple[int, ...]) -> Detection:
    return detection(num_green=40, num_scored=len(content), gamma=0.25, delta=2.0)


async def detector(content: str | tuple[int, ...]) -> Detection:
    if content == (999,):
        raise UserError("token id 999 is not in the vocabulary of 259")
    if content == "broken":
        raise EngineError("/secret/path")
    return found_in(content)


@pytest.mark.parametrize(("body", "content"), [({"text": "a" * 60}, "a" * 60), ({"token_ids": [7] * 50}, (7,) * 50)])
def test_the_watermark_is_looked_for(body: dict[str, Any], content: str | tuple[int, ...]) -> None:
    answer = http(Pieces(), detector).post("/v1/watermark/detect", json=body).json()
    found = found_in(content)

    assert answer == {
        "object": "watermark.detection",
        "verdict": "marked",
        "z_score": found.z_score,
        "p_value": found.p_value,
        "num_scored": len(content),
        "num_green": 40,
    }


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({}, 400, "one of them"),
        ({"text": "a", "token_ids": [1]}, 400, "one of them"),
        ({"text": ""}, 400, "at least 1"),
        ({"token_ids": []}, 400, "at least 1"),
        ({"token_ids": [-1]}, 400, "greater"),
        ({"token_ids": [999]}, 400, "vocabulary"),
        ({"txt": "a"}, 400, "did you mean 'text'"),
        ({"text": "broken"}, 503, "try again"),
    ],
)
def test_what_cannot_be_detected_says_why(body: dict[str, Any], status: int, says: str) -> None:
    response = http(Pieces(), detector).post("/v1/watermark/detect", json=body)

    assert response.status_code == status
    assert says in response.json()["error"]["message"]
    assert "secret" not in response.text


def test_a_server_without_a_watermark_says_so() -> None:
    response = http(Pieces()).post("/v1/watermark/detect", json={"text": "a"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "no_watermark")
