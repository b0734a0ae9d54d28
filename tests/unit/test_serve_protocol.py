"""The fields that are taken and refused: all of OpenAI's, and each in the docs."""

from typing import Any

import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import ChatCompletionStreamOptionsParam
from openai.types.chat import completion_create_params as chat_params
from pydantic import BaseModel

from alpaca_ray.serve.protocol import ChatCompletionRequest, CompletionRequest, StreamOptions
from tests.field_table import PAGE, only, written


@pytest.mark.parametrize(
    ("ours", "openais"),
    [
        (CompletionRequest, completion_params.CompletionCreateParamsStreaming),
        (ChatCompletionRequest, chat_params.CompletionCreateParamsStreaming),
        (StreamOptions, ChatCompletionStreamOptionsParam),
    ],
)
def test_every_field_of_openais_is_taken_or_refused_on_purpose(ours: type[BaseModel], openais: Any) -> None:
    assert set(openais.__annotations__) <= set(ours.model_fields)


@pytest.mark.parametrize("model", [CompletionRequest, ChatCompletionRequest])
def test_every_field_that_is_taken_says_what_it_does(model: type[BaseModel]) -> None:
    assert [n for n, info in model.model_fields.items() if only(info) is None and not info.description] == []


def test_the_page_lists_the_fields_as_they_are() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == written(page), "docs/api.md is stale: python -m tests.field_table"
