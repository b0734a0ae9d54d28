"""The token-level seam of the server: token ids in, token ids out. Text is the business of `text.py`."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, Protocol

FinishReason = Literal["stop", "length", "content_filter"]  # the last: moderation cut it, never an engine


class EngineError(RuntimeError):
    """The engine failed on a request that was right; the same request may succeed later."""


class ContextLengthError(ValueError):
    """Prompt and completion together would be longer than the engine's context."""

    def __init__(self, num_prompt_tokens: int, max_tokens: int | None, max_length: int) -> None:
        super().__init__(num_prompt_tokens, max_tokens, max_length)  # so that it pickles
        self.num_prompt_tokens, self.max_tokens, self.max_length = num_prompt_tokens, max_tokens, max_length

    def __str__(self) -> str:
        completion = "at least 1" if self.max_tokens is None else str(self.max_tokens)
        return (
            f"This model's maximum context length is {self.max_length} tokens, but the prompt has "
            f"{self.num_prompt_tokens} and {completion} were asked for. Shorten the prompt or lower max_tokens"
        )


class SchemaError(ValueError):
    """A JSON schema that no completion can be held to. The text says why."""


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. `temperature` 0 is greedy; `seed` None takes a new one from the system.

    Token k of a completion is drawn from (seed, k) alone, whatever else the batch holds.
    """

    max_tokens: int | None = None  # None: as many as the context has room for
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    seed: int | None = None
    presence_penalty: float = 0.0  # OpenAI's penalties, over the tokens of the completion
    frequency_penalty: float = 0.0
    json_schema: str | None = None  # JSON; the completion is a value that it allows, cut off by max_tokens alone
    num_logprobs: int | None = None  # likeliest tokens told with each token; 0: its own alone; None: nothing


@dataclass(frozen=True)
class TokenRequest:
    """A prompt, never empty. `stop_token_ids` end a completion beside the model's own end-of-sequence tokens.

    `emitted`: what an engine that died had already given; the completion goes on behind it, `max_tokens` counts it.
    """

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    stop_token_ids: frozenset[int] = frozenset()
    emitted: tuple[int, ...] = ()
    echoes_logprobs: bool = False  # of the prompt's tokens too, in the first delta; `max_tokens` may be 0 then


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its log-probability in nats, and the likeliest ones in its place, likeliest first.

    Of the model as it is: before the watermark, the temperature and the penalties.
    """

    token_id: int
    logprob: float | None  # None: the prompt's first token, which nothing foretold
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """The next tokens, without the one that stopped it. `finish_reason` stands in the last delta and only there."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()  # one for each of token_ids, where they were asked for
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # in the first delta, where they were asked for


@dataclass(frozen=True)
class Health:
    """What the engine has in hand right now."""

    num_running: int
    num_waiting: int
    is_asleep: bool = False  # there is no engine while nobody asks; the next request waits for one


class Engine(Protocol):
    """What turns tokens into tokens: PyTorch here, vLLM elsewhere, a few lines in a test."""

    def generate(self, request: TokenRequest) -> AsyncGenerator[Delta, None]:
        """Deltas as they come; closing the generator, or cancelling its task, drops the request from the batch.

        Raises ContextLengthError and SchemaError before the first delta, EngineError at any point.
        """
        ...

    async def health(self) -> Health:
        """Raises EngineError if no request can succeed any more."""
        ...


def room_for_completion(request: TokenRequest, max_length: int) -> int:
    """How many tokens the request may generate, 1 at least. Raises ContextLengthError."""
    num_prompt_tokens, max_tokens = len(request.prompt_token_ids), request.sampling.max_tokens
    room = max_length - num_prompt_tokens
    if room < (1 if max_tokens is None else max_tokens):
        raise ContextLengthError(num_prompt_tokens, max_tokens, max_length)
    return room if max_tokens is None else max_tokens
