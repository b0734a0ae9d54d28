"""The PyTorch engine: on the tiny model in float32, and on a decoder that counts for what its schedule does."""

import asyncio
import pickle
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from alpaca_ray.config import Placement
from alpaca_ray.models import load_model
from alpaca_ray.serve.decoder import Chunk, ModuleDecoder
from alpaca_ray.serve.engine import ContextLengthError, Delta, EngineError, SamplingParams, TokenRequest
from alpaca_ray.serve.torch_engine import TorchEngine, decoder_for, end_token_ids, num_threads
from tests.waiting import wait

PROMPTS = [tuple(range(3, 3 + length)) for length in (1, 7, 20, 4, 12)]
GREEDY = SamplingParams(max_tokens=24, temperature=0)
SEEDED = SamplingParams(max_tokens=24, temperature=1.3, top_p=0.9, seed=11, presence_penalty=0.5, frequency_penalty=0.2)
DEADLINE_S = 60.0
VOCAB = 50


class Counter:
    """A Decoder whose next token is the last one plus one. `on_call` sees the chunks first, and may raise."""

    vocab_size, device = VOCAB, torch.device("cpu")

    def __init__(self, num_slots: int = 4, max_length: int = 64) -> None:
        self.num_slots, self.max_length = num_slots, max_length
        self.calls: list[list[Chunk]] = []
        self.released: list[int] = []
        self.on_call: Callable[[Sequence[Chunk]], None] = lambda _chunks: None

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        self.on_call(chunks)
        self.calls.append(list(chunks))
        wanted = [token for chunk in chunks for token in list(chunk.token_ids)[::-1][: chunk.num_logits][::-1]]
        return 5 * torch.nn.functional.one_hot((torch.tensor(wanted, dtype=torch.long) + 1) % VOCAB, VOCAB).float()

    def release(self, slot: int) -> None:
        self.released.append(slot)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> PreTrainedModel:
    return load_model(str(tiny_model), "float32")


@pytest.fixture
def engine(model: PreTrainedModel) -> Iterator[TorchEngine]:
    engine = TorchEngine(decoder_for(model, 16, 256), end_token_ids(model), prefill_chunk=16)
    yield engine
    engine.close()


@pytest.fixture
def counter() -> Counter:
    return Counter()


@pytest.fixture
def counting(counter: Counter) -> Iterator[TorchEngine]:
    engine = TorchEngine(counter, prefill_chunk=8)
    yield engine
    engine.close()


async def collect(engine: TorchEngine, request: TokenRequest) -> tuple[list[int], str | None]:
    deltas = await all_deltas(engine, request)
    assert all(delta.finish_reason is None for delta in deltas[:-1]), "the finish reason stands in the last delta"
    return [token_id for delta in deltas for token_id in delta.token_ids], deltas[-1].finish_reason


async def all_deltas(engine: TorchEngine, request: TokenRequest) -> list[Delta]:
    return [delta async for delta in engine.generate(request)]


def together(engine: TorchEngine, *requests: TokenRequest) -> list[tuple[list[int], str | None]]:
    async def run() -> list[tuple[list[int], str | None]]:
        async with asyncio.timeout(DEADLINE_S):
            return await asyncio.gather(*(collect(engine, request) for request in requests))

    return asyncio.run(run())


def await_all(engine: TorchEngine, number: int, free_steps: int = 0) -> Callable[[Sequence[Chunk]], None]:
    """For `on_call`: behind the free steps none goes on before so many requests have been in hand at once, in whatever
    order threads come to run."""
    free, is_complete = iter(range(free_steps)), False

    def hold(_chunks: Sequence[Chunk]) -> None:
        nonlocal is_complete
        if next(free, None) is None and not is_complete:
            wait(lambda: (now := engine.stats()).num_running + now.num_waiting == number, "all requests", DEADLINE_S)
            is_complete = True

    return hold


def deltas_of(engine: TorchEngine, request: TokenRequest) -> list[Delta]:
    return asyncio.run(all_deltas(engine, request))


