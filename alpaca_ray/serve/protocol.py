"""OpenAI's wire format: strict request models. What we do not support is refused by name."""

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    PositiveInt,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from alpaca_ray.serve.engine import SamplingParams
from alpaca_ray.serve.errors import APIError
from alpaca_ray.serve.text import Message, TextRequest, TokenPrompt

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions; a chat answer may fill the context
MAX_STOP_STRINGS = 4
MAX_CHOICES = 128  # prompts times n


@dataclass(frozen=True, eq=False)
class Only:
    """A field of OpenAI's API without effect here: refused unless null or a value that asks for nothing."""

    neutral: tuple[Any, ...]

    def check(self, value: Any) -> Any:
        """The value, if it is one of the neutral ones."""
        if value is None or any(value == allowed and type(value) is type(allowed) for allowed in self.neutral):
            return value
        remedy = f"; leave it out or give {self.neutral[0]!r}" if self.neutral else "; leave it out"
        raise ValueError(f"not supported by this server{remedy}")

    def __get_pydantic_core_schema__(self, _source: Any, _handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, _schema: CoreSchema, _handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self.neutral]}


def _only(*neutral: Any) -> Only:
    return Only(neutral)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _stop_strings(value: Any) -> Any:
    strings = () if value is None else (value,) if isinstance(value, str) else _as_tuple(value)
    if isinstance(strings, tuple) and len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"at most {MAX_STOP_STRINGS} stop strings")
    return strings


def _parts(value: Any) -> Any:
    return ({"type": "text", "text": value},) if isinstance(value, str) else _as_tuple(value)


def _prompts(value: Any) -> tuple[str | TokenPrompt, ...]:
    """One prompt or several, each a text or token ids."""
    if isinstance(value, str) or (isinstance(value, list) and value and _is_token_id(value[0])):
        return (_prompt(value),)
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_CHOICES:
        raise ValueError(f"Input should be a string, token ids, or a list of 1 to {MAX_CHOICES} of either")
    return tuple(_prompt(one) for one in value)


def _prompt(value: Any) -> str | TokenPrompt:
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("half of a surrogate pair is no text")
        return value
    if isinstance(value, list) and all(_is_token_id(one) for one in value):
        return TokenPrompt(tuple(value))
    raise ValueError("each prompt should be a string, or a list of token ids from 0 up")


def _is_token_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


