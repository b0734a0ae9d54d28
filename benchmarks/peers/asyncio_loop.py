"""What a careful engineer writes in an afternoon: one process, N workers, a token bucket for each limit.

python benchmarks/peers/asyncio_loop.py BODIES OUT --concurrency 64 [--requests-per-minute R] [--tokens-per-minute T]

BODIES: a JSON object a line, bodies of the completions API. OPENAI_BASE_URL and OPENAI_API_KEY say where to. A bucket
holds one second's worth or one request. Tokens are taken as prompt + max_tokens: the real number is not known before.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from openai import APIStatusError, AsyncOpenAI, RateLimitError

MAX_ATTEMPTS = 8


class Bucket:
    """First come, first served. None: no limit."""

    def __init__(self, per_minute: int | None) -> None:
        self._per_s = None if per_minute is None else per_minute / 60
        self._level, self._filled_s = 0.0, time.monotonic()
        self._turn = asyncio.Lock()

    async def take(self, amount: float) -> None:
        if self._per_s is None:
            return
        async with self._turn:
            while self._fill(self._per_s, amount) < amount:
                await asyncio.sleep((amount - self._level) / self._per_s)
            self._level -= amount

    def _fill(self, per_s: float, amount: float) -> float:
        now_s = time.monotonic()
        self._level = min(self._level + (now_s - self._filled_s) * per_s, max(per_s, amount))
        self._filled_s = now_s
        return self._level


async def answer(client: AsyncOpenAI, body: dict[str, Any], requests: Bucket, tokens: Bucket) -> Any:
    """The completion, after as many attempts as it takes."""
    for attempt in range(MAX_ATTEMPTS):
        await requests.take(1)
        await tokens.take(len(body["prompt"]) / 4 + body["max_tokens"])
        try:
            return await client.completions.create(**body)
        except APIStatusError as error:
            if attempt == MAX_ATTEMPTS - 1 or (error.status_code < 500 and not isinstance(error, RateLimitError)):
                raise
            await asyncio.sleep(float(error.response.headers.get("retry-after", 2**attempt)))
    raise AssertionError


async def work(
    client: AsyncOpenAI, bodies: Iterator[dict[str, Any]], requests: Bucket, tokens: Bucket, out: TextIO
) -> None:
    for body in bodies:
        completion = await answer(client, body, requests, tokens)
        out.write(json.dumps({"seed": body["seed"], "text": completion.choices[0].text}) + "\n")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bodies", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--requests-per-minute", type=int)
    parser.add_argument("--tokens-per-minute", type=int)
    options = parser.parse_args()
    bodies = map(json.loads, options.bodies.read_text().splitlines())
    requests, tokens = Bucket(options.requests_per_minute), Bucket(options.tokens_per_minute)
    with options.out.open("w") as out:
        async with AsyncOpenAI(max_retries=0) as client:
            await asyncio.gather(*(work(client, bodies, requests, tokens, out) for _ in range(options.concurrency)))


if __name__ == "__main__":
    asyncio.run(main())
