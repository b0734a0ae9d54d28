"""The lines of a batch's files, in OpenAI's format: requests in, answers and errors out. Pure."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import openai
from httpx2 import Request as HttpRequest
from httpx2 import Response

from alpaca_ray.config import TeacherConfig
from alpaca_ray.provider.client import completion_of, error_name
from alpaca_ray.provider.failures import FATAL_ERRORS, FINAL_ERRORS
from alpaca_ray.provider.request import Request, body, endpoint
from alpaca_ray.schema import Completion

MAX_REQUESTS, MAX_BYTES = 50_000, 200 * 10**6  # of an input file
UNBILLED_ERRORS = frozenset({"batch_expired", "batch_cancelled", "batch_failed"})

_STATUS_ERRORS = (
    openai.BadRequestError, openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError,
    openai.UnprocessableEntityError, openai.RateLimitError,
)  # fmt: skip


def url(request: Request) -> str:
    """Where OpenAI answers it, whatever the base URL."""
    return f"/v1/{endpoint(request)}"


def input_line(key: str, request: Request, teacher: TeacherConfig) -> bytes:
    """A request under its key; the key's 64 digits are the most that a custom id may have."""
    row = {"custom_id": key, "method": "POST", "url": url(request), "body": body(request, teacher)}
    return json.dumps(row, separators=(",", ":")).encode() + b"\n"


def split(
    lines: Iterable[tuple[str, bytes]], max_requests: int = MAX_REQUESTS, max_bytes: int = MAX_BYTES
) -> Iterator[dict[str, bytes]]:
    """Lines by their keys, in files that the provider takes. A line above `max_bytes` has one of its own."""
    part: dict[str, bytes] = {}
    size = 0
    for key, line in lines:
        if part and (len(part) == max_requests or size + len(line) > max_bytes):
            yield part
            part, size = {}, 0
        part[key] = line
        size += len(line)
    if part:
        yield part


def read_rows(content: bytes, chat: bool, teacher: TeacherConfig, api_key: str) -> Iterator[tuple[str, Completion]]:
    """Custom id and completion of each line of an output or error file; what is no such line is skipped.

    Latency is not known; `finished_at` is when the provider says that it made the answer.
    """
    for line in content.split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("custom_id"), str):
            yield row["custom_id"], _completion(row, chat, teacher, api_key)


def _completion(row: Mapping[str, Any], chat: bool, teacher: TeacherConfig, api_key: str) -> Completion:
    response, error = row.get("response"), row.get("error")
    if isinstance(response, dict) and isinstance(response.get("body"), dict):
        said = response["body"]
        if response.get("status_code") != 200:
            return _refused(response.get("status_code"), said.get("error"), api_key)
        completion = completion_of(said, chat, teacher, api_key)
        created = said.get("created")
        return replace(completion, finished_at=float(created) if isinstance(created, int) else 0.0)
    code = error.get("code") if isinstance(error, dict) else None
    known = isinstance(code, str) and code in UNBILLED_ERRORS | FATAL_ERRORS | FINAL_ERRORS
    return _failed(str(code) if known else "bad_response", error, api_key)


def _refused(status: Any, error: Any, api_key: str) -> Completion:
    """Under the name that the client gives to the same HTTP error."""
    kind = next((kind for kind in _STATUS_ERRORS if kind.status_code == status), openai.APIStatusError)
    response = Response(status if isinstance(status, int) else 500, request=HttpRequest("POST", "http://batch"))
    return _failed(error_name(kind("", response=response, body=error)), error, api_key)


def _failed(name: str, error: Any, api_key: str) -> Completion:
    detail = error.get("message", error) if isinstance(error, dict) else error
    return Completion(None, name, error_detail=str(detail).replace(api_key, "(key)")[:500])
