"""One request to an OpenAI-compatible completions API -> one Completion. A failure is a value, never an exception."""

import json
import os
import time
from typing import Any

from httpx2 import InvalidURL
from openai import (
    APIConnectionError,
    APIError,
    APIResponseValidationError,
    APIStatusError,
    APITimeoutError,
    AsyncOpenAI,
    AuthenticationError,
    BadRequestError,
    NotFoundError,
    OpenAIError,
    PermissionDeniedError,
    RateLimitError,
    UnprocessableEntityError,
)

from alpaca_ray.config import TeacherConfig, UserError
from alpaca_ray.schema import Completion

# Every further request would fail in the same way: the run stops.
FATAL_ERRORS = frozenset({"authentication", "insufficient_quota", "model_not_found", "bad_request"})

_ERROR_NAMES: tuple[tuple[type[Exception], str], ...] = (
    (AuthenticationError, "authentication"),
    (PermissionDeniedError, "authentication"),
    (NotFoundError, "model_not_found"),
    (BadRequestError, "bad_request"),
    (UnprocessableEntityError, "bad_request"),
    (RateLimitError, "rate_limit"),
    (APITimeoutError, "timeout"),
    (APIConnectionError, "connection"),
    (APIResponseValidationError, "bad_response"),
    (APIStatusError, "server_error"),
    (InvalidURL, "connection"),
    (UnicodeEncodeError, "authentication"),  # a key that is not ASCII fits in no header
)

# ValueError: a body that is no JSON, a key that fits in no header. InvalidURL: no kind of the SDK's own errors.
FAILURES = (OpenAIError, ValueError, InvalidURL)


class Client:
    """Sends prompts to the teacher.

    The key is read here, on the node that sends, and goes nowhere else. A missing one makes every request fail with
    "authentication". `base_url` None means OPENAI_BASE_URL, or OpenAI's own.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self._config = config
        self._key = os.environ.get(config.api_key_env, "").strip()
        self._sdk: AsyncOpenAI | None = None

    async def complete(self, prompt: str, seed: int, stop: str) -> Completion:
        """Ask once. `seed` makes the answer reproducible where the server honours it."""
        if not self._key:
            detail = f"{self._config.api_key_env} is not set on the node that sends the requests"
            return Completion(text=None, error="authentication", error_detail=detail)
        started_s = time.monotonic()
        try:
            self._sdk = self._sdk or _sdk(self._config, self._key)
            response = await self._sdk.completions.create(
                model=self._config.model,
                prompt=prompt,
                max_tokens=self._config.max_tokens,
                temperature=self._config.temperature,
                top_p=self._config.top_p,
                seed=seed,
                stop=[stop],
            )
        except FAILURES as error:
            detail = _without(self._key, str(error))[:500]
            return Completion(None, error_name(error), error_detail=detail, latency_s=time.monotonic() - started_s)
        return _completion(response, self._key, time.monotonic() - started_s)


def _sdk(config: TeacherConfig, key: str) -> AsyncOpenAI:
    # The SDK's retries obey Retry-After and back off with jitter.
    return AsyncOpenAI(api_key=key, base_url=config.base_url, timeout=config.timeout_s, max_retries=config.max_retries)


def _completion(response: Any, key: str, latency_s: float) -> Completion:
    """The SDK checks no types: a login page or another API's answer must not pass for a completion."""
    choices = getattr(response, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    text = getattr(choice, "text", None)
    if not isinstance(text, str):
        detail = f"the answer is no completion: {_without(key, str(response))[:200]}"
        return Completion(None, "bad_response", error_detail=detail, latency_s=latency_s)
    usage = getattr(response, "usage", None)
    return Completion(
        text=text,
        finish_reason=getattr(choice, "finish_reason", None),
        prompt_tokens=getattr(usage, "prompt_tokens", None) or 0,
        completion_tokens=getattr(usage, "completion_tokens", None) or 0,
        latency_s=latency_s,
        response_id=getattr(response, "id", None),
    )


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
        async with _sdk(config.model_copy(update={"timeout_s": 10, "max_retries": 1}), key) as sdk:
            where = str(sdk.base_url) or where
            page = await sdk.models.with_raw_response.list()
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
    """The name under which a failure is counted. A spent quota comes as a 429 but does not pass by waiting."""
    if isinstance(error, APIError) and error.code == "insufficient_quota":
        return "insufficient_quota"
    return next((name for kind, name in _ERROR_NAMES if isinstance(error, kind)), "bad_response")
