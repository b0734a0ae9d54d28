"""One JSON line for each request: who, what, how long, and what came of it. Never a key; a prompt only if asked for."""

import json
import logging
from dataclasses import asdict, dataclass
from typing import TextIO

logger = logging.getLogger("alpaca_ray.access")

ROUTES = frozenset(
    {
        "/health",
        "/ready",
        "/v1/models",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/watermark/detect",
        "/openapi.json",
    }
)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER = "other"  # a path or method that a client made up may be anything, a key by mistake too


@dataclass(frozen=True)
class Access:
    """What became of a request. `refusal`: the reason's name, see admission.py; None: the API answered.

    `status`: 499 if the client left first. `first_event_s`: of a stream, after the request's headers. `num_tokens`: as
    the API counted. `prompt`: the body, if it may be logged.
    """

    request_id: str
    key: str | None
    method: str
    route: str
    status: int
    duration_s: float
    first_event_s: float | None = None
    refusal: str | None = None
    num_tokens: int | None = None
    prompt: str | None = None


def log_access(access: Access) -> None:
    """Write the line. Nothing shows before `start` gave the logger somewhere to write."""
    fields = {
        name: round(value, 6) if isinstance(value, float) else value
        for name, value in asdict(access).items()
        if value is not None
    }
    logger.info("%s", json.dumps({"event": "request", **fields}))


def start(stream: TextIO) -> None:
    """Have the lines written there, each by itself, so that collectors can parse them. For the ingress process."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def route_name(route: str) -> str:
    """A path of ours as it is, any other as "other"."""
    return route if route in ROUTES else "/v1/models/{model}" if route.startswith("/v1/models/") else OTHER


def method_name(method: str) -> str:
    """A known method as it is, any other as "other"."""
    return method if method in METHODS else OTHER
