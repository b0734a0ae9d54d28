"""Why a request is not answered, as clients, logs and metrics are told."""

import json
import math
from dataclasses import dataclass

from alpaca_ray.serve.errors import APIError
from alpaca_ray.serve.places import Places
from alpaca_ray.serve.quota import Exceeded

DRAIN_RETRY_S = 5


@dataclass(frozen=True)
class Refusal:
    """Why a request is not answered. `reason` is for logs and metrics."""

    status: int
    reason: str
    message: str
    code: str | None = None
    kind: str | None = None  # OpenAI's `type`; None: by the status
    retry_after_s: float | None = None

    def body(self) -> bytes:
        """In OpenAI's form. Nothing of the request is in it."""
        value = APIError(self.status, self.message, code=self.code).body()
        if self.kind is not None:
            value["error"]["type"] = self.kind
        return json.dumps(value).encode()

    def headers(self) -> dict[str, str]:
        """With what a client needs to know to do better."""
        found = {"content-type": "application/json"}
        if self.retry_after_s is not None:
            found["retry-after"] = str(max(math.ceil(self.retry_after_s), 1))
        if self.status == 401:
            found["www-authenticate"] = 'Bearer realm="alpaca_ray"'
        return found


class Refused(Exception):
    """Carries the Refusal from where it is found to where it is answered."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal


def rate_limited(exceeded: Exceeded) -> Refusal:
    message = (
        f"Rate limit reached: {exceeded.limit} per minute of this API key; try again in {exceeded.retry_in_s:.1f}s"
    )
    reason = f"rate_{exceeded.limit}"
    return Refusal(429, reason, message, "rate_limit_exceeded", exceeded.limit, exceeded.retry_in_s)


def queue_full(places: Places) -> Refusal:
    message = "The server has as many requests as it can queue; try again later"
    return Refusal(429, "queue_full", message, "queue_full", "requests", places.retry_after_s())


def waited_too_long(places: Places) -> Refusal:
    message = "The request waited too long for its turn; try again later"
    return Refusal(429, "queue_timeout", message, "queue_timeout", "requests", places.retry_after_s())


NO_KEY = Refusal(
    401, "no_key", "No API key was given: send it in the header Authorization: Bearer KEY", "invalid_api_key"
)
WRONG_KEY = Refusal(401, "wrong_key", "The API key is not one of this server's", "invalid_api_key")
DRAINING = Refusal(
    503, "draining", "The server is shutting down; try again", "server_draining", retry_after_s=DRAIN_RETRY_S
)
SLOW_BODY = Refusal(408, "body_timeout", "The body of the request came too slowly", "request_timeout")
TOO_LONG = Refusal(408, "request_timeout", "The request took longer than this server allows", "request_timeout")