def by_transformers(model: PreTrainedModel, prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    generate: Any = model.generate
    output = generate(torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False)
    ids: list[int] = output[0, len(prompt) :].tolist()
    return ids[: ids.index(2)] if 2 in ids else ids  # </s>


@torch.inference_mode()
def log_probabilities(model: Any, ids: Sequence[int]) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0]
    return logits.log_softmax(dim=-1)


@asynccontextmanager
async def until_idle(engine: TorchEngine) -> AsyncIterator[None]:
    yield
    async with asyncio.timeout(DEADLINE_S):
        while (state := await engine.health()).num_running or state.num_waiting:
            await asyncio.sleep(0.005)


def greedy(max_tokens: int, *prompt: int) -> TokenRequest:
    return TokenRequest(prompt, SamplingParams(max_tokens=max_tokens, temperature=0))


# What the tokens are


def test_a_ragged_greedy_batch_equals_transformers_one_by_one(engine: TorchEngine, model: PreTrainedModel) -> None:
    answers = together(engine, *(TokenRequest(prompt, GREEDY) for prompt in PROMPTS))
    assert [ids for ids, _ in answers] == [by_transformers(model, prompt, 24) for prompt in PROMPTS]


def test_an_engine_over_transformers_own_code_gives_the_same(model: PreTrainedModel) -> None:
    engine = TorchEngine(ModuleDecoder(model, 3, 256), end_token_ids(model), prefill_chunk=5)

    answers = together(engine, *(TokenRequest(prompt, GREEDY) for prompt in PROMPTS))
    engine.close()

    assert [ids for ids, _ in answers] == [by_transformers(model, prompt, 24) for prompt in PROMPTS]


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, replace(SEEDED, top_p=1.0), replace(SEEDED, top_k=9)])
def test_a_request_gives_the_same_tokens_alone_and_in_a_batch(engine: TorchEngine, sampling: SamplingParams) -> None:
    request = TokenRequest(PROMPTS[1], sampling)
    others = [TokenRequest(prompt, SamplingParams(max_tokens=9, seed=i)) for i, prompt in enumerate(PROMPTS)]

    alone = together(engine, request)[0]
    crowded = together(engine, *others[:2], request, *others[2:])[2]

    assert alone == crowded


def test_another_seed_gives_another_answer_and_none_a_new_one(engine: TorchEngine) -> None:
    requests = [TokenRequest(PROMPTS[1], replace(SEEDED, seed=seed)) for seed in (11, 12, None, None)]
    answers = together(engine, *requests)
    assert len({tuple(ids) for ids, _ in answers}) == 4


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED])
def test_a_completion_goes_on_where_another_engine_stopped(engine: TorchEngine, sampling: SamplingParams) -> None:
    whole, reason = together(engine, TokenRequest(PROMPTS[2], sampling))[0]
    assert len(whole) > 10

    cuts = [0, 1, 7, len(whole) - 1]
    requests = [TokenRequest(PROMPTS[2], sampling, emitted=tuple(whole[:cut])) for cut in cuts]
    rests = together(engine, *requests)

    assert rests == [(whole[cut:], reason) for cut in cuts]
    done = TokenRequest(PROMPTS[2], replace(sampling, max_tokens=3), emitted=tuple(whole[:3]))
    assert together(engine, done) == [([], "length")]


def test_a_stop_token_ends_the_answer_and_is_not_in_it(engine: TorchEngine) -> None:
    full, reason = together(engine, TokenRequest(PROMPTS[2], GREEDY))[0]
    assert (len(full), reason) == (24, "length")
    stop = full[5]

    cut, reason = together(engine, TokenRequest(PROMPTS[2], GREEDY, frozenset([stop])))[0]

    assert (cut, reason) == (full[: full.index(stop)], "stop")


