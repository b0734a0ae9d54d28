"""Calls of OpenAI's Batch API that wait for outages to pass. No call costs money but the creation of a batch."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Literal, TypeVar, cast

from openai import AsyncOpenAI
from openai.types import Batch, FileObject

from alpaca_ray.config import UserError
from alpaca_ray.provider.client import FAILURES, error_name
from alpaca_ray.provider.failures import FATAL_ERRORS

POLL_S, MAX_POLL_S, POLL_GROWTH = 5.0, 60.0, 1.5
METADATA = "alpaca_ray"  # under this name a batch carries its digest, for people who look at the provider's list

_ENDED = ("completed", "expired", "cancelled", "failed")
_CLOCKS_S = 3600  # the provider's clocks for files and for batches differ by less

log = logging.getLogger("alpaca_ray")
T = TypeVar("T")
Sleep = Callable[[float], Awaitable[None]]


class BatchApi:
    """Each method raises UserError where the provider refuses, and after `max_wait_s` of failures."""

    def __init__(self, client: AsyncOpenAI, max_wait_s: float, sleep: Sleep = asyncio.sleep) -> None:
        self.api_key = client.api_key
        self._client, self._max_wait_s, self._sleep = client, max_wait_s, sleep

    async def upload(self, name: str, content: bytes) -> FileObject:
        """A new input file. One that nobody uses costs nothing."""

        async def upload() -> FileObject:
            file = await self._client.files.create(file=(f"{name}.jsonl", content), purpose="batch")
            return _with_id(file)

        return await self._call(upload)

    async def find_or_create(self, input_file_id: str, uploaded_at: int, endpoint: str, digest: str) -> str:
        """The id of the one batch over an input file.

        The list is asked before each attempt: a creation may have come to pass though nobody has heard of it.
        """

        async def find_or_create() -> str:
            async for batch in self._client.batches.list(limit=100):  # the newest first
                if batch.created_at < uploaded_at - _CLOCKS_S:
                    break
                if batch.input_file_id == input_file_id:
                    return batch.id
            batch = await self._client.batches.create(
                input_file_id=input_file_id,
                endpoint=cast(Literal["/v1/completions"], endpoint),
                completion_window="24h",
                metadata={METADATA: digest},
            )
            return _with_id(batch).id

        return await self._call(find_or_create)

    async def ended(self, batch_id: str) -> Batch:
        """Wait until it has ended, in whatever way, with a line in the log at each change."""

        async def retrieve() -> Batch:
            batch = _with_id(await self._client.batches.retrieve(batch_id))
            if not isinstance(batch.status, str):
                raise ValueError(f"the answer is no batch: {str(batch)[:200]}")
            return batch

        delay_s, shown = POLL_S, ""
        while True:
            batch = await self._call(retrieve)
            line = _progress(batch)
            if line != shown:
                log.info("%s", line)
            if batch.status in _ENDED:
                return batch
            await self._sleep(delay_s)
            delay_s, shown = min(POLL_GROWTH * delay_s, MAX_POLL_S), line

    async def content(self, file_id: str) -> bytes:
        """The whole of an output or error file."""

        async def content() -> bytes:
            lines = (await self._client.files.content(file_id)).content
            if not lines.startswith(b"{"):  # a login page, say: taken for the file, all its answers were lost
                raise ValueError(f"file {file_id} is no JSONL: {lines[:200]!r}")
            return lines

        return await self._call(content)

    async def _call(self, call: Callable[[], Awaitable[T]]) -> T:
        waited_s, delay_s = 0.0, POLL_S
        while True:
            try:
                return await call()
            # The SDK hands on what is no JSON as a text, which has none of the attributes that are read.
            except (*FAILURES, AttributeError, TypeError) as error:
                name, detail = error_name(error), str(error).replace(self.api_key, "(key)")[:500]
            if name in FATAL_ERRORS or waited_s >= self._max_wait_s:
                raise UserError(
                    f"the teacher's Batch API fails ({name}): {detail}. What was begun is written down, and the same "
                    "command goes on with it; a provider without this API takes generate.mode=online"
                )
            log.info("the teacher's Batch API fails (%s), trying again in %.0f s: %s", name, delay_s, detail)
            await self._sleep(delay_s)
            waited_s, delay_s = waited_s + delay_s, min(POLL_GROWTH * delay_s, MAX_POLL_S)


Named = TypeVar("Named", Batch, FileObject)


def _with_id(answer: Named) -> Named:
    """The SDK checks no types."""
    if not isinstance(answer.id, str):
        raise ValueError(f"the answer has no id: {str(answer)[:200]}")
    return answer


def _progress(batch: Batch) -> str:
    counts = batch.request_counts
    told = f": {counts.completed} completed, {counts.failed} failed of {counts.total}" if counts else ""
    return f"batch {batch.id} is {batch.status.replace('_', ' ')}{told}"
