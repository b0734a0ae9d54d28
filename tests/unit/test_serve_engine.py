"""The PyTorch engine on the tiny model in float32."""

import asyncio
import pickle
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from alpaca_ray.config import Placement
from alpaca_ray.models import load_model
from alpaca_ray.serve.engine import ContextLengthError, EngineError, SamplingParams, TokenRequest
from alpaca_ray.serve.torch_engine import TorchEngine, num_threads, sample

PROMPTS = [tuple(range(3, 3 + length)) for length in (1, 7, 20, 4, 12)]
GREEDY = SamplingParams(max_tokens=24, temperature=0)
DEADLINE_S = 20.0


@pytest.fixture
def model(tiny_model: Path) -> PreTrainedModel:
    return load_model(str(tiny_model), "float32")


@pytest.fixture
def engine(model: PreTrainedModel) -> Iterator[TorchEngine]:
    engine = TorchEngine(model, max_length=1024, batch_wait_s=0.1)
    yield engine
    engine.close()


async def collect(engine: TorchEngine, request: TokenRequest) -> tuple[list[int], str | None]:
    token_ids: list[int] = []
    reason = None
    async for delta in engine.generate(request):
        assert reason is None, "the finish reason stands in the last delta"
        token_ids += delta.token_ids
        reason = delta.finish_reason
    return token_ids, reason


def together(engine: TorchEngine, *requests: TokenRequest) -> list[tuple[list[int], str | None]]:
    async def run() -> list[tuple[list[int], str | None]]:
        return await asyncio.gather(*(collect(engine, request) for request in requests))

    return asyncio.run(run())


def by_transformers(model: PreTrainedModel, prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    generate: Any = model.generate
    output = generate(torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False)
    ids: list[int] = output[0, len(prompt) :].tolist()
    return ids[: ids.index(2)] if 2 in ids else ids  # </s>


@asynccontextmanager
async def until_idle(engine: TorchEngine) -> AsyncIterator[None]:
    yield
    async with asyncio.timeout(DEADLINE_S):
        while (state := await engine.health()).num_running or state.num_waiting:
            await asyncio.sleep(0.005)


def test_a_ragged_greedy_batch_equals_transformers_one_by_one(engine: TorchEngine, model: PreTrainedModel) -> None:
    answers = together(engine, *(TokenRequest(prompt, GREEDY) for prompt in PROMPTS))

    assert [ids for ids, _ in answers] == [by_transformers(model, prompt, 24) for prompt in PROMPTS]


def test_requests_share_a_batch_and_finished_rows_leave_it(engine: TorchEngine, model: PreTrainedModel) -> None:
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)

    together(engine, *(TokenRequest((5, 6), SamplingParams(max_tokens=n, seed=n)) for n in (1, 3, 6)))

    assert sizes[0] == 3
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) <= 6
    assert sizes[-1] == 1


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(engine: TorchEngine) -> None:
    seeded = TokenRequest(PROMPTS[1], SamplingParams(max_tokens=24, temperature=1.3, top_p=0.9, seed=11))
    others = [TokenRequest(prompt, SamplingParams(max_tokens=9, seed=i)) for i, prompt in enumerate(PROMPTS)]

    alone = together(engine, seeded)[0]
    crowded = together(engine, *others[:2], seeded, *others[2:])[2]
    other_seed = together(engine, TokenRequest(PROMPTS[1], SamplingParams(24, 1.3, 0.9, seed=12)))[0]

    assert alone == crowded
    assert alone != other_seed


def test_without_a_seed_two_answers_differ(engine: TorchEngine) -> None:
    request = TokenRequest(PROMPTS[1], SamplingParams(max_tokens=24, temperature=1.5))
    first, second = together(engine, request, request)
    assert first != second


def test_sampling_follows_the_distribution_within_the_nucleus() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    generator = torch.Generator().manual_seed(0)

    drawn = torch.tensor([sample(logits, 1.0, 0.6, generator) for _ in range(2000)])

    shares = torch.bincount(drawn, minlength=4) / 2000
    # 0.5 alone does not reach 0.6, so the second token belongs to the nucleus, the third does not
    assert torch.allclose(shares, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.04)
    assert {sample(logits, 1.0, 1e-6, generator) for _ in range(20)} == {0}
    assert {sample(logits, 0.01, 1.0, generator) for _ in range(20)} == {0}


