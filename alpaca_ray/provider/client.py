"""One request to an OpenAI-compatible API -> one Completion. A failure is a value, never an exception."""

import asyncio
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from aiohttp import ClientConnectionError, ClientError
from httpx2 import AsyncClient, InvalidURL, Response
from openai import (
    APIConnectionError,
    APIError,
    APIResponseValidationError,
    APIStatusError,
    APITimeoutError,
    AsyncOpenAI,
    AuthenticationError,
    BadRequestError,
    DefaultAioHttpClient,
    NotFoundError,
    OpenAIError,
    PermissionDeniedError,
    RateLimitError,
    UnprocessableEntityError,
)

from alpaca_ray.config import TeacherConfig, UserError
from alpaca_ray.provider.request import Request, body, endpoint
from alpaca_ray.schema import Completion

_ERROR_NAMES: tuple[tuple[type[Exception], str], ...] = (
    (AuthenticationError, "authentication"),
    (PermissionDeniedError, "authentication"),
    (NotFoundError, "model_not_found"),
    (BadRequestError, "bad_request"),
    (UnprocessableEntityError, "bad_request"),
    (RateLimitError, "rate_limit"),
    (APITimeoutError, "timeout"),
    (TimeoutError, "timeout"),
    (APIConnectionError, "connection"),
    (APIResponseValidationError, "bad_response"),
    (APIStatusError, "server_error"),
    (InvalidURL, "connection"),
    (ClientError, "connection"),  # what is no HTTP
    (UnicodeEncodeError, "authentication"),  # a key that is not ASCII fits in no header
)

# ValueError: a body that is no JSON, a key that fits in no header. The SDK lets some errors of its transports through.
FAILURES = (OpenAIError, ValueError, InvalidURL, ClientError, TimeoutError)


@dataclass(frozen=True)
class Reply:
    """A Completion, and the headers it came with (names in lower case): they speak of the limits."""

    completion: Completion
    headers: Mapping[str, str] = field(default_factory=dict)


class Client:
    """Sends requests to the teacher.

    The key is read here, on the node that sends, and goes nowhere else. A missing one makes every request fail with
    "authentication". `base_url` None means OPENAI_BASE_URL, or OpenAI's own.
    """

    def __init__(self, teacher: TeacherConfig) -> None:
        self._teacher = teacher
        self._key = os.environ.get(teacher.api_key_env, "").strip()
        self._sdk: AsyncOpenAI | None = None

    async def complete(self, request: Request) -> Reply:
        """Ask once, `timeout_s` at most from the first byte to the last."""
        started_s = time.monotonic()
        reply = await self._ask(request)
        took = replace(reply.completion, latency_s=time.monotonic() - started_s, finished_at=time.time())
        return Reply(took, reply.headers)

    async def _ask(self, request: Request) -> Reply:
        if not (self._key and self._key.isascii() and self._key.isprintable()):
            what = "fits in no header" if self._key else "is not set"
            detail = f"{self._teacher.api_key_env} {what} on the node that sends the requests"
            return Reply(Completion(text=None, error="authentication", error_detail=detail))
        try:
            # A request takes 0.9 ms of CPU like this, 2.0 through httpx and the SDK's types.
            self._sdk = self._sdk or sdk(self._teacher, self._key, DefaultAioHttpClient())
            asked = body(request, self._teacher)
            # The SDK's own time-out starts anew with every byte: a body that trickles would never end.
            async with asyncio.timeout(self._teacher.timeout_s):
                response = await self._sdk.post(f"/{endpoint(request)}", body=asked, cast_to=Response)
        except FAILURES as error:
            detail = _without(self._key, str(error))[:500]
            headers = error.response.headers if isinstance(error, APIStatusError) else {}
            return Reply(Completion(None, error_name(error), error_detail=detail), _lower(headers))
        said = completion_of(_said(response), request.chat, self._teacher, self._key)
        return Reply(said, _lower(response.headers))

    async def close(self) -> None:
        """Close the connections. A closed client opens new ones when it is asked again."""
        if self._sdk is not None:
            await self._sdk.close()
            self._sdk = None


def sdk(teacher: TeacherConfig, key: str, http_client: AsyncClient | None = None) -> AsyncOpenAI:
    """OpenAI's client without its own retries, which would pass the rate limit by."""
    return AsyncOpenAI(
        api_key=key, base_url=teacher.base_url, timeout=teacher.timeout_s, max_retries=0, http_client=http_client
    )


