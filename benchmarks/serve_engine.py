"""The engine by itself, for benchmarks/serve.py: reads a Work a line, writes when each token of each stream came.

python -m benchmarks.serve_engine MODEL [--watermark]
"""

import asyncio
import json
import os
import sys
import threading
import time
from typing import Any

from alpaca_ray.config import ServeArgs
from alpaca_ray.safety.watermark import Watermark, vocab_size
from alpaca_ray.serve.engine import Engine, SamplingParams, TokenRequest
from alpaca_ray.serve.torch_engine import load_engine
from benchmarks.serve_sides import ENGINE_ARGS, WATERMARK_KEY


async def stream(engine: Engine, ids: list[int], sampling: SamplingParams, started_s: float) -> list[float]:
    """When each of its tokens came."""
    times_s: list[float] = []
    async for delta in engine.generate(TokenRequest(tuple(ids), sampling)):
        times_s += [time.perf_counter() - started_s] * len(delta.token_ids)
    return times_s


async def answer(engine: Engine, work: dict[str, Any]) -> list[list[float]]:
    """The times of all streams."""
    started_s = time.perf_counter()
    given = {"max_tokens": work["num_tokens"], "temperature": work["temperature"], "top_p": work["top_p"]}
    params = [SamplingParams(**given, seed=seed) for seed in range(len(work["prompt_ids"]))]
    asked = [stream(engine, ids, p, started_s) for ids, p in zip(work["prompt_ids"], params, strict=True)]
    return await asyncio.gather(*asked)


def main(model: str, is_marked: bool) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries write where they like; the pipe is for answers alone
    watermark = Watermark(WATERMARK_KEY, vocab_size=vocab_size(model))
    if is_marked:  # as the application does: a thread that ends gives its OpenMP threads back
        warming = threading.Thread(target=watermark.warm)
        warming.start()
        warming.join()
    engine = load_engine(ServeArgs(model=model, **ENGINE_ARGS), watermark.bias if is_marked else None)
    for line in sys.stdin:
        print(json.dumps({"times_s": asyncio.run(answer(engine, json.loads(line)))}), file=answers, flush=True)
    engine.close()


if __name__ == "__main__":
    main(sys.argv[1], "--watermark" in sys.argv[2:])