def test_the_context_is_the_limit_and_the_default_fills_it(engine: TorchEngine) -> None:
    prompt = (9,) * 252

    filled, reason = together(engine, TokenRequest(prompt, SamplingParams(temperature=0)))[0]
    with pytest.raises(ContextLengthError, match="256 tokens, but the prompt has 252 and 5"):
        together(engine, TokenRequest(prompt, SamplingParams(max_tokens=5)))
    with pytest.raises(ContextLengthError):
        together(engine, TokenRequest((9,) * 256))

    assert (len(filled), reason) == (4, "length")


@pytest.mark.parametrize("bad", [-1, VOCAB])
def test_ids_that_the_model_does_not_have_are_refused(counting: TorchEngine, bad: int) -> None:
    with pytest.raises(ValueError, match="token ids are 0 to 49"):
        together(counting, greedy(3, 1, bad))
    with pytest.raises(ValueError, match="token ids are 0 to 49"):
        together(counting, replace(greedy(3, 1), emitted=(bad,)))


def test_its_errors_pickle() -> None:
    error = pickle.loads(pickle.dumps(ContextLengthError(10, None, 8)))
    assert (error.num_prompt_tokens, error.max_tokens, error.max_length) == (10, None, 8)
    assert "at least 1" in str(error)


# Log-probabilities


def test_logprobs_are_the_models_own_whatever_the_sampling(engine: TorchEngine, model: PreTrainedModel) -> None:
    request = TokenRequest(PROMPTS[2], replace(SEEDED, num_logprobs=3))

    told = [logprob for delta in deltas_of(engine, request) for logprob in delta.logprobs]

    ids = [*PROMPTS[2], *(logprob.token_id for logprob in told)]
    expected = log_probabilities(model, ids)[len(PROMPTS[2]) - 1 :]
    for logprob, row in zip(told, expected, strict=False):
        assert logprob.logprob == pytest.approx(row[logprob.token_id].item(), abs=1e-5)
        values, likeliest = row.topk(3)
        assert [token_id for token_id, _ in logprob.top] == likeliest.tolist()
        assert [value for _, value in logprob.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_logprobs_go_to_those_who_asked(engine: TorchEngine) -> None:
    async def run() -> list[list[Delta]]:
        asked = [None, 0, 2]
        requests = [TokenRequest(PROMPTS[1], replace(GREEDY, max_tokens=2, num_logprobs=n)) for n in asked]
        return await asyncio.gather(*(all_deltas(engine, request) for request in requests))

    tops = [[[len(lp.top) for lp in delta.logprobs] for delta in deltas] for deltas in asyncio.run(run())]

    assert tops == [[[], []], [[0], [0]], [[2], [2]]]


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_a_prompt_is_echoed_with_its_logprobs(engine: TorchEngine, model: PreTrainedModel, max_tokens: int) -> None:
    prompt = tuple(5 + (7 * i) % 200 for i in range(40))  # longer than a chunk
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0, num_logprobs=1)
    deltas = deltas_of(engine, TokenRequest(prompt, sampling, echoes_logprobs=True))

    told = deltas[0].prompt_logprobs
    expected = log_probabilities(model, prompt)
    assert [logprob.token_id for logprob in told] == list(prompt)
    assert told[0].logprob is None
    assert [lp.logprob for lp in told[1:]] == pytest.approx(
        [expected[i, token_id].item() for i, token_id in enumerate(prompt[1:])], abs=1e-5
    )
    assert [lp.top[0][0] for lp in told[1:]] == expected.argmax(dim=-1)[:-1].tolist()
    assert not any(delta.prompt_logprobs for delta in deltas[1:])
    assert (sum(len(delta.token_ids) for delta in deltas), deltas[-1].finish_reason) == (max_tokens, "length")


# Marks