def test_a_stop_token_ends_the_answer_and_is_not_in_it(engine: TorchEngine) -> None:
    full, reason = together(engine, TokenRequest(PROMPTS[2], GREEDY))[0]
    assert (len(full), reason) == (24, "length")
    stop = full[5]

    cut, reason = together(engine, TokenRequest(PROMPTS[2], GREEDY, frozenset([stop])))[0]

    assert (cut, reason) == (full[: full.index(stop)], "stop")


def test_the_context_is_the_limit_and_the_default_fills_it(engine: TorchEngine) -> None:
    prompt = (9,) * 1020

    filled, reason = together(engine, TokenRequest(prompt, SamplingParams(temperature=0)))[0]
    with pytest.raises(ContextLengthError, match="1024 tokens, but the prompt has 1020 and 5"):
        together(engine, TokenRequest(prompt, SamplingParams(max_tokens=5)))
    with pytest.raises(ContextLengthError):
        together(engine, TokenRequest((9,) * 1024))

    assert (len(filled), reason) == (4, "length")


def test_its_errors_pickle() -> None:
    error = pickle.loads(pickle.dumps(ContextLengthError(10, None, 8)))
    assert (error.num_prompt_tokens, error.max_tokens, error.max_length) == (10, None, 8)
    assert "at least 1" in str(error)


def test_a_cancelled_request_leaves_the_batch_and_the_others_stay_right(
    engine: TorchEngine, model: PreTrainedModel
) -> None:
    steps: list[int] = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: steps.append(len(kwargs["input_ids"])), with_kwargs=True)

    async def leave_early() -> None:
        async with aclosing(engine.generate(TokenRequest((5,), SamplingParams(1000, seed=1)))) as deltas:
            await anext(deltas)

    async def run() -> list[int]:
        async with until_idle(engine):
            stayed, _ = await asyncio.gather(collect(engine, TokenRequest(PROMPTS[1], GREEDY)), leave_early())
        return stayed[0]

    assert asyncio.run(run()) == by_transformers(model, PROMPTS[1], 24)
    assert len(steps) < 1000


def test_a_task_that_is_cancelled_frees_the_engine(engine: TorchEngine, model: PreTrainedModel) -> None:
    steps: list[int] = []
    model.register_forward_pre_hook(lambda *_: steps.append(1))

    async def run() -> None:
        async with until_idle(engine):
            task = asyncio.create_task(collect(engine, TokenRequest((5,), SamplingParams(1000, seed=1))))
            while not (await engine.health()).num_running:
                await asyncio.sleep(0)
            task.cancel()

    asyncio.run(run())
    assert len(steps) < 1000


def test_a_failing_step_reaches_every_consumer_and_the_engine_goes_on(
    engine: TorchEngine, model: PreTrainedModel
) -> None:
    calls: list[int] = []

    def fail_at_third(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")

    model.register_forward_pre_hook(fail_at_third)

    async def run() -> list[Any]:
        requests = [TokenRequest(prompt, GREEDY) for prompt in PROMPTS]
        return await asyncio.gather(*(collect(engine, request) for request in requests), return_exceptions=True)

    failures = asyncio.run(run())

    assert all(isinstance(failure, EngineError) and "out of memory" in str(failure) for failure in failures)
    assert together(engine, TokenRequest(PROMPTS[0], GREEDY))[0][0] == by_transformers(model, PROMPTS[0], 24)


def test_a_closed_engine_refuses_and_says_that_it_is_unhealthy(model: PreTrainedModel) -> None:
    engine = TorchEngine(model, max_length=64)
    engine.close()

    with pytest.raises(EngineError, match="closed"):
        together(engine, TokenRequest((5,), GREEDY))
    with pytest.raises(EngineError, match="closed"):
        asyncio.run(engine.health())


def test_threads_follow_the_cpus_that_were_asked_for() -> None:
    assert num_threads(Placement(num_cpus=3.5)) == 3
    assert num_threads(Placement(num_cpus=0.25)) == 1
    assert num_threads(Placement(num_cpus=0)) >= 1