def completion_of(said: Any, chat: bool, teacher: TeacherConfig, key: str) -> Completion:
    """`said`: JSON of any shape. A login page or another API's answer must not pass for a completion."""
    choices, usage = _part(said, "choices"), _part(said, "usage")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = _part(choice, "message")
    completion = Completion(
        text=None,
        finish_reason=_part(choice, "finish_reason"),
        prompt_tokens=_part(usage, "prompt_tokens") or 0,
        completion_tokens=_part(usage, "completion_tokens") or 0,
        response_id=_part(said, "id"),
        model=_part(said, "model"),
        fingerprint=_part(said, "system_fingerprint"),
    )
    text = _part(message, "content") if chat else _part(choice, "text")
    if completion.finish_reason == "content_filter":
        detail = "the provider's content filter held the answer back"
        return replace(completion, error="content_filter", error_detail=detail)
    if refusal := _part(message, "refusal"):
        return replace(completion, error="refusal", error_detail=_without(key, str(refusal))[:500])
    if not isinstance(text, str):
        detail = f"the answer is no completion: {_without(key, str(said))[:200]}"
        return replace(completion, error="bad_response", error_detail=detail)
    if teacher.verify_model and completion.model is not None and not same_model(teacher.model, completion.model):
        detail = f"asked {teacher.model}, answered by {completion.model}; generate.teacher.verify_model=false allows it"
        return replace(completion, error="wrong_model", error_detail=detail)
    return replace(completion, text=text)


def _said(response: Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return response.text


def _part(said: Any, name: str) -> Any:
    return said.get(name) if isinstance(said, dict) else None


def same_model(asked: str, answered: str) -> bool:
    """Whether the model that answered is the one asked for: itself, a dated version, or with its organisation."""
    asked, answered = asked.rpartition("/")[2], answered.rpartition("/")[2]
    return re.fullmatch(rf"{re.escape(asked)}(-\d[\d-]*)?", answered) is not None


def _lower(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def _without(key: str, text: str) -> str:
    """A server may quote the key it was sent; it goes into no artifact and no log."""
    return text.replace(key, "(key)")


async def check_access(config: TeacherConfig) -> None:
    """Ask for the list of models, which costs nothing.

    Raises UserError for a missing or refused key, an endpoint that cannot be reached, and an unknown model.
    """
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise UserError(
            f"{config.api_key_env} is not set: export the key of the teacher's API under that name "
            "(any value for a server without keys)"
        )
    where = config.base_url or os.environ.get("OPENAI_BASE_URL") or "of OpenAI"
    try:
        async with sdk(config.model_copy(update={"timeout_s": 10}), key) as client:
            where = str(client.base_url) or where
            page = await client.with_options(max_retries=2).models.with_raw_response.list()
            names = [str(model["id"]) for model in json.loads(page.http_response.content)["data"]]
    except NotFoundError:
        return  # a server without this route; the first request will tell
    except APIConnectionError as error:  # time-outs are a kind of it
        raise UserError(
            f"the teacher's endpoint {where} cannot be reached ({error}): check OPENAI_BASE_URL and "
            "generate.teacher.base_url"
        ) from None
    except OpenAIError as error:
        message = _without(key, str(error))
        raise UserError(f"the teacher's endpoint {where} refused ({error_name(error)}): {message}") from None
    except (ValueError, TypeError, KeyError, InvalidURL) as error:
        raise UserError(f"the teacher's endpoint {where} is no OpenAI-compatible API: {error}") from None
    if config.model not in names:
        some = ", ".join(sorted(names)[:10])
        raise UserError(f"generate.teacher.model: {where} has no model {config.model!r}; it has: {some}")


def error_name(error: Exception) -> str:
    """The name under which a failure is counted.

    A spent quota comes as a 429 but does not pass by waiting; a filtered prompt comes as a 400 but is no fault of ours.
    """
    code = error.code if isinstance(error, APIError) else None
    if code == "insufficient_quota":
        return code
    if code in ("content_filter", "content_policy_violation"):
        return "content_filter"
    if isinstance(error, APITimeoutError) and _is_lost_connection(error.__cause__):
        return "connection"
    return next((name for kind, name in _ERROR_NAMES if isinstance(error, kind)), "bad_response")


def _is_lost_connection(error: BaseException | None) -> bool:
    """The SDK's aiohttp transport calls every connection that fails a time-out."""
    cause = None if error is None else error.__cause__
    return isinstance(cause, ClientConnectionError) and not isinstance(cause, TimeoutError)