def only_even(previous: Sequence[int]) -> Tensor:
    marks = torch.zeros(len(previous), VOCAB)
    marks[:, 1::2] = -100
    return marks


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"seed": 1}, {"seed": 2, "top_p": 0.5}, {"top_k": 3}])
def test_marks_reach_every_token_however_it_is_chosen(counter: Counter, sampling: dict[str, Any]) -> None:
    engine = TorchEngine(counter, marks=only_even)
    params = SamplingParams(max_tokens=20, num_logprobs=1, **sampling)

    deltas = deltas_of(engine, TokenRequest((1,), params))
    resumed = deltas_of(engine, TokenRequest((1,), params, emitted=(2, 4)))
    engine.close()

    assert all(token_id % 2 == 0 for delta in deltas + resumed for token_id in delta.token_ids)
    # The logprobs are from before: there the likeliest follows the token before it, odd after even.
    assert all(delta.logprobs[0].top[0][0] % 2 for delta in deltas[1:])


def test_marks_are_asked_by_the_token_before(counter: Counter) -> None:
    asked: list[int] = []

    def record(previous: Sequence[int]) -> Tensor:
        asked.extend(previous)
        return torch.zeros(len(previous), VOCAB)

    engine = TorchEngine(counter, marks=record, prefill_chunk=2)
    together(engine, greedy(3, 7, 8, 9, 10, 11))
    engine.close()

    assert asked == [11, 12, 13]


def test_what_cannot_be_marked_is_not_emitted(counter: Counter) -> None:
    def break_after_nine(previous: Sequence[int]) -> Tensor:
        if 9 in previous:
            raise RuntimeError("no mask")
        return torch.zeros(len(previous), VOCAB)

    engine = TorchEngine(counter, marks=break_after_nine)
    got: list[int] = []

    async def gather_until_it_fails() -> None:
        async for delta in engine.generate(greedy(8, 7)):
            got.extend(delta.token_ids)

    async def run() -> list[Any]:
        both: list[Any] = [collect(engine, greedy(8, 20)), gather_until_it_fails()]
        return await asyncio.gather(*both, return_exceptions=True)

    fine, broken = asyncio.run(run())
    engine.close()

    assert fine == (list(range(21, 29)), "length")
    assert isinstance(broken, EngineError)
    assert "no mask" in str(broken)
    assert got == [8, 9]


# The schedule


def test_requests_join_and_leave_between_steps(counting: TorchEngine, counter: Counter) -> None:
    counter.on_call = await_all(counting, 2, free_steps=1)

    async def run() -> None:
        async with aclosing(counting.generate(greedy(40, 1))) as first:
            await anext(first)
            assert await collect(counting, greedy(2, 30)) == ([31, 32], "length")
            assert not [delta async for delta in first if len(delta.token_ids) != 1]

    asyncio.run(run())

    slots = [[chunk.slot for chunk in call] for call in counter.calls]
    assert slots.count([0, 1]) == 2
    assert slots[0] == slots[-1] == [0]


def test_prompts_come_in_chunks_and_streams_keep_their_pace(counting: TorchEngine, counter: Counter) -> None:
    counter.on_call = await_all(counting, 3, free_steps=1)

    async def run() -> None:
        async with aclosing(counting.generate(greedy(60, 1))) as stream:
            await anext(stream)
            long = [collect(counting, greedy(2, *range(start, start + 20))) for start in (5, 6)]
            assert await asyncio.gather(*long) == [([25, 26], "length"), ([26, 27], "length")]

    asyncio.run(run())

    joined = [call for call in counter.calls if len(call) > 1]
    assert all(call[0].slot == 0 and len(call[0].token_ids) == 1 for call in joined)
    prefill = [sum(len(c.token_ids) for c in call[1:] if c.start < 20) for call in joined]
    assert max(prefill) <= 8 + 1  # 1: a row that decodes in slot 1 or 2
    assert sum(len(c.token_ids) for call in joined for c in call if c.slot and c.start < 20) == 40


def test_only_last_tokens_have_logits_unless_the_prompt_is_echoed(counting: TorchEngine, counter: Counter) -> None:
    together(counting, greedy(2, *range(20)))
    assert [[(len(c.token_ids), c.num_logits) for c in call] for call in counter.calls] == [
        [(8, 0)], [(8, 0)], [(4, 1)], [(1, 1)],
    ]  # fmt: skip

    counter.calls.clear()
    together(counting, replace(greedy(2, *range(20)), echoes_logprobs=True))
    assert [c.num_logits for call in counter.calls for c in call] == [8, 8, 4, 1]


