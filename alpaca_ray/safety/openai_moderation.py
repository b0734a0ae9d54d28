"""OpenAI's moderation endpoint, or one that speaks like it, as a Moderator."""

import asyncio
import os
from collections.abc import Sequence

from aiohttp import ClientError
from httpx2 import InvalidURL, Response
from openai import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AsyncOpenAI,
    DefaultAioHttpClient,
    OpenAIError,
)
from pydantic import BaseModel, SecretStr, ValidationError

from alpaca_ray.config import UserError
from alpaca_ray.safety.verdict import ModerationUnavailableError, UnjudgeableTextError, Verdict

NAME = "openai"
MAX_INPUTS = 32  # texts of one call
# A long text is judged in windows: the endpoint refuses what is too long, and one bad sentence among many good ones
# moves a long text's score little. Windows share an overlap, so that no sentence falls between them.
WINDOW_CHARS, OVERLAP_CHARS = 8000, 500
# These answers speak of the texts; all others speak of the endpoint, the key or the quota.
REFUSED_TEXT = (400, 413, 422)
STATUS_NAMES = {401: "authentication", 403: "authentication", 404: "not_found", 429: "rate_limit"}


class _Result(BaseModel, strict=True):
    flagged: bool
    categories: dict[str, bool | None]


class _Answer(BaseModel, strict=True):
    results: list[_Result]


class OpenAIModerator:
    """`base_url` None means OPENAI_BASE_URL, or OpenAI's own.

    The time-out holds for a whole call: the SDK's own (600 s) starts anew with every byte. The SDK's retries are off:
    the next backend is the retry.
    """

    def __init__(
        self,
        key: SecretStr,
        base_url: str | None = None,
        model: str = "omni-moderation-latest",
        timeout_s: float = 2.0,
    ) -> None:
        self._key, self._base_url, self._model, self._timeout_s = key, base_url, model, timeout_s
        self._sdk: AsyncOpenAI | None = None

    async def moderate(self, texts: Sequence[str]) -> list[Verdict]:
        """See `Moderator`. Raises UnjudgeableTextError where the endpoint calls the request bad."""
        pieces = [(i, window) for i, text in enumerate(texts) for window in windows(sendable(text)) if window.strip()]
        batches = [pieces[start : start + MAX_INPUTS] for start in range(0, len(pieces), MAX_INPUTS)]
        answers = await asyncio.gather(*(self._ask([piece for _, piece in batch]) for batch in batches))
        flags: list[set[str]] = [set() for _ in texts]
        for batch, results in zip(batches, answers, strict=True):
            for (index, _), result in zip(batch, results, strict=True):
                flags[index] |= _flags(result)
        return [Verdict(bool(found), tuple(sorted(found)), NAME, degraded=False) for found in flags]

    async def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        if self._sdk is not None:
            await self._sdk.close()
            self._sdk = None

    async def _ask(self, inputs: list[str]) -> list[_Result]:
        body = {"model": self._model, "input": inputs}
        try:
            self._sdk = self._sdk or self._connect()
            async with asyncio.timeout(self._timeout_s):
                response = await self._sdk.post("/moderations", body=body, cast_to=Response)
            results = _Answer.model_validate_json(response.content).results
        # ValueError: a key that fits in no header. The SDK lets some errors of its transport through.
        except (OpenAIError, ValueError, InvalidURL, ClientError, TimeoutError) as error:
            raise _as_unavailable(error) from None
        if len(results) != len(inputs):
            raise ModerationUnavailableError("bad_response")
        return results

    def _connect(self) -> AsyncOpenAI:
        return AsyncOpenAI(
            api_key=self._key.get_secret_value(),
            base_url=self._base_url,
            timeout=self._timeout_s,
            max_retries=0,
            http_client=DefaultAioHttpClient(),
        )


def read_key(key_env: str) -> SecretStr:
    """The key from the environment. Raises UserError where there is none that a header can carry."""
    key = os.environ.get(key_env, "").strip()
    if not (key and key.isascii() and key.isprintable()):
        what = "holds characters that no header can carry" if key else "is not set"
        raise UserError(
            f"{key_env} {what}: export the key of the moderation endpoint under that name "
            "(any value for a server without keys)"
        )
    return SecretStr(key)


def sendable(text: str) -> str:
    """Without lone surrogates, which fit in no JSON body."""
    return text.encode("utf-8", "replace").decode()


def windows(text: str) -> list[str]:
    """The text in pieces of at most WINDOW_CHARS that overlap; one piece if it is short."""
    step = WINDOW_CHARS - OVERLAP_CHARS
    return [text[start : start + WINDOW_CHARS] for start in range(0, max(1, len(text) - OVERLAP_CHARS), step)]


def _flags(result: _Result) -> set[str]:
    """Empty if it is not flagged. A server may flag without a category."""
    return {name for name, holds in result.categories.items() if holds} or {"unnamed"} if result.flagged else set()


def _as_unavailable(error: Exception) -> ModerationUnavailableError:
    """By kind alone: an error's own text may quote the key or the input."""
    if isinstance(error, APIStatusError):
        if error.status_code in REFUSED_TEXT:
            return UnjudgeableTextError("refused")
        return ModerationUnavailableError(STATUS_NAMES.get(error.status_code, "server_error"))
    if isinstance(error, ValidationError):
        return ModerationUnavailableError("bad_response")
    if isinstance(error, TimeoutError | APITimeoutError) and not _is_lost_connection(error):
        return ModerationUnavailableError("timeout")
    if isinstance(error, APIConnectionError | TimeoutError | InvalidURL | ClientError):
        return ModerationUnavailableError("connection")
    return ModerationUnavailableError("bad_response")


def _is_lost_connection(error: BaseException) -> bool:
    """The SDK's aiohttp transport calls every connection that fails a time-out; its causes tell."""
    cause = error.__cause__
    if cause is None:
        return False
    return (isinstance(cause, ClientError) and not isinstance(cause, TimeoutError)) or _is_lost_connection(cause)
