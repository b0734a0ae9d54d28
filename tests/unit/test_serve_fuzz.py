"""Bodies of every kind, at the door and through it: each gets an answer or a refusal in OpenAI's form, none a 5xx,
none its own words back; nothing of them is in a log.

`benchmarks/serve_load.py --requests 10000` is the long form.
"""

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from alpaca_ray.config import AdmissionConfig
from alpaca_ray.models import load_tokenizer
from alpaca_ray.safety.detection import Detection, detection
from alpaca_ray.serve.access_log import Access
from alpaca_ray.serve.admission import Admission
from alpaca_ray.serve.api import create_api
from alpaca_ray.serve.keys import Keys, make_key, parse_keys
from alpaca_ray.serve.protocol import ChatCompletionRequest, CompletionRequest, DetectRequest
from alpaca_ray.serve.text import TokenizedModel
from tests.scripted import ScriptedEngine
from tests.serving import CHAT_TEMPLATE

Mode = schemathesis.GenerationMode
CANARY = "sk-canary 7"
KEY = make_key("fuzz", ["generate", "detect"], random_bytes=lambda count: b"canary".ljust(count, b"."))


async def detector(content: str | tuple[int, ...]) -> Detection:
    return detection(0, len(content), gamma=0.25, delta=2.0)


def create_scripted_api(directory: Path) -> FastAPI:
    """Over an engine without a model, and the tokenizer of that directory."""
    tokenizer = load_tokenizer(str(directory))
    tokenizer.chat_template = CHAT_TEMPLATE
    model = TokenizedModel(ScriptedEngine(max_length=64), tokenizer)
    return create_api(model, "tiny", created_s=7, detector=detector)


class Door:
    """The API behind admission, as it is served, and all that it logs."""

    def __init__(self, api: FastAPI) -> None:
        admission = Admission(
            api,
            Keys(None, parse_keys(KEY.line, "here")),
            AdmissionConfig(),
            max_in_flight=2,
            max_length=64,
            record=self._record,
        )
        headers = {"Authorization": f"Bearer {KEY.secret}", "Content-Type": "application/json"}
        self._client = TestClient(admission, raise_server_exceptions=False, headers=headers)
        self._log = io.StringIO()

    def post(self, path: str, content: str | bytes) -> int:
        """The status of what is an answer, or a refusal as it should be."""
        response = self._client.post(path, content=content)
        status: int = response.status_code
        assert status in (200, 400, 404, 405, 413)
        if status >= 400:
            error = response.json()["error"]
            assert (set(error), error["type"]) == ({"message", "type", "param", "code"}, "invalid_request_error")
        refusals = [line for line in response.text.splitlines() if '"error"' in line]
        told = repr(response.headers) + "".join(refusals) + self._log.getvalue()
        assert "canary" not in told.lower()
        assert KEY.secret not in told
        assert '"server_error"' not in response.text
        self._log.truncate(0)
        return status

    @contextmanager
    def listening(self) -> Iterator["Door"]:
        """While every logger's lines are read."""
        handler, root = logging.StreamHandler(self._log), logging.getLogger()
        level = root.level
        root.addHandler(handler)
        root.setLevel(logging.DEBUG)
        try:
            yield self
        finally:
            root.removeHandler(handler)
            root.setLevel(level)

    def _record(self, access: Access) -> None:
        self._log.write(repr(access))


@pytest.fixture(scope="module")
def api(tiny_model: Path) -> FastAPI:
    return create_scripted_api(tiny_model)


@pytest.fixture
def door(api: FastAPI) -> Iterator[Door]:
    with Door(api).listening() as door:
        yield door


TEXTS = st.one_of(st.text(max_size=8), st.just(CANARY), st.sampled_from(["\ud800", "\x00", "tiny", "user", "</s>"]))
NUMBERS = st.one_of(
    st.integers(-2, 130), st.integers(), st.floats(), st.sampled_from([1e308, 2**63, 10**400, -0.0, float("nan")])
)
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
NAMES = sorted({*CompletionRequest.model_fields, *ChatCompletionRequest.model_fields, *DetectRequest.model_fields})
TOKEN_IDS = st.lists(st.lists(st.integers(3, 270), min_size=1, max_size=4), min_size=1, max_size=3)
REQUIRED: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "/v1/completions": {"model": st.just("tiny"), "prompt": st.one_of(st.just(CANARY), TOKEN_IDS)},
    "/v1/chat/completions": {
        "model": st.just("tiny"),
        "messages": st.just([{"role": "user", "content": CANARY}]),
    },
    "/v1/watermark/detect": {"text": st.just(CANARY)},
}
PATHS = st.sampled_from(list(REQUIRED))
# Right but for a few fields, so that what stands beside them is reached.
REQUESTS = PATHS.flatmap(
    lambda path: st.tuples(
        st.just(path),
        st.fixed_dictionaries(REQUIRED[path]),
        st.dictionaries(st.one_of(st.sampled_from(NAMES), TEXTS), ANYTHING, max_size=3),
    )
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(asked=REQUESTS)
def test_no_body_is_a_server_error(door: Door, asked: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    path, required, others = asked
    assert door.post(path, json.dumps(required | others)) < 500


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(path=PATHS, content=st.one_of(st.binary(max_size=20), st.sampled_from([b"[" * 100_000, b"1" * 5000, b'"'])))
def test_no_bytes_are_a_server_error(door: Door, path: str, content: bytes) -> None:
    assert door.post(path, content) < 500


@pytest.fixture(scope="module")
def openapi(api: FastAPI) -> Any:
    schema = schemathesis.openapi.from_asgi("/openapi.json", api)

    @schema.hook
    def map_body(_: Any, body: Any) -> Any:
        """Else nearly all would end at the model's name."""
        return body | {"model": "tiny"} if isinstance(body, dict) and isinstance(body.get("model"), str) else body

    return schema


CHECKS = [
    not_a_server_error,
    content_type_conformance,
    status_code_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("label", ["POST /v1/completions", "POST /v1/chat/completions", "POST /v1/watermark/detect"])
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_openapi_document_holds(
    openapi: Any, label: str, mode: schemathesis.GenerationMode, data: st.DataObject
) -> None:
    # Its own plugin for pytest does not know pytest 9.
    operation = openapi.find_operation_by_label(label)
    case = data.draw(operation.as_strategy(generation_mode=mode))
    case.call_and_validate(checks=CHECKS)