class Wire(BaseModel):
    """Strict: no unknown fields, no conversions ("5" is no number)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


StopString = Annotated[str, Field(min_length=1, max_length=1000)]
Stop = Annotated[
    tuple[StopString, ...],
    BeforeValidator(_stop_strings, json_schema_input_type=StopString | list[StopString] | None),
]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
OnePrompt = str | Annotated[list[TokenId], Field(min_length=1)]
Prompts = Annotated[
    tuple[str | TokenPrompt, ...],
    PlainValidator(
        _prompts, json_schema_input_type=OnePrompt | Annotated[list[OnePrompt], Field(min_length=1, max_length=128)]
    ),
]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Label = Annotated[str | None, Field(description="a label of the caller's; changes no answer, is not kept")]


class StreamOptions(Wire):
    """How a stream ends."""

    include_usage: bool | None = Field(None, description="one more event with the token counts and no choices")
    include_obfuscation: Annotated[Any, _only(False)] = None


class _Request(Wire):
    """What both endpoints take. An explicit null is the default, as OpenAI has it."""

    model: str = Field(description="the id that `/v1/models` lists")
    max_tokens: PositiveInt | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="default 1; 0 is greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="default 1")
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        None, description="not in OpenAI's API: sample from the k likeliest tokens; 0 or null: from all"
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = Field(
        None, description="the same seed, the same text; choice 0 is drawn with the seed itself"
    )
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        None, description=f"choices for each prompt; prompts times n at most {MAX_CHOICES}"
    )
    stop: Stop = Field((), description=f"a string or up to {MAX_STOP_STRINGS}, each of 1 to 1000 characters")
    presence_penalty: Penalty | None = Field(None, description="over the tokens of the completion")
    frequency_penalty: Penalty | None = Field(None, description="over the tokens of the completion")
    stream: bool | None = Field(None, description="server-sent events, ended by `[DONE]`")
    stream_options: StreamOptions | None = Field(None, description="`include_usage`; only with `stream`")
    user: Label = None

    logit_bias: Annotated[Any, _only({})] = None

    @model_validator(mode="after")
    def _stream_options_belong_to_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise APIError(400, "stream_options: only allowed with stream: true", "stream_options", "invalid_value")
        return self

    @property
    def num_choices(self) -> int:
        """For each prompt."""
        return 1 if self.n is None else self.n

    def sampling(
        self, max_tokens: int | None, num_logprobs: int | None, json_schema: str | None = None
    ) -> list[SamplingParams]:
        """As the engine takes it, for each choice of a prompt."""
        first = SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            seed=self.seed,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            num_logprobs=num_logprobs,
            json_schema=json_schema,
        )
        return [replace(first, seed=seed_of_choice(self.seed, i)) for i in range(self.num_choices)]

    def includes_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def seed_of_choice(seed: int | None, choice: int) -> int | None:
    """The seed itself for choice 0, one drawn from (seed, choice) for each other; None stays None."""
    if seed is None or choice == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}:{choice}".encode(), digest_size=8).digest(), signed=True)


class CompletionRequest(_Request):
    """POST /v1/completions. A list of prompts gives `n` choices for each, in order."""

    prompt: Prompts = Field(description="a string, token ids, or a list of up to 128 of either")
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(None, description="default 16; 0 only with `echo`")
    echo: bool | None = Field(None, description="the prompt before the text; with `logprobs`, those of the prompt too")
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = Field(
        None, description="0 to 5; of the model before watermark, temperature and penalties"
    )
    best_of: int | None = Field(None, description="refused unless it equals `n`")

    suffix: Annotated[Any, _only("")] = None

    @model_validator(mode="after")
    def _counts_agree(self) -> Self:
        if self.best_of not in (None, self.num_choices):
            raise APIError(400, "best_of: must equal n; leave it out", "best_of", "invalid_value")
        if self.max_tokens == 0 and not self.echo:
            raise APIError(400, "max_tokens: 0 asks for nothing without echo: true", "max_tokens", "invalid_value")
        if len(self.prompt) * self.num_choices > MAX_CHOICES:
            raise APIError(400, f"n: prompts times n may be {MAX_CHOICES} at most", "n", "invalid_value")
        return self

    def text_requests(self) -> list[TextRequest]:
        """`n` for each prompt, in order."""
        max_tokens = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        each = self.sampling(max_tokens, self.logprobs)
        return [
            TextRequest(prompt, sampling, self.stop, echo=bool(self.echo))
            for prompt in self.prompt
            for sampling in each
        ]

    def wants_logprobs(self) -> bool:
        """Whether the choices bring log-probabilities."""
        return self.logprobs is not None


class TextPart(Wire):
    """A piece of a message; there are no images or sounds here."""

    type: Literal["text"]
    text: str


class ChatMessage(Wire):
    """One turn. Content parts are joined as they are; a developer is a system."""

    role: Literal["developer", "system", "user", "assistant"]
    content: Annotated[tuple[TextPart, ...], BeforeValidator(_parts, json_schema_input_type=str | list[TextPart])]

    name: Annotated[Any, _only()] = None
    refusal: Annotated[Any, _only()] = None
    tool_calls: Annotated[Any, _only([])] = None

    def message(self) -> Message:
        """As the model takes it."""
        role = "system" if self.role == "developer" else self.role
        return Message(role, "".join(part.text for part in self.content))


class JSONSchemaFormat(Wire):
    """A schema under its name. It is always obeyed, so `strict` says nothing more."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    json_schema: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Wire):
    """What form the answer has."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_belongs_to_its_type(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is needed with type json_schema, and with no other")
        return self

    def schema_text(self) -> str | None:
        """The JSON schema that the answer obeys, as JSON."""
        if self.json_schema is not None:
            return json.dumps(self.json_schema.json_schema)
        return None if self.type == "text" else '{"type": "object"}'


class ChatCompletionRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[tuple[ChatMessage, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = Field(
        description="roles `developer` (as `system`), `system`, `user`, `assistant`; text only"
    )
    max_tokens: PositiveInt | None = Field(None, description="as `max_completion_tokens`")
    max_completion_tokens: PositiveInt | None = Field(None, description="default: what the context has room for")
    logprobs: bool | None = Field(None, description="of the model before watermark, temperature and penalties")
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(None, description="0 to 20; needs `logprobs`")
    response_format: ResponseFormat | None = Field(
        None, description="`json_schema`: the answer obeys the schema, unless it is cut off; `json_object`; `text`"
    )
    prompt_cache_key: Label = None
    safety_identifier: Label = None

    audio: Annotated[Any, _only()] = None
    function_call: Annotated[Any, _only("none", "auto")] = None
    functions: Annotated[Any, _only([])] = None
    metadata: Annotated[Any, _only({})] = None
    modalities: Annotated[Any, _only(["text"])] = None
    moderation: Annotated[Any, _only()] = None
    parallel_tool_calls: Annotated[Any, _only(True, False)] = None
    prediction: Annotated[Any, _only()] = None
    prompt_cache_options: Annotated[Any, _only()] = None
    prompt_cache_retention: Annotated[Any, _only()] = None
    reasoning_effort: Annotated[Any, _only("none")] = None
    service_tier: Annotated[Any, _only("auto", "default")] = None
    store: Annotated[Any, _only(False)] = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None
    tools: Annotated[Any, _only([])] = None
    verbosity: Annotated[Any, _only("medium")] = None
    web_search_options: Annotated[Any, _only()] = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if None not in (limits := {self.max_tokens, self.max_completion_tokens}) and len(limits) > 1:
            message = "max_tokens and max_completion_tokens differ: give one"
            raise APIError(400, message, "max_completion_tokens", "invalid_value")
        if self.top_logprobs is not None and not self.logprobs:
            raise APIError(400, "top_logprobs: needs logprobs: true", "top_logprobs", "invalid_value")
        return self

    def text_requests(self) -> list[TextRequest]:
        """The conversation, once for each choice."""
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        messages = tuple(message.message() for message in self.messages)
        json_schema = self.response_format.schema_text() if self.response_format is not None else None
        each = self.sampling(max_tokens, (self.top_logprobs or 0) if self.logprobs else None, json_schema)
        return [TextRequest(messages, sampling, self.stop) for sampling in each]

    def wants_logprobs(self) -> bool:
        """Whether the choices bring log-probabilities."""
        return bool(self.logprobs)


class DetectRequest(Wire):
    """POST /v1/watermark/detect: a text, or its token ids."""

    text: str | None = Field(None, min_length=1, description="what may be marked, without its prompt")
    token_ids: Annotated[tuple[TokenId, ...], BeforeValidator(_as_tuple), Field(min_length=1)] | None = Field(
        None, description="the same as token ids; of `text` and `token_ids` exactly one"
    )

    def content(self) -> str | tuple[int, ...]:
        """The one that was given. Raises APIError unless it is exactly one."""
        if (self.text is None) == (self.token_ids is None):
            raise APIError(400, "Give text or token_ids, one of them", "text", "invalid_value")
        return self.text if self.text is not None else self.token_ids or ()
