"""The application on real Ray Serve, read by the official client; and the config file that ships."""

import inspect
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import ray
import yaml
from pydantic import BaseModel, ValidationError
from ray import serve
from ray.serve.schema import HTTPOptionsSchema, LoggingConfig, ServeApplicationSchema, ServeDeploySchema

from alpaca_ray.config import AdmissionConfig, Placement, ServeArgs, UserError, WatermarkConfig
from alpaca_ray.serve.app import build, served_name
from alpaca_ray.serve.keys import make_key
from tests.patience import start_serve
from tests.tiny import READABLE, write_tiny_model

CONFIG = Path(__file__).parents[2] / "serve_config.yaml"
CONTEXT = 200_000  # minutes of decoding: what is idle before has been cancelled
DEADLINE_S = 30.0
WATERMARK_KEY = 3_141_592_653_589_793_238


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    directory = tmp_path_factory.mktemp("serve") / "patient"
    model = write_tiny_model(directory, alphabet=READABLE, max_length=CONTEXT, ends=False)
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    (model.parent / "watermark_key").write_text(str(WATERMARK_KEY))
    key = make_key("tests", ["generate", "detect"])
    (model.parent / "keys.jsonl").write_text(key.line + "\n")
    args = ServeArgs(
        model=str(model),
        prompt_format="plain",
        dtype="float32",
        max_length=CONTEXT,
        max_batch_size=4,
        watermark=WatermarkConfig(key_file=str(model.parent / "watermark_key")),
        admission=AdmissionConfig(key_file=str(model.parent / "keys.jsonl")),
        placement=Placement(num_cpus=1, label_selector=here),
    )
    port = free_port()
    start_serve(port)
    serve.run(build(args), name="test", route_prefix="/")
    with openai.OpenAI(api_key=key.secret, base_url=f"http://127.0.0.1:{port}/v1", max_retries=0, timeout=60) as client:
        yield client
    serve.shutdown()  # type: ignore[no-untyped-call]  # Ray's


def health(client: openai.OpenAI) -> dict[str, Any]:
    answer: dict[str, Any] = client.get("/../ready", cast_to=dict[str, Any])
    return answer


def test_the_official_client_gets_models_completions_and_chats(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "patient", "max_tokens": 20, "temperature": 1.0, "seed": 4}
    messages: Any = [{"role": "user", "content": "Hello"}]

    completion = client.completions.create(prompt="Hello", **asked)
    chat = client.chat.completions.create(messages=messages, **asked)

    assert [model.id for model in client.models.list()] == ["patient"]
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 20
    # prompt_format plain: both endpoints give the model the same text
    assert chat.choices[0].message.content == completion.choices[0].text != ""


def test_a_stream_comes_by_sentences_and_is_the_whole_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "patient", "prompt": "ab", "max_tokens": 1000, "temperature": 1.0, "seed": 4}

    whole = client.completions.create(**asked)
    events = list(client.completions.create(**asked, stream=True))

    assert "".join(event.choices[0].text for event in events) == whole.choices[0].text
    assert len(events) > 5


def test_errors_keep_their_codes_through_the_handle(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model="patient", prompt="x", max_tokens=CONTEXT)
    with pytest.raises(openai.BadRequestError) as too_long_stream:
        client.completions.create(model="patient", prompt="x", max_tokens=CONTEXT, stream=True)
    with pytest.raises(openai.BadRequestError) as empty:
        client.completions.create(model="patient", prompt="")
    with pytest.raises(openai.BadRequestError) as misspelt:
        client.completions.create(model="patient", prompt="x", extra_body={"temprature": 1})

    assert unknown.value.code == "model_not_found"
    assert too_long.value.code == too_long_stream.value.code == "context_length_exceeded"
    assert empty.value.code == "invalid_prompt"
    assert misspelt.value.param == "temprature"


def test_nobody_asks_without_a_key(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="ar-made-up").completions.create(model="patient", prompt="x")


def test_what_is_said_carries_the_mark(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "patient", "prompt": "Hello", "max_tokens": 200, "temperature": 1.0, "seed": 1}
    said = client.completions.create(**asked).choices[0].text
    other = "This sentence and the one behind it were written by hand, a long time before any model was asked. " * 3

    marked, unmarked = (
        client.post("/watermark/detect", body={"text": text}, cast_to=dict[str, Any]) for text in (said, other)
    )

    assert marked["verdict"] == "marked"
    assert unmarked["verdict"] != "marked"


def test_a_stream_survives_its_replica(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "patient", "prompt": "Hello", "max_tokens": 3000, "temperature": 0, "seed": 1}
    whole = client.completions.create(**asked).choices[0].text

    events = client.completions.create(**asked, stream=True)
    said = next(events).choices[0].text
    [replica] = engine_replicas()
    replica.kill()
    said += "".join(event.choices[0].text for event in events)

    assert said == whole
    assert [process.pid for process in engine_replicas()] != [replica.pid]


def engine_replicas() -> list[psutil.Process]:
    """The processes that hold the model."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(part.startswith("ray::ServeReplica:test:EngineReplica") for part in process.info["cmdline"] or [])
    ]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_the_engine(client: openai.OpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {"model": "patient", "prompt": "x", "max_tokens": CONTEXT - 1, "temperature": 0}
    if stream:
        events = client.completions.create(**asked, stream=True)
        next(events)
        assert health(client)["num_running"] == 1
        events.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=1.0).completions.create(**asked)

    deadline_s = time.monotonic() + DEADLINE_S
    while (state := health(client))["num_running"] and time.monotonic() < deadline_s:
        pass
    assert state == {"status": "ok", "num_running": 0, "num_waiting": 0}


def test_only_the_engine_reserves_cpus(client: openai.OpenAI) -> None:
    assert client.models.list().data
    untyped: Any = ray
    assert untyped.cluster_resources()["CPU"] - untyped.available_resources()["CPU"] == 1


def test_a_model_that_is_none_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is missing"):
        build(ServeArgs(model=str(tmp_path)))


def test_the_name_is_the_last_part_of_the_model() -> None:
    names = [served_name(ServeArgs(model=m)) for m in ("embedded:smollm2-135m", "/runs/a/model/", "s3://b/my-model")]
    assert names == ["smollm2-135m", "model", "my-model"]
    assert served_name(ServeArgs(model="a/b", model_name="mine")) == "mine"


def unknown_keys(values: Mapping[str, Any], schema: type[BaseModel]) -> set[str]:
    return set(values) - set(schema.model_fields)


def test_the_config_that_ships_is_valid_to_the_last_key() -> None:
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    application = config["applications"][0]

    schema = ServeDeploySchema.model_validate(config)
    args = ServeArgs.model_validate(application["args"])

    # Ray takes unknown keys in silence, so they are looked for here.
    assert not unknown_keys(config, ServeDeploySchema)
    assert not unknown_keys(config["http_options"], HTTPOptionsSchema)
    assert not unknown_keys(config["logging_config"], LoggingConfig)
    assert not unknown_keys(application, ServeApplicationSchema)
    assert set(application["args"]) == set(ServeArgs.model_fields), "the file shows every field"
    assert (schema.http_options.host, schema.http_options.port) == ("127.0.0.1", 8000)
    assert served_name(args) == "smollm2-135m"
    with pytest.raises(ValidationError, match="modle"):
        ServeArgs.model_validate(application["args"] | {"modle": "x"})


def test_serve_can_validate_the_args_of_build() -> None:
    # Serve calls ServeArgs on the file's args only if the annotation is the class itself, not a string.
    assert inspect.signature(build).parameters["args"].annotation is ServeArgs