def test_more_requests_than_slots_wait_their_turn(counting: TorchEngine, counter: Counter) -> None:
    counter.on_call = await_all(counting, 11)

    answers = together(counting, *(greedy(5, i) for i in range(11)))

    assert answers == [(list(range(i + 1, i + 6)), "length") for i in range(11)]
    assert max(len(call) for call in counter.calls) == counter.num_slots
    assert len(counter.released) == 11


def test_its_numbers_say_what_it_holds(counting: TorchEngine, counter: Counter) -> None:
    held, go = threading.Event(), threading.Event()

    def hold(_chunks: Sequence[Chunk]) -> None:
        held.set()
        assert go.wait(DEADLINE_S)

    async def run() -> None:
        await collect(counting, greedy(3, 1, 2))
        counter.on_call = hold
        async with until_idle(counting):
            tasks = [asyncio.create_task(collect(counting, greedy(2, 1, 2, 3))) for _ in range(6)]
            await asyncio.to_thread(held.wait, DEADLINE_S)
            stats = counting.stats()
            assert stats.num_running + stats.num_waiting <= 6
            assert (stats.num_generated_tokens, stats.num_steps, stats.num_cache_tokens) == (3, 3, 4 * 64)
            go.set()
            await asyncio.gather(*tasks)

    asyncio.run(run())
    stats = counting.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_cached_tokens) == (0, 0, 0)
    assert stats.num_generated_tokens == 3 + 12


# Leaving, failing, closing


