"""Refusals in OpenAI's error format."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Refusal:
    """An answer with a status of 400 or above."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def payload(self) -> dict[str, object]:
        """The error as JSON."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def body(self) -> bytes:
        """The error as bytes."""
        return json.dumps(self.payload()).encode()


def no_key() -> Refusal:
    return Refusal(401, "You didn't provide an API key in the Authorization header (Authorization: Bearer KEY).")


def wrong_key() -> Refusal:
    return Refusal(401, "Incorrect API key provided.", code="invalid_api_key")


def forbidden() -> Refusal:
    return Refusal(403, "Your project has no access to this model.", code="permission_denied")


def no_such_model(model: str) -> Refusal:
    return Refusal(404, f"The model `{model}` does not exist.", param="model", code="model_not_found")


def not_found(what: str) -> Refusal:
    return Refusal(404, f"{what} was not found.", code="not_found")


def no_such_route(method: str, path: str) -> Refusal:
    return Refusal(404, f"Invalid URL ({method} {path})", code="unknown_url")


def insufficient_quota() -> Refusal:
    message = "You exceeded your current quota, please check your plan and billing details."
    return Refusal(429, message, type="insufficient_quota", code="insufficient_quota")


def rate_limited(kind: str, message: str, headers: Mapping[str, str]) -> Refusal:
    """`kind`: "requests" or "tokens"."""
    return Refusal(429, message, type=kind, code="rate_limit_exceeded", headers=headers)


def server_error() -> Refusal:
    message = "The server had an error while processing your request. Sorry about that!"
    return Refusal(500, message, type="server_error")


def unavailable(headers: Mapping[str, str]) -> Refusal:
    return Refusal(503, "That model is currently overloaded.", type="service_unavailable", headers=headers)


def content_filtered() -> Refusal:
    message = "The response was filtered due to the prompt triggering a content management policy."
    return Refusal(400, message, param="prompt", code="content_filter")


def duration_text(seconds: float) -> str:
    """A duration as in OpenAI's headers: 20ms, 1.5s, 6m0s, 1h2m3s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest_s = divmod(math.ceil(seconds * 1000) / 1000, 60)
    if not minutes:
        return f"{rest_s:g}s"
    hours, minutes = divmod(int(minutes), 60)
    return (f"{hours}h" if hours else "") + f"{minutes}m{rest_s:g}s"
