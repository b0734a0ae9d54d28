"""Answers that obey a JSON schema: through the official client, from an engine over a tiny random model."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from alpaca_ray import models
from alpaca_ray.safety.watermark import Watermark
from alpaca_ray.serve.engine import Delta, SamplingParams, SchemaError, TokenRequest
from alpaca_ray.serve.grammar import Grammars
from alpaca_ray.serve.text import TokenizedModel
from alpaca_ray.serve.torch_engine import TorchEngine, decoder_for, end_token_ids
from tests.serving import client_of, error_of

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,8}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
        "friends": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
    },
    "required": ["name", "age", "kind", "friends"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[TorchEngine]:
    model = models.load_model(str(tiny_model), "float32")
    engine = TorchEngine(
        decoder_for(model, num_slots=4, max_length=512),
        end_token_ids(model),
        marks=Watermark(2_718_281_828_459_045, vocab_size=259).bias,
        grammars=Grammars(models.load_tokenizer(str(tiny_model)), vocab_size=259),
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def model(engine: TorchEngine, tiny_model: Path) -> TokenizedModel:
    return TokenizedModel(engine, models.load_tokenizer(str(tiny_model)), "plain")


def form(schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


def ask(model: TokenizedModel, **asked: Any) -> openai.types.chat.ChatCompletion:
    answer = client_of(model).chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hello"}], **{"max_tokens": 200} | asked
    )
    assert isinstance(answer, openai.types.chat.ChatCompletion)
    return answer


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_an_answer_obeys_its_schema(model: TokenizedModel, temperature: float, seed: int) -> None:
    [choice] = ask(model, response_format=form(PERSON), temperature=temperature, seed=seed).choices

    person = json.loads(choice.message.content or "")
    assert choice.finish_reason == "stop"
    assert list(person) == ["name", "age", "kind", "friends"]
    assert person["name"].isalpha()
    assert 0 <= person["age"] <= 150
    assert person["kind"] in ("cat", "dog")
    assert all(len(friend) <= 3 for friend in person["friends"])


def test_each_choice_obeys_for_itself_beside_free_ones(model: TokenizedModel) -> None:
    bound = ask(model, response_format=form({"enum": ["yes", "no", "perhaps"]}), n=4, seed=1, temperature=2.0)
    assert {json.loads(choice.message.content or "") for choice in bound.choices} <= {"yes", "no", "perhaps"}
    assert ask(model, seed=1).choices == ask(model, seed=1, response_format={"type": "text"}).choices


def test_an_object_is_one_whatever_else(model: TokenizedModel) -> None:
    text = ask(model, response_format={"type": "json_object"}, seed=5).choices[0].message.content or ""
    assert text.startswith("{")


async def tokens(engine: TorchEngine, request: TokenRequest) -> list[Delta]:
    return [delta async for delta in engine.generate(request)]


def test_a_completion_obeys_behind_what_a_dead_engine_gave(model: TokenizedModel, engine: TorchEngine) -> None:
    sampling = SamplingParams(max_tokens=200, seed=3, json_schema=json.dumps(PERSON))
    whole = [i for delta in asyncio.run(tokens(engine, TokenRequest((5, 6), sampling))) for i in delta.token_ids]
    for num_emitted in (1, len(whole) // 2, len(whole) - 1):
        emitted = tuple(whole[:num_emitted])
        rest = asyncio.run(tokens(engine, TokenRequest((5, 6), sampling, emitted=emitted)))
        assert [i for delta in rest for i in delta.token_ids] == whole[num_emitted:]


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "wat"}, "Invalid type"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"$ref": "#/nowhere"}, "does not exist"),
    ],
)
def test_a_schema_that_cannot_be_obeyed_is_refused(model: TokenizedModel, schema: Any, says: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "response_format": form(schema)}
    for stream in (False, True):
        status, error = error_of(model, "/v1/chat/completions", body | {"stream": stream})
        assert (status, error["param"], error["code"]) == (400, "response_format", "invalid_value")
        assert says in error["message"]


@pytest.mark.parametrize("wrong", [{"type": "json_schema"}, {"type": "xml"}, {"type": "text", "json_schema": {}}])
def test_a_form_that_is_none_is_refused(model: TokenizedModel, wrong: Any) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "response_format": wrong}
    status, error = error_of(model, "/v1/chat/completions", body)
    assert status == 400
    assert error["param"].startswith("response_format")


def test_an_engine_without_a_tokenizer_says_so(tiny_model: Path) -> None:
    model = models.load_model(str(tiny_model), "float32")
    engine = TorchEngine(decoder_for(model, 1, 64))
    with pytest.raises(SchemaError, match="no tokenizer"):
        asyncio.run(tokens(engine, TokenRequest((5,), SamplingParams(json_schema="{}"))))
    engine.close()
