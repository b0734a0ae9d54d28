"""OpenAI's wire format: strict request models and the error body. What we do not support is refused by name."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt

from alpaca_ray.config import nearest
from alpaca_ray.serve.engine import SamplingParams
from alpaca_ray.serve.text import Message, TextRequest

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions; a chat answer may fill the context
MAX_STOP_STRINGS = 4


class APIError(Exception):
    """An answer other than 200, in OpenAI's form. `param` names the field that was wrong."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message, param, code)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """What the client reads."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _only(*neutral: Any) -> BeforeValidator:
    """A field of OpenAI's API without effect here: refused unless null or a value that asks for nothing."""

    def check(value: Any) -> Any:
        if value is not None and not any(value == allowed and type(value) is type(allowed) for allowed in neutral):
            allowed = f"; leave it out or give {neutral[0]!r}" if neutral else "; leave it out"
            raise ValueError(f"not supported by this server{allowed}")
        return value

    return BeforeValidator(check)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _stop_strings(value: Any) -> Any:
    strings = () if value is None else (value,) if isinstance(value, str) else _as_tuple(value)
    if isinstance(strings, tuple) and len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"at most {MAX_STOP_STRINGS} stop strings")
    return strings


NonEmpty = Annotated[str, Field(min_length=1)]


class Wire(BaseModel):
    """Strict: no unknown fields, no conversions ("5" is no number)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class StreamOptions(Wire):
    """`include_usage`: one more event before [DONE], with the token counts and no choices."""

    include_usage: bool = False


class _Request(Wire):
    """What both endpoints take. An explicit null is the default, as OpenAI has it."""

    model: str
    max_tokens: PositiveInt | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[tuple[NonEmpty, ...], BeforeValidator(_stop_strings)] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # a label for the caller's own accounting; it changes no answer

    n: Annotated[Any, _only(1)] = None
    presence_penalty: Annotated[Any, _only(0, 0.0)] = None
    frequency_penalty: Annotated[Any, _only(0, 0.0)] = None
    logit_bias: Annotated[Any, _only({})] = None

    def sampling(self, max_tokens: int | None) -> SamplingParams:
        """As the engine takes it."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
        )

    def includes_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Request):
    """POST /v1/completions. A list of prompts gives one choice each."""

    prompt: str | Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1, max_length=128)]

    best_of: Annotated[Any, _only(1)] = None
    echo: Annotated[Any, _only(False)] = None
    logprobs: Annotated[Any, _only()] = None
    suffix: Annotated[Any, _only("")] = None

    def text_requests(self) -> list[TextRequest]:
        """One for each prompt, in order."""
        sampling = self.sampling(DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens)
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return [TextRequest(prompt, sampling, self.stop) for prompt in prompts]


class TextPart(Wire):
    """A piece of a message; there are no images or sounds here."""

    type: Literal["text"]
    text: str


class ChatMessage(Wire):
    """One turn. Content parts are joined as they are."""

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[tuple[TextPart, ...], BeforeValidator(_as_tuple)]

    name: Annotated[Any, _only()] = None
    refusal: Annotated[Any, _only()] = None
    tool_calls: Annotated[Any, _only([])] = None

    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatCompletionRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[tuple[ChatMessage, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
    max_completion_tokens: PositiveInt | None = None

    audio: Annotated[Any, _only()] = None
    function_call: Annotated[Any, _only("none", "auto")] = None
    functions: Annotated[Any, _only([])] = None
    logprobs: Annotated[Any, _only(False)] = None
    metadata: Annotated[Any, _only({})] = None
    modalities: Annotated[Any, _only(["text"])] = None
    parallel_tool_calls: Annotated[Any, _only(True, False)] = None
    prediction: Annotated[Any, _only()] = None
    reasoning_effort: Annotated[Any, _only("none")] = None
    response_format: Annotated[Any, _only({"type": "text"})] = None
    service_tier: Annotated[Any, _only("auto", "default")] = None
    store: Annotated[Any, _only(False)] = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None
    tools: Annotated[Any, _only([])] = None
    top_logprobs: Annotated[Any, _only()] = None
    verbosity: Annotated[Any, _only("medium")] = None
    web_search_options: Annotated[Any, _only()] = None

    def text_requests(self) -> list[TextRequest]:
        """The conversation, as the one request that it is. Raises APIError if both limits are given and differ."""
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise APIError(400, "max_tokens and max_completion_tokens differ: give one", "max_completion_tokens")
        messages = tuple(Message(message.role, message.text()) for message in self.messages)
        return [TextRequest(messages, self.sampling(next(iter(limits), None)), self.stop)]


def explain_invalid(errors: Sequence[Any], model: type[BaseModel] | None) -> APIError:
    """The first of pydantic's errors as OpenAI's clients read it; an unknown field comes with its nearest name."""
    error = errors[0]
    if error["type"] == "json_invalid":
        return APIError(400, f"The body is not valid JSON: {error['ctx']['error']}", code="invalid_json")
    location = [str(part) for part in error["loc"] if part != "body"]
    param = ".".join(location) or None
    if error["type"] == "extra_forbidden":
        hint = nearest(location[-1], list(model.model_fields) if model is not None and len(location) == 1 else [])
        return APIError(400, f"Unknown field {param}{hint}", param, "unknown_field")
    return APIError(400, f"{param or 'The body'}: {error['msg'].removeprefix('Value error, ')}", param, "invalid_value")
