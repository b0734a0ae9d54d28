"""What is sent to the teacher, and the hash that a paid answer to it is filed under. Pure."""

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from alpaca_ray.config import TeacherConfig

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Request:
    """One sample of one prompt. `seed` makes the answer reproducible where the server honours it.

    `chat`: the prompt is the one user message of a chat; else a text that the answer goes on from.
    """

    prompt: str
    seed: int
    chat: bool = False
    stop: str | None = None
    response_format: dict[str, Any] | None = None
    sample: int = 0  # tells two requests apart that are alike in everything else

    def of(self, prompt: str, seed: int) -> "Request":
        """A request of this form."""
        return replace(self, prompt=prompt, seed=seed)


def endpoint(request: Request) -> str:
    """The path below the base URL."""
    return "chat/completions" if request.chat else "completions"


def body(request: Request, teacher: TeacherConfig) -> dict[str, Any]:
    """The JSON that is sent: every parameter that decides the answer."""
    values: dict[str, Any] = {"model": teacher.model, "temperature": teacher.temperature, "top_p": teacher.top_p}
    if request.chat:
        # OpenAI's reasoning models refuse max_tokens in chats.
        values |= {
            "messages": [{"role": "user", "content": request.prompt}],
            "max_completion_tokens": teacher.max_tokens,
        }
    else:
        values |= {"prompt": request.prompt, "max_tokens": teacher.max_tokens}
    values["seed"] = request.seed
    if request.stop is not None:
        values["stop"] = [request.stop]
    if request.response_format is not None:
        values["response_format"] = request.response_format
    return values


def request_key(request: Request, teacher: TeacherConfig, base_url: str) -> str:
    """SHA-256 over the canonical request: endpoint, base URL, every parameter, the prompt, the sample index.

    A port of the loopback interface names no provider: a tunnel or a local server gets another one at every start,
    and what was answered through it stays answered.
    """
    parts = urlsplit(base_url.rstrip("/"))
    where = f"{parts.scheme}://{parts.hostname}{parts.path}" if parts.hostname in _LOOPBACK else parts.geturl()
    canonical = {
        "base_url": where, "endpoint": endpoint(request), "body": body(request, teacher), "sample": request.sample
    }  # fmt: skip
    return hashlib.sha256(json.dumps(canonical, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
