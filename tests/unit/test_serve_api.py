"""The HTTP API, read by the official client: over ASGI where that is enough, over a real port for disconnects."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import uvicorn
from fastapi.testclient import TestClient

from alpaca_ray.models import load_model, load_tokenizer
from alpaca_ray.serve.api import create_api
from alpaca_ray.serve.engine import EngineError, Health
from alpaca_ray.serve.text import TextDelta, TextModel, TextRequest, TokenizedModel
from alpaca_ray.serve.torch_engine import TorchEngine

DEADLINE_S = 20.0


class Pieces:
    """A TextModel that answers with the given pieces; an exception among them is raised, None waits for ever."""

    def __init__(self, *pieces: str | Exception | None) -> None:
        self.pieces = pieces
        self.requests: list[TextRequest] = []
        self.closed = threading.Event()

    async def complete(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
        self.requests.append(request)
        try:
            for piece in self.pieces:
                if isinstance(piece, Exception):
                    raise piece
                if piece is None:
                    await asyncio.Event().wait()
                yield TextDelta(str(piece), 3, 1)
            yield TextDelta("", 3, 0, "stop")
        finally:
            self.closed.set()

    async def health(self) -> Health:
        return Health(num_running=0, num_waiting=0)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Iterator[TokenizedModel]:
    engine = TorchEngine(load_model(str(tiny_model), "float32"), max_length=256)
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    yield TokenizedModel(engine, tokenizer)
    engine.close()


def http(model: TextModel) -> TestClient:
    return TestClient(create_api(model, "tiny", created_s=7), raise_server_exceptions=False)


def client_of(model: TextModel) -> openai.OpenAI:
    return openai.OpenAI(api_key="none", base_url="http://testserver/v1", http_client=http(model), max_retries=0)


@contextmanager
def served(model: TextModel) -> Iterator[str]:
    """The API on a free port of 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(create_api(model, "tiny"), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def error_of(model: TextModel, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    response = http(model).post(path, json={"model": "tiny"} | body)
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error


def test_the_models_are_listed_and_found(tiny: TextModel) -> None:
    client = client_of(tiny)
    assert [(m.id, m.created) for m in client.models.list()] == [("tiny", 7)]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.models.retrieve("other/model")
    assert http(tiny).get("/health").json() == {"status": "ok", "num_running": 0, "num_waiting": 0}


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
    first, second = (request.sampling for request in model.requests)

    assert (first.max_tokens, first.temperature, first.top_p, first.seed) == (16, 1.0, 1.0, None)
    assert second.max_tokens == 4


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        ("completions", {"prompt": "x", "temprature": 1}, "temprature", "did you mean 'temperature'"),
        ("completions", {}, "prompt", "Field required"),
        ("completions", {"prompt": ""}, None, "empty"),
        ("completions", {"prompt": "x", "max_tokens": "5"}, "max_tokens", "valid integer"),
        ("completions", {"prompt": "x", "max_tokens": 0}, "max_tokens", "greater than 0"),
        ("completions", {"prompt": "x", "temperature": 2.5}, "temperature", "less than or equal to 2"),
        ("completions", {"prompt": "x", "top_p": 0}, "top_p", "greater than 0"),
        ("completions", {"prompt": "x", "seed": 2**63}, "seed", "less than"),
        ("completions", {"prompt": "x", "stop": list("abcde")}, "stop", "at most 4"),
        ("completions", {"prompt": "x", "stop": ""}, "stop.0", "at least 1"),
        ("completions", {"prompt": "x", "n": 2}, "n", "not supported"),
        ("completions", {"prompt": "x", "n": True}, "n", "not supported"),
        ("completions", {"prompt": "x", "echo": True}, "echo", "not supported"),
        ("completions", {"prompt": "x", "logprobs": 0}, "logprobs", "not supported"),
        ("chat/completions", {"messages": []}, "messages", "at least 1"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages.0.content", "Field required"),
        ("chat/completions", {"messages": [{"role": "you", "content": "x"}]}, "messages.0.role", "'user'"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "logprobs": True}, "logprobs", "not"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "tools", "not"),
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
    ("failure", "code", "says"),
    [
        (EngineError("out of memory"), "engine_error", "out of memory"),
        (KeyError("secret"), "internal_error", "its log says why"),
    ],
)
def test_a_failure_is_an_error_before_and_within_a_stream(failure: Exception, code: str, says: str) -> None:
    status, error = error_of(Pieces("a", failure), "/v1/completions", {"prompt": "x"})
    at_once, _ = error_of(Pieces(failure), "/v1/completions", {"prompt": "x", "stream": True})
    events = client_of(Pieces("a", failure)).completions.create(model="tiny", prompt="x", stream=True)
    first = next(events).choices[0].text
    with pytest.raises(openai.APIError, match=says) as within:
        next(events)

    assert (status, at_once, error["type"], error["code"]) == (500, 500, "server_error", code)
    assert says in error["message"]
    assert first == "a"
    assert within.value.code == code


def test_one_prompt_that_fails_ends_the_others() -> None:
    class FirstFails(Pieces):
        async def complete(self, request: TextRequest) -> AsyncGenerator[TextDelta, None]:
            if request.prompt == "bad":
                raise EngineError("no")
            async for delta in super().complete(request):
                yield delta

    model = FirstFails("a", None)
    status, _ = error_of(model, "/v1/completions", {"prompt": ["good", "bad"]})

    assert status == 500
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
