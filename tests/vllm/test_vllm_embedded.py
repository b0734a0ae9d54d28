"""The embedded model on vLLM's engine: what it says carries the mark, and an engine that drains ends what it began."""

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm makes an environment for it")

from alpaca_ray import models
from alpaca_ray.safety.watermark import Watermark, vocab_size
from alpaca_ray.serve.engine import EngineError, SamplingParams, TokenRequest
from alpaca_ray.serve.vllm_engine import VllmEngine, load_engine
from tests.vllm.conftest import KEY, KEY_ENV, args_for

DEADLINE_S = 600.0
NUM_TOKENS = 150
SAMPLINGS = [SamplingParams(NUM_TOKENS, t, seed=seed) for t, seed in ((0.0, None), (1.0, None), (1.0, 7), (0.7, 8))]


@pytest.fixture(scope="module")
def embedded() -> str:
    """Its directory, in the user's cache: it is made before a test has a cache of its own."""
    return models.resolve(models.EMBEDDED)


async def tokens_of(engine: VllmEngine, request: TokenRequest) -> list[int]:
    return [token_id async for delta in engine.generate(request) for token_id in delta.token_ids]


async def said_while_draining(engine: VllmEngine, requests: list[TokenRequest]) -> list[list[int]]:
    async with asyncio.timeout(DEADLINE_S):
        begun = [asyncio.create_task(tokens_of(engine, request)) for request in requests]
        while not engine.stats().num_generated_tokens:
            await asyncio.sleep(0)
        draining = asyncio.create_task(engine.drain())
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match="draining"):
            await tokens_of(engine, requests[0])
        said = await asyncio.gather(*begun)
        await draining
        with pytest.raises(EngineError, match="draining"):
            await engine.health()
        return said


def test_what_it_says_is_marked_to_the_end(embedded: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(str(KEY))
    args = args_for(embedded, is_marked=True)
    watermark = args.watermark.model_copy(update={"key_file": str(tmp_path / "key")})
    monkeypatch.delenv(KEY_ENV, raising=False)
    tokenizer = models.load_tokenizer(embedded)
    prompt = tuple(tokenizer("Write a story about a lighthouse keeper who finds a map.\n\n")["input_ids"])
    engine = load_engine(args.model_copy(update={"watermark": watermark}))

    said = asyncio.run(said_while_draining(engine, [TokenRequest(prompt, sampling) for sampling in SAMPLINGS]))

    detector = Watermark(KEY, vocab_size=vocab_size(embedded))
    found = [detector.detect([prompt[-1], *ids], prompt_len=1) for ids in said]
    assert max(detection.num_scored for detection in found) > 100
    # A text may end early, and then it has less to judge.
    assert all(detection.z_score > 4 for detection in found if detection.num_scored > 60), found