def test_five_hundred_clients_that_leave_leave_nothing_behind(counting: TorchEngine, counter: Counter) -> None:
    async def leave(i: int) -> None:
        async with aclosing(counting.generate(greedy(60, i % VOCAB))) as deltas:
            if i % 3:  # the others leave while they wait
                await anext(deltas)

    async def leave_by_cancellation(i: int) -> None:
        task = asyncio.create_task(collect(counting, greedy(60, i % VOCAB)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def run() -> None:
        async with until_idle(counting), asyncio.timeout(DEADLINE_S):
            stayed, *_ = await asyncio.gather(
                collect(counting, greedy(60, 3)),
                *(leave(i) if i % 2 else leave_by_cancellation(i) for i in range(500)),
            )
            assert stayed == ([(4 + i) % VOCAB for i in range(60)], "length")
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
    assert counting.stats().num_cached_tokens == 0
    counter.on_call = await_all(counting, 4)
    answers = together(counting, *(greedy(3, i) for i in range(4)))
    assert answers == [([i + 1, i + 2, i + 3], "length") for i in range(4)]
    assert max(len(call) for call in counter.calls[-3:]) == 4, "all slots are free again"


def test_a_row_that_was_left_is_not_in_the_step_after_next(counting: TorchEngine, counter: Counter) -> None:
    seen: list[int] = []

    async def run() -> None:
        async with until_idle(counting):
            async with aclosing(counting.generate(greedy(60, 1))) as deltas:
                await anext(deltas)
            seen.append(len(counter.calls))

    asyncio.run(run())
    assert len(counter.calls) <= seen[0] + 1  # the one that had begun


def test_only_the_row_that_breaks_a_step_fails(counting: TorchEngine, counter: Counter) -> None:
    def break_on_nine(chunks: Sequence[Chunk]) -> None:
        if any(9 in chunk.token_ids for chunk in chunks):
            raise RuntimeError("out of memory")

    counter.on_call = break_on_nine

    async def run() -> list[Any]:
        requests = [greedy(6, first) for first in (20, 7, 30)]
        return await asyncio.gather(*(collect(counting, request) for request in requests), return_exceptions=True)

    first, broken, last = asyncio.run(run())

    assert (first[0], last[0]) == (list(range(21, 27)), list(range(31, 37)))
    assert isinstance(broken, EngineError)
    assert "out of memory" in str(broken)
    counter.on_call = lambda _chunks: None
    assert together(counting, greedy(3, 7)) == [([8, 9, 10], "length")]


def test_logits_that_are_not_finite_fail_their_row_alone(model: PreTrainedModel) -> None:
    class Broken(Counter):
        def forward(self, chunks: Sequence[Chunk]) -> Tensor:
            logits = super().forward(chunks)
            logits[logits.argmax(dim=-1) == 10] = float("nan")
            return logits

    engine = TorchEngine(Broken())

    async def run() -> list[Any]:
        both = [collect(engine, greedy(6, first)) for first in (7, 20)]
        return await asyncio.gather(*both, return_exceptions=True)

    broken, fine = asyncio.run(run())
    engine.close()

    assert isinstance(broken, EngineError)
    assert "not finite" in str(broken)
    assert fine == (list(range(21, 27)), "length")


def test_a_thread_that_dies_leaves_nobody_waiting(counter: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(_slot: int) -> None:
        raise SystemError("the bug")

    monkeypatch.setattr(counter, "release", die)
    engine = TorchEngine(counter)

    async def run() -> list[Any]:
        async with asyncio.timeout(DEADLINE_S):
            ends = (2, *[40] * 9)
            return await asyncio.gather(*(collect(engine, greedy(n, 1)) for n in ends), return_exceptions=True)

    first, *others = asyncio.run(run())

    assert first == ([2, 3], "length")
    assert all(isinstance(other, EngineError) for other in others)
    with pytest.raises(EngineError, match="died"):
        together(engine, greedy(2, 1))
    with pytest.raises(EngineError, match="died"):
        asyncio.run(engine.health())


def test_draining_finishes_what_is_in_hand_and_refuses_the_rest(counter: Counter) -> None:
    engine = TorchEngine(counter)

    async def run() -> list[tuple[list[int], str | None]]:
        started = [asyncio.create_task(collect(engine, greedy(30, i))) for i in range(6)]  # two of them wait
        while engine.stats().num_generated_tokens == 0:
            await asyncio.sleep(0)
        drained = asyncio.create_task(engine.drain())
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match="draining"):
            await collect(engine, greedy(2, 1))
        await drained
        return await asyncio.gather(*started)

    assert asyncio.run(run()) == [(list(range(i + 1, i + 31)), "length") for i in range(6)]
    with pytest.raises(EngineError, match="draining"):
        asyncio.run(engine.health())


def test_closing_fails_what_is_in_hand(counter: Counter) -> None:
    steps, refused = iter(range(2)), threading.Event()

    def hold(_chunks: Sequence[Chunk]) -> None:
        if next(steps, None) is None:
            assert refused.wait(DEADLINE_S)

    counter.on_call = hold
    engine = TorchEngine(counter)

    async def run() -> list[Any]:
        async with asyncio.timeout(DEADLINE_S), aclosing(engine.generate(greedy(60, 1))) as deltas:
            await anext(deltas)
            closed = asyncio.create_task(asyncio.to_thread(engine.close))
            later = [asyncio.create_task(collect(engine, greedy(2, 1)))]
            while not later[-1].done():  # until one is refused, which the engine does before it fails those in hand
                later.append(asyncio.create_task(collect(engine, greedy(2, 1))))
                await asyncio.sleep(0.005)
            refused.set()
            await closed
            with pytest.raises(EngineError, match="closed"):
                assert not [delta async for delta in deltas if len(delta.token_ids) != 1]
            return await asyncio.gather(*later, return_exceptions=True)

    assert all(isinstance(end, EngineError) for end in asyncio.run(run()))
    with pytest.raises(EngineError, match="closed"):
        together(engine, greedy(2, 1))
    with pytest.raises(EngineError, match="closed"):
        asyncio.run(engine.health())


def test_threads_follow_the_cpus_that_were_asked_for() -> None:
    assert num_threads(Placement(num_cpus=3.5)) == 3
    assert num_threads(Placement(num_cpus=0.25)) == 1
    assert num_threads(Placement(num_cpus=0)) >= 1
