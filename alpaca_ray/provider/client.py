"""One request to an OpenAI-compatible completions API -> one Completion. A failure is a value, never an exception."""

import os
import time

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

_ERROR_NAMES: tuple[tuple[type[OpenAIError], str], ...] = (
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
)


class Client:
    """Sends prompts to the teacher.

    The key is read here, on the node that sends, and goes nowhere else. A missing one makes every request fail with
    "authentication". `base_url` None means OPENAI_BASE_URL, or OpenAI's own.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self._config = config
        key = os.environ.get(config.api_key_env)
        # The SDK's retries obey Retry-After and back off with jitter.
        self._sdk = key and AsyncOpenAI(
            api_key=key, base_url=config.base_url, timeout=config.timeout_s, max_retries=config.max_retries
        )

    async def complete(self, prompt: str, seed: int, stop: str) -> Completion:
        """Ask once. `seed` makes the answer reproducible where the server honours it."""
        if not self._sdk:
            detail = f"{self._config.api_key_env} is not set on the node that sends the requests"
            return Completion(text=None, error="authentication", error_detail=detail)
        started_s = time.monotonic()
        try:
            response = await self._sdk.completions.create(
                model=self._config.model,
                prompt=prompt,
                max_tokens=self._config.max_tokens,
                temperature=self._config.temperature,
                top_p=self._config.top_p,
                seed=seed,
                stop=[stop],
            )
        except OpenAIError as error:
            return Completion(
                None, error_name(error), error_detail=str(error)[:500], latency_s=time.monotonic() - started_s
            )
        latency_s = time.monotonic() - started_s
        if not response.choices or response.choices[0].text is None:
            return Completion(None, "bad_response", error_detail="no choices in the response", latency_s=latency_s)
        usage = response.usage
        return Completion(
            text=response.choices[0].text,
            finish_reason=response.choices[0].finish_reason,
            prompt_tokens=usage.prompt_tokens if usage else 0,
            completion_tokens=usage.completion_tokens if usage else 0,
            latency_s=latency_s,
            response_id=response.id,
        )


async def check_access(config: TeacherConfig) -> None:
    """Ask for the list of models, which costs nothing.

    Raises UserError for a missing or refused key, an endpoint that cannot be reached, and an unknown model.
    """
    key = os.environ.get(config.api_key_env)
    if not key:
        raise UserError(
            f"{config.api_key_env} is not set: export the key of the teacher's API under that name "
            "(any value for a server without keys)"
        )
    async with AsyncOpenAI(api_key=key, base_url=config.base_url, timeout=10, max_retries=1) as sdk:
        where = str(sdk.base_url)
        try:
            names = [model.id async for model in sdk.models.list()]
        except NotFoundError:
            return  # a server without this route; the first request will tell
        except APIConnectionError as error:  # time-outs are a kind of it
            raise UserError(
                f"the teacher's endpoint {where} cannot be reached: {error}. Check OPENAI_BASE_URL"
            ) from None
        except OpenAIError as error:
            raise UserError(f"the teacher's endpoint {where} refused ({error_name(error)}): {error}") from None
    if config.model not in names:
        some = ", ".join(sorted(names)[:10])
        raise UserError(f"generate.teacher.model: {where} has no model {config.model!r}; it has: {some}")


def error_name(error: OpenAIError) -> str:
    """The name under which a failure is counted. A spent quota comes as a 429 but does not pass by waiting."""
    if isinstance(error, APIError) and error.code == "insufficient_quota":
        return "insufficient_quota"
    return next((name for kind, name in _ERROR_NAMES if isinstance(error, kind)), "bad_response")
