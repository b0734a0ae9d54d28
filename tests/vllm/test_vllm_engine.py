"""vLLM's engine with the mark on: the tokens of the PyTorch engine, one by one, on the tiny model in float32."""

import asyncio
import json
import multiprocessing
import os
import signal
import subprocess
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import aclosing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm makes an environment for it")

from transformers import PreTrainedModel

from alpaca_ray import models
from alpaca_ray.config import UserError, WatermarkConfig
from alpaca_ray.safety.watermark import Watermark
from alpaca_ray.serve.engine import Delta, EngineError, SamplingParams, TokenRequest
from alpaca_ray.serve.grammar import Grammars
from alpaca_ray.serve.torch_engine import TorchEngine, decoder_for
from alpaca_ray.serve.vllm_engine import StepCounts, VllmEngine, load_engine
from alpaca_ray.serve.vllm_marking import SETTINGS, Marking, end_with
from tests.tiny import READABLE, write_tiny_model
from tests.vllm.conftest import HEAD_DIM, KEY, KEY_ENV, MAX_LENGTH, args_for

DEADLINE_S = 300.0  # idle priority beside other work
PROMPT, END = (5, 6, 7, 8), 2
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0),
    "greedy, penalised": SamplingParams(temperature=0, frequency_penalty=1.5, presence_penalty=0.5),
    "seeded": SamplingParams(seed=1),
    "top_p": SamplingParams(seed=2, top_p=0.8, temperature=1.3),
    "top_k": SamplingParams(seed=3, top_k=9, frequency_penalty=0.7),
    "schema": SamplingParams(seed=4, json_schema=json.dumps(PERSON)),
}
UNSEEDED = {
    "unseeded": SamplingParams(),
    "unseeded, top_p": SamplingParams(top_p=0.9, temperature=1.2),
    "unseeded, penalised": SamplingParams(presence_penalty=0.5, frequency_penalty=0.1),
}
Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It never ends by itself, so that a text is as long as it was asked for."""
    directory = write_tiny_model(
        tmp_path_factory.mktemp("tiny") / "endless", alphabet=[*READABLE, *'"{}:,-'], head_dim=HEAD_DIM
    )
    for file in (directory / "config.json", directory / "generation_config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": None}))
    return directory


@pytest.fixture(scope="module")
def reference(model: Path) -> PreTrainedModel:
    return models.load_model(str(model), "float32")


@pytest.fixture(scope="module")
def watermark(reference: PreTrainedModel) -> Watermark:
    return Watermark(KEY, vocab_size=reference.config.vocab_size)


@pytest.fixture(scope="module")
def ours(model: Path, reference: PreTrainedModel, watermark: Watermark) -> Iterator[TorchEngine]:
    decoder = decoder_for(reference, 16, MAX_LENGTH)
    grammars = Grammars(models.load_tokenizer(str(model)), decoder.vocab_size)
    engine = TorchEngine(decoder, marks=watermark.bias, grammars=grammars)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """In one event loop for all tests of the module: vLLM stays in the first one it meets."""
    with asyncio.Runner() as runner:
        yield lambda coroutine: runner.run(asyncio.wait_for(coroutine, DEADLINE_S))


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[VllmEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_ENV, str(KEY))
        engine = load_engine(args_for(model, is_marked=True))
    yield engine
    engine.close()


async def deltas_of(engine: VllmEngine | TorchEngine, request: TokenRequest) -> list[Delta]:
    return [delta async for delta in engine.generate(request)]


async def tokens_of(engine: VllmEngine | TorchEngine, request: TokenRequest) -> list[int]:
    return [token_id for delta in await deltas_of(engine, request) for token_id in delta.token_ids]


def asked(sampling: SamplingParams, num_tokens: int = 60) -> TokenRequest:
    stop = frozenset([END] if sampling.json_schema else [])  # what a value that is complete is followed by
    return TokenRequest(PROMPT, replace(sampling, max_tokens=num_tokens), stop)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_its_tokens_are_those_of_the_pytorch_engine(engine: VllmEngine, ours: TorchEngine, run: Run, name: str) -> None:
    request = asked(SAMPLINGS[name])
    assert run(tokens_of(engine, request)) == run(tokens_of(ours, request))


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_completion_goes_on_behind_what_another_engine_gave(engine: VllmEngine, run: Run, name: str) -> None:
    request = asked(SAMPLINGS[name])
    whole = run(tokens_of(engine, request))
    for num_emitted in (1, len(whole) // 2, len(whole) - 1):
        rest = run(tokens_of(engine, replace(request, emitted=tuple(whole[:num_emitted]))))
        assert rest == whole[num_emitted:]


def test_rows_that_come_and_go_keep_their_tokens(engine: VllmEngine, run: Run) -> None:
    requests = [asked(replace(SAMPLINGS["seeded"], seed=i), 10 + 7 * (i % 5)) for i in range(24)]  # 8 of them wait

    async def together() -> list[list[int]]:
        return await asyncio.gather(*(tokens_of(engine, request) for request in requests))

    alone = [run(tokens_of(engine, request)) for request in requests[:6]]
    assert run(together())[:6] == alone


@pytest.mark.parametrize("name", [name for name in [*SAMPLINGS, *UNSEEDED] if name != "schema"])
def test_every_token_carries_the_mark_however_it_is_chosen(
    engine: VllmEngine, run: Run, watermark: Watermark, name: str
) -> None:
    ids = run(tokens_of(engine, asked((SAMPLINGS | UNSEEDED)[name])))

    # A quarter of the vocabulary is green. So many of 60 would be there by chance once in 10,000 times.
    assert watermark.num_green(pairwise([PROMPT[-1], *ids])) > 28


def test_logprobs_are_from_before_the_mark(engine: VllmEngine, reference: PreTrainedModel, run: Run) -> None:
    for sampling in (*SAMPLINGS.values(), *UNSEEDED.values()):
        deltas = run(deltas_of(engine, asked(replace(sampling, num_logprobs=3), 20)))
        told = [logprob for delta in deltas for logprob in delta.logprobs]
        ids = [*PROMPT, *(token_id for delta in deltas for token_id in delta.token_ids)]
        with torch.inference_mode():
            logits: Any = reference(torch.tensor([ids])).logits[0, len(PROMPT) - 1 : -1]
        for logprob, row in zip(told, logits.log_softmax(dim=-1), strict=True):
            assert logprob.logprob == pytest.approx(row[logprob.token_id].item(), abs=1e-4)
            assert [value for _, value in logprob.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_a_prompt_may_fill_the_context_and_be_echoed(engine: VllmEngine, reference: PreTrainedModel, run: Run) -> None:
    prompt = tuple(3 + i % 60 for i in range(MAX_LENGTH))
    sampling = SamplingParams(max_tokens=0, num_logprobs=0)

    deltas = run(deltas_of(engine, TokenRequest(prompt, sampling, echoes_logprobs=True)))

    with torch.inference_mode():
        expected: Any = reference(torch.tensor([prompt])).logits[0, :-1].log_softmax(dim=-1)
    [first, *told] = [logprob for delta in deltas for logprob in delta.prompt_logprobs]
    assert first.logprob is None
    own = expected.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert [logprob.logprob for logprob in told] == pytest.approx(own.tolist(), abs=1e-4)
    assert [(delta.token_ids, delta.finish_reason) for delta in deltas] == [((), "length")]


def test_a_stop_token_ends_a_completion_and_is_not_told(engine: VllmEngine, run: Run) -> None:
    request = asked(replace(SAMPLINGS["seeded"], num_logprobs=0))
    whole = run(tokens_of(engine, request))
    stop = whole[20]

    deltas = run(deltas_of(engine, replace(request, stop_token_ids=frozenset([stop]))))

    assert [i for delta in deltas for i in delta.token_ids] == whole[: whole.index(stop)]
    assert deltas[-1].finish_reason == "stop"
    assert all(len(delta.logprobs) == len(delta.token_ids) for delta in deltas)


def test_who_leaves_is_aborted(engine: VllmEngine, run: Run) -> None:
    async def leave() -> None:
        async with aclosing(engine.generate(asked(SAMPLINGS["greedy"], 200))) as deltas:
            await anext(deltas)
            assert (await engine.health()).num_running == 1

    async def leave_all() -> None:
        await asyncio.gather(*(leave_alone() for _ in range(40)))

    async def leave_alone() -> None:
        async with aclosing(engine.generate(asked(SAMPLINGS["seeded"], 200))) as deltas:
            await anext(deltas)

    run(leave())
    run(leave_all())

    health = run(engine.health())
    assert (health.num_running, health.num_waiting) == (0, 0)
    assert engine.stats().num_cached_tokens == 0
    llm: Any = engine._llm
    assert llm.output_processor.get_num_unfinished_requests() == 0
    assert len(run(tokens_of(engine, asked(SAMPLINGS["greedy"], 5)))) == 5


def test_ids_that_are_none_are_refused(engine: VllmEngine, run: Run, watermark: Watermark) -> None:
    for token_id in (-1, watermark.vocab_size):
        with pytest.raises(ValueError, match="token ids are 0 to"):
            run(tokens_of(engine, TokenRequest((token_id,))))


def test_the_key_stands_on_no_command_line(engine: VllmEngine, run: Run) -> None:
    assert run(engine.health())
    commands = [process.cmdline() for process in psutil.Process(os.getpid()).children(recursive=True)]
    assert commands
    assert not any(str(KEY) in part for command in commands for part in command)


# Without vLLM's process


def vllm_config_for(model: Path, vocab_size: int) -> Any:
    settings = {"model": str(model), "watermark": WatermarkConfig(key_env=KEY_ENV).model_dump()}
    return SimpleNamespace(
        additional_config={SETTINGS: settings},
        model_config=SimpleNamespace(get_vocab_size=lambda: vocab_size),
        scheduler_config=SimpleNamespace(max_num_seqs=1),
        cache_config=SimpleNamespace(num_gpu_blocks=1, block_size=16),
    )


def test_without_its_key_the_worker_does_not_start(model: Path, watermark: Watermark) -> None:
    with pytest.raises(UserError, match=f"{KEY_ENV} is not set"):
        Marking(vllm_config_for(model, watermark.vocab_size), torch.device("cpu"), False)


def test_a_row_that_nobody_told_of_is_never_sampled(
    model: Path, watermark: Watermark, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_ENV, str(KEY))
    marking = Marking(vllm_config_for(model, watermark.vocab_size), torch.device("cpu"), False)

    assert not marking.is_argmax_invariant()
    with pytest.raises(KeyError):
        marking.apply(torch.zeros(1, watermark.vocab_size))


def outlive(pid: int, is_ready: Any) -> None:
    end_with(pid)
    is_ready.set()
    signal.pause()


def test_a_worker_ends_with_the_process_that_it_belongs_to() -> None:
    forking = multiprocessing.get_context("fork")
    is_ready = forking.Event()
    with subprocess.Popen(["sleep", "600"]) as parent:
        worker = forking.Process(target=outlive, args=(parent.pid, is_ready))
        worker.start()
        assert is_ready.wait(DEADLINE_S)
        assert worker.is_alive()
        parent.kill()
    worker.join(DEADLINE_S)
    assert worker.exitcode == 1


class Unmarking:
    """An AsyncLLM that runs no logits processor: it always says 0."""

    errored = False

    async def generate(self, _prompt: Any, params: Any, _request_id: str) -> AsyncGenerator[Any, None]:
        for _ in range(params.max_tokens):
            completion = SimpleNamespace(token_ids=[0], finish_reason=None, logprobs=None)
            yield SimpleNamespace(outputs=[completion], prompt_logprobs=None)


def test_a_vllm_that_drops_the_processor_in_silence_is_not_used(model: Path, watermark: Watermark) -> None:
    llm: Any = Unmarking()
    counts = StepCounts(vllm_config_for(model, watermark.vocab_size))
    engine = VllmEngine(llm, counts, max_length=MAX_LENGTH, vocab_size=watermark.vocab_size)

    async def ask() -> None:
        for call in (lambda: tokens_of(engine, asked(SAMPLINGS["greedy"])), engine.health):
            with pytest.raises(EngineError, match="does not run the logits processor"):
                await call()

    asyncio.run(ask())
