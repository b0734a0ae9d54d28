"""The choices of one request as they grow, and how each endpoint of OpenAI's API words them."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from alpaca_ray.serve.text import TextDelta, TextLogprob

LEAST_LOGPROB = -9999.0  # what OpenAI writes for a token that cannot be; JSON has no infinity


@dataclass
class _Choice:
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[TextLogprob] = field(default_factory=list)
    num_prompt_tokens: int = 0


@dataclass
class Answer:
    """The answer to one request: `num_choices` in all, `choices_per_prompt` of them to each prompt."""

    is_chat: bool
    model_name: str
    num_choices: int
    choices_per_prompt: int = 1
    has_logprobs: bool = False
    includes_usage: bool = False  # of a stream: every event has a field for it
    created_s: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self._choices = [_Choice() for _ in range(self.num_choices)]
        self._num_tokens = 0

    def take(self, index: int, delta: TextDelta) -> None:
        """Add a delta to its choice."""
        choice = self._choices[index]
        choice.text += _text(delta)
        choice.logprobs += _logprobs(delta)
        choice.finish_reason = delta.finish_reason
        choice.num_prompt_tokens = delta.num_prompt_tokens
        self._num_tokens += delta.num_tokens

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices = []
        for i, choice in enumerate(self._choices):
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            content = {"message": message} if self.is_chat else {"text": choice.text}
            choices.append(_choice(i, content, self._worded(choice.logprobs), choice.finish_reason))
        return self._envelope("", choices) | {"usage": self.usage()}

    def opening(self) -> list[dict[str, Any]]:
        """The choices of a chat stream begin with the role."""
        if not self.is_chat:
            return []
        role = {"delta": {"role": "assistant", "content": "", "refusal": None}}
        return [self._event([_choice(i, role, None, None)]) for i in range(self.num_choices)]

    def chunks(self, index: int, delta: TextDelta) -> list[dict[str, Any]]:
        """The stream's next event, for a delta that was taken: none while text is held back."""
        text, logprobs = _text(delta), _logprobs(delta)
        if not text and not logprobs and delta.finish_reason is None:
            return []
        worded = self._worded(logprobs) if logprobs else None
        content = {"delta": {"content": text}} if self.is_chat else {"text": text}
        return [self._event([_choice(index, content, worded, delta.finish_reason)])]

    def usage_chunk(self) -> dict[str, Any]:
        """The last event of a stream that asked for the counts."""
        return self._event([]) | {"usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Token counts so far. A prompt counts once, however many choices it has."""
        prompt_tokens = sum(choice.num_prompt_tokens for choice in self._choices[:: self.choices_per_prompt])
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self._num_tokens,
            "total_tokens": prompt_tokens + self._num_tokens,
        }

    def _worded(self, logprobs: Sequence[TextLogprob]) -> dict[str, Any] | None:
        if not self.has_logprobs:
            return None
        return chat_logprobs(logprobs) if self.is_chat else completion_logprobs(logprobs)

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self.includes_usage else {}
        return self._envelope(".chunk" if self.is_chat else "", choices) | usage

    def _envelope(self, suffix: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        prefix, kind = ("chatcmpl", "chat.completion") if self.is_chat else ("cmpl", "text_completion")
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind + suffix,
            "created": self.created_s,
            "model": self.model_name,
            "choices": choices,
        }


def _choice(
    index: int, content: dict[str, Any], logprobs: dict[str, Any] | None, finish_reason: str | None
) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}


def _text(delta: TextDelta) -> str:
    return delta.text if delta.prompt is None else delta.prompt.text + delta.text


def _logprobs(delta: TextDelta) -> tuple[TextLogprob, ...]:
    return delta.logprobs if delta.prompt is None else delta.prompt.logprobs + delta.logprobs


def chat_logprobs(logprobs: Sequence[TextLogprob]) -> dict[str, Any]:
    """As /v1/chat/completions has them: an entry for each token."""

    def entry(token: bytes, value: float | None) -> dict[str, Any]:
        return {"token": token_text(token), "logprob": _number(value), "bytes": list(token)}

    tokens = [
        entry(one.token, one.logprob) | {"top_logprobs": [entry(token, value) for token, value in one.top]}
        for one in logprobs
    ]
    return {"content": tokens, "refusal": None}


def completion_logprobs(logprobs: Sequence[TextLogprob]) -> dict[str, Any]:
    """As /v1/completions has them: a list for each field. Offsets count from the beginning of the prompt."""
    return {
        "tokens": [token_text(one.token) for one in logprobs],
        "token_logprobs": [_number(one.logprob) for one in logprobs],
        "top_logprobs": [_top(one) for one in logprobs],
        "text_offset": [one.offset for one in logprobs],
    }


def _top(one: TextLogprob) -> dict[str, float | None] | None:
    """The likeliest tokens, and the one that stands there if it is not among them."""
    if one.logprob is None:
        return None
    top: dict[str, float | None] = {}
    for token, value in (*one.top, (one.token, one.logprob)):
        top.setdefault(token_text(token), _number(value))
    return top


def token_text(token: bytes) -> str:
    r"""The token as text; where it is a piece of a character, as OpenAI writes it: `bytes:\xe2\x82`."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _number(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST_LOGPROB)
