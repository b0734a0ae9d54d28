"""Request bodies, read strictly: an unknown field, a wrong type or a missing value is a Refusal, as at OpenAI."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from tests.referee.refusals import Refusal

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
CHAT_MAX_TOKENS = 4096  # what a chat request without max_tokens reserves and may use

Penalty = Annotated[float, Field(ge=-2, le=2)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Sampling(Strict):
    """What both routes take."""

    model: str
    max_tokens: PositiveInt | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: int | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: str | None = None
    stream: Literal[False] | None = None


class CompletionBody(Sampling):
    prompt: str | Annotated[list[str], Field(min_length=1)]


class Message(Strict):
    role: Literal["developer", "system", "user", "assistant"]
    content: str
    name: str | None = None


class JsonSchema(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatBody(Sampling):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: PositiveInt | None = None
    response_format: ResponseFormat | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """What a body asks for."""

    chat: bool
    model: str
    prompts: tuple[str, ...]
    seed: int | None
    max_tokens: int
    num_samples: int  # per prompt
    stop: tuple[str, ...]
    json_answer: bool


def read_json(raw: bytes) -> dict[str, Any] | Refusal:
    """The body as an object."""
    try:
        body = json.loads(raw)
    except ValueError:
        return Refusal(400, "We could not parse the JSON body of your request.")
    return body if isinstance(body, dict) else Refusal(400, "The body must be a JSON object.")


def read_ask(route: str, body: Mapping[str, Any]) -> Ask | Refusal:
    """A body of COMPLETIONS or CHAT."""
    try:
        return _chat(ChatBody.model_validate(body)) if route == CHAT else _text(CompletionBody.model_validate(body))
    except ValidationError as error:
        return refusal_of(error)


def _text(body: CompletionBody) -> Ask:
    prompts = (body.prompt,) if isinstance(body.prompt, str) else tuple(body.prompt)
    return _ask(body, prompts, body.max_tokens or 16, json_answer=False)  # 16 is OpenAI's default


def _chat(body: ChatBody) -> Ask | Refusal:
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        return Refusal(400, "Give max_tokens or max_completion_tokens, not both.", param="max_tokens")
    form = body.response_format
    if form is not None and (form.type == "json_schema") != (form.json_schema is not None):
        return Refusal(400, "Missing or surplus: 'response_format.json_schema'.", param="response_format.json_schema")
    prompt = "\n".join(message.content for message in body.messages)
    max_tokens = body.max_completion_tokens or body.max_tokens or CHAT_MAX_TOKENS
    return _ask(body, (prompt,), max_tokens, json_answer=form is not None and form.type != "text")


def _ask(body: Sampling, prompts: tuple[str, ...], max_tokens: int, json_answer: bool) -> Ask:
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    chat = isinstance(body, ChatBody)
    return Ask(chat, body.model, prompts, body.seed, max_tokens, body.n or 1, stop, json_answer)


def refusal_of(error: ValidationError) -> Refusal:
    """The first thing that is wrong, in OpenAI's words."""
    first = error.errors()[0]
    # A union's members have names of their own behind the field's.
    param = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("constrained", "list[", "str")))
    if first["type"] == "extra_forbidden":
        return Refusal(400, f"Unrecognized request argument supplied: {param}", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return Refusal(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    return Refusal(400, f"Invalid value for '{param}': {first['msg']}", param=param, code=code)
