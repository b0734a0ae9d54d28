"""The vLLM engine: its scheduler, cache and kernels. The mark is in its worker: vllm_marking.py.

Nothing of vLLM's that could go round a processor is ever asked for (allowed ids, minimum lengths, its structured
outputs), or else it is off: speculative decoding, asynchronous scheduling, and Model Runner V2, which has processors of
another kind.
"""

import asyncio
import os
import secrets
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import Any

from vllm import SamplingParams as VllmSamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs.engine import tokens_input
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.executor.abstract import Executor
from vllm.v1.metrics.loggers import StatLoggerBase

from alpaca_ray import models
from alpaca_ray.config import ServeArgs
from alpaca_ray.serve.engine import (
    Delta,
    EngineError,
    FinishReason,
    Health,
    SamplingParams,
    SchemaError,
    TokenLogprob,
    TokenRequest,
    room_for_completion,
)
from alpaca_ray.serve.grammar import Grammar, Grammars
from alpaca_ray.serve.sampling import exponentials
from alpaca_ray.serve.torch_engine import EngineStats, num_threads
from alpaca_ray.serve.vllm_marking import PARENT_ENV, SETTINGS, Marking

NUM_PROOF_TOKENS, PROOF_TEMPERATURE, PROOF_SEED = 4, 1e30, 0


def load_engine(args: ServeArgs) -> "VllmEngine":
    """The engine that the application's args ask for. The key is read again in vLLM's worker, from where args say.

    Raises UserError if the model cannot be loaded, RuntimeError if vLLM does not start.
    """
    resolved, config = models.resolve(args.model), models.load_config(args.model).get_text_config()
    max_length = min(args.max_length, getattr(config, "max_position_embeddings", args.max_length))
    os.environ.update(environment(args))
    vllm_config = AsyncEngineArgs(
        model=resolved,
        dtype=args.dtype,
        max_model_len=max_length + 1,  # vLLM takes no prompt without room for a token behind it, an echo neither
        max_num_seqs=args.max_batch_size,
        tensor_parallel_size=max(1, int(args.placement.num_gpus)),
        distributed_executor_backend="mp" if args.placement.num_gpus > 1 else None,  # never Ray's: we are an actor
        enforce_eager=current_platform.is_cpu(),  # compiling takes 2 minutes there
        skip_tokenizer_init=True,
        async_scheduling=False,  # the mark needs the token before, in the worker, at once
        logprobs_mode="raw_logprobs",
        max_logprobs=-1,  # the API has limits of its own
        logits_processors=[f"{Marking.__module__}:{Marking.__name__}"],
        additional_config={SETTINGS: {"model": resolved, "watermark": args.watermark.model_dump()}},
        enable_log_requests=False,
        disable_log_stats=True,
    ).create_engine_config()
    if vllm_config.use_v2_model_runner or vllm_config.speculative_config is not None:
        raise RuntimeError("vLLM would not run our logits processor with these settings")
    if current_platform.is_cpu():
        vllm_config.cache_config.kv_cache_memory_bytes = cache_bytes(vllm_config)
    counts = StepCounts(vllm_config)
    llm = AsyncLLM(vllm_config, Executor.get_class(vllm_config), log_stats=False, log_requests=False,
                   stat_loggers=[lambda *_: counts])  # fmt: skip
    return VllmEngine(
        llm,
        counts,
        end_token_ids(vllm_config.model_config.try_get_generation_config()),
        max_length=max_length,
        vocab_size=int(config.vocab_size),
        grammars=Grammars(models.load_tokenizer(args.model), int(config.vocab_size)),
    )


def environment(args: ServeArgs) -> dict[str, str]:
    """What vLLM reads from the environment, in its worker too."""
    return {
        PARENT_ENV: str(os.getpid()),
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # by the one token that max_model_len has room for and nobody gets
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would take the threads' locks along
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        # Without it vLLM keeps a core of each CPU to itself, and cores that were not asked for.
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        "OMP_NUM_THREADS": str(num_threads(args.placement)),
    }


def cache_bytes(vllm_config: Any) -> int:
    """Room for max_model_len tokens of each row; vLLM's default is nearly all memory of the machine."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    block_size = vllm_config.cache_config.block_size or 128
    num_blocks = vllm_config.scheduler_config.max_num_seqs * -(-model.max_model_len // block_size) + 1
    per_token = 2 * model.get_num_layers(parallel) * model.get_num_kv_heads(parallel) * model.get_head_size()
    return int(num_blocks * block_size * per_token * model.dtype.itemsize)


def end_token_ids(generation_config: dict[str, Any]) -> frozenset[int]:
    """The model's end-of-sequence tokens: none, one or several."""
    ids = generation_config.get("eos_token_id")
    return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])


class StepCounts(StatLoggerBase):  # type: ignore[misc]  # as above
    """What vLLM tells of each step."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.num_steps, self.cache_usage = 0, 0.0  # a share of num_cache_tokens
        self.max_running, self._cache = vllm_config.scheduler_config.max_num_seqs, vllm_config.cache_config

    @property
    def num_cache_tokens(self) -> int:
        """That there is room for; known once the worker has started."""
        return int((self._cache.num_gpu_blocks or 0) * self._cache.block_size)

    def record(self, scheduler_stats: Any, *_args: Any, **_kwargs: Any) -> None:
        """Of a step."""
        if scheduler_stats is not None:
            self.num_steps, self.cache_usage = self.num_steps + 1, scheduler_stats.kv_cache_usage

    def log_engine_initialized(self) -> None:
        """Nothing to tell."""


class VllmEngine:
    """An Engine over vLLM's, which is in a process of its own.

    `drain` lets what is in hand end, `close` does not; either ends that process.
    """

    def __init__(  # noqa: PLR0913 - each is a seam or a setting
        self,
        llm: AsyncLLM,
        counts: StepCounts,
        end_token_ids: frozenset[int] = frozenset(),
        *,
        max_length: int,
        vocab_size: int,
        grammars: Grammars | None = None,
        new_seed: Callable[[], int] = lambda: secrets.randbits(63),
    ) -> None:
        self._llm, self._counts, self._end_token_ids = llm, counts, end_token_ids
        self._max_length, self._vocab_size, self._grammars, self._new_seed = max_length, vocab_size, grammars, new_seed
        self._refusal: str | None = None
        self._proof: asyncio.Task[None] | None = None
        self._num_in_hand = self._num_generated_tokens = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    async def generate(self, request: TokenRequest) -> AsyncGenerator[Delta, None]:
        """See `Engine`. Raises ValueError for ids that the model does not have."""
        num_left = room_for_completion(request, self._max_length) - len(request.emitted)
        self._check_ids(request)
        schema = request.sampling.json_schema
        grammar = None if schema is None else await asyncio.to_thread(self._grammar, schema)
        if num_left <= 0 and not request.echoes_logprobs:
            yield Delta((), "length")
            return
        self._raise_refusal()
        self._num_in_hand += 1
        self._is_idle.clear()
        try:
            await self._proved()
            reader = Reader(request, num_left, grammar)
            async with aclosing(self._outputs(request, self._params(request, num_left))) as outputs:
                async for output in outputs:
                    delta = reader.read(output)
                    self._num_generated_tokens += len(delta.token_ids)
                    yield delta
        finally:
            self._num_in_hand -= 1
            if self._num_in_hand == 0:
                self._is_idle.set()

    async def health(self) -> Health:
        """See `Engine`. An engine that drains is healthy: what is in hand still succeeds."""
        if self._llm.errored or (self._refusal is not None and self._num_in_hand == 0):
            raise EngineError(self._refusal or "vLLM's process has died")
        await self._proved()
        stats = self.stats()
        return Health(stats.num_running, stats.num_waiting)

    def stats(self) -> EngineStats:
        """Counts as of this moment; those of the cache as of the last step."""
        num_running, num_cache_tokens = min(self._num_in_hand, self._counts.max_running), self._counts.num_cache_tokens
        return EngineStats(
            num_running=num_running,
            num_waiting=self._num_in_hand - num_running,
            num_cached_tokens=round(self._counts.cache_usage * num_cache_tokens) if self._num_in_hand else 0,
            num_cache_tokens=num_cache_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_steps=self._counts.num_steps,
        )

    async def drain(self) -> None:
        """Refuse what comes, finish what is in hand, end vLLM's process."""
        self._refusal = self._refusal or "the engine is draining"
        await self._is_idle.wait()
        await asyncio.to_thread(self._llm.shutdown)

    def close(self) -> None:
        """Refuse what comes, fail what is in hand, end vLLM's process. From the event loop, or when that is over."""
        self._refusal = "the engine is closed"
        self._llm.output_processor.propagate_error(EngineDeadError())
        self._llm.shutdown()

    def _check_ids(self, request: TokenRequest) -> None:
        ids = [*request.prompt_token_ids, *request.emitted]
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            raise ValueError(f"token ids are 0 to {self._vocab_size - 1}, not {min(ids)} or {max(ids)}")

    def _grammar(self, json_schema: str) -> Grammar:
        if self._grammars is None:
            raise SchemaError("this engine has no tokenizer to spell JSON with")
        return self._grammars.start(json_schema)

    def _raise_refusal(self) -> None:
        if self._refusal is not None:
            raise EngineError(self._refusal)

    async def _outputs(self, request: TokenRequest, params: Any) -> AsyncGenerator[Any, None]:
        """vLLM's outputs. Leaving early aborts the request there."""
        prompt = tokens_input([*request.prompt_token_ids, *request.emitted])
        try:
            async with aclosing(self._llm.generate(prompt, params, uuid.uuid4().hex)) as outputs:
                async for output in outputs:
                    yield output
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineError(self._refusal or f"vLLM failed: {error or type(error).__name__}") from error

    def _params(self, request: TokenRequest, num_left: int) -> Any:
        """The request in vLLM's words. Where `Marking` chooses, vLLM is left with one token and takes the likeliest."""
        params, extra_args = request.sampling, None
        penalised = params.presence_penalty != 0 or params.frequency_penalty != 0
        # vLLM would take `emitted` for a part of the prompt, which no penalty counts.
        if (
            params.json_schema
            or (params.seed is not None and params.temperature > 0)
            or (request.emitted and penalised)
        ):
            seed = self._new_seed() if params.seed is None else params.seed
            extra_args = {SETTINGS: asdict(replace(params, seed=seed)) | {"emitted": list(request.emitted)}}
            params = SamplingParams(temperature=0, num_logprobs=params.num_logprobs)
        return VllmSamplingParams(
            max_tokens=max(1, num_left),  # an echo alone: vLLM gives a token all the same
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            stop_token_ids=sorted(request.stop_token_ids | self._end_token_ids),
            ignore_eos=True,  # its end-of-sequence tokens are among ours
            detokenize=False,
            logprobs=params.num_logprobs,
            prompt_logprobs=(params.num_logprobs or 0) if request.echoes_logprobs else None,
            output_kind=RequestOutputKind.DELTA,
            extra_args=extra_args,
        )

    async def _proved(self) -> None:
        """Raises EngineError unless `Marking` is known to be at work."""
        if self._proof is None:
            self._proof = asyncio.create_task(self._prove())
        await asyncio.shield(self._proof)

    async def _prove(self) -> None:
        """Some platforms of vLLM drop logits processors in silence, so here is a draw that vLLM would never make: at
        such a temperature all tokens are alike, and the seed alone decides."""
        sampling = SamplingParams(NUM_PROOF_TOKENS, PROOF_TEMPERATURE, seed=PROOF_SEED)
        request = TokenRequest((0,), sampling)
        token_ids: list[int] = []
        async for output in self._outputs(request, self._params(request, NUM_PROOF_TOKENS)):
            token_ids += output.outputs[0].token_ids
        draws = (exponentials(PROOF_SEED, i, self._vocab_size) for i in range(len(token_ids)))
        if not token_ids or token_ids != [int((1 / draw).argmax()) for draw in draws]:
            self._refusal = "vLLM does not run the logits processor that marks its tokens"
            raise EngineError(self._refusal)


class Reader:
    """vLLM's outputs of one request to deltas. `grammar` follows what vLLM's worker should have kept to."""

    def __init__(self, request: TokenRequest, num_left: int, grammar: Grammar | None) -> None:
        self._request, self._num_left, self._grammar = request, num_left, grammar
        for token_id in request.emitted if grammar is not None else ():
            self._follow(token_id)

    def read(self, output: Any) -> Delta:
        """Raises EngineError where the completion is against its schema."""
        [completion] = output.outputs
        token_ids, reason = tuple(completion.token_ids), completion.finish_reason
        if reason not in (None, "stop", "length"):
            raise EngineError(f"vLLM ended the completion with {reason!r}")
        if self._num_left <= 0:
            return Delta((), "length", (), self._prompt_logprobs(output.prompt_logprobs))
        for token_id in token_ids if self._grammar is not None else ():
            self._follow(token_id)
        if reason == "stop":
            token_ids = token_ids[:-1]
        finish_reason: FinishReason | None = reason
        wanted = self._request.sampling.num_logprobs
        told = () if wanted is None else zip(token_ids, completion.logprobs or (), strict=False)
        logprobs = tuple(logprob_of(token_id, entries, wanted or 0) for token_id, entries in told)
        return Delta(token_ids, finish_reason, logprobs, self._prompt_logprobs(output.prompt_logprobs))

    def _follow(self, token_id: int) -> None:
        assert self._grammar is not None
        try:
            if not self._grammar.allowed()[token_id]:
                raise EngineError("vLLM left the schema")
        except SchemaError as error:
            raise EngineError(f"the schema cannot be followed: {error}") from error
        self._grammar.append(token_id)

    def _prompt_logprobs(self, entries: Sequence[Any] | None) -> tuple[TokenLogprob, ...]:
        if not self._request.echoes_logprobs or not entries:
            return ()
        prompt, num_top = self._request.prompt_token_ids, self._request.sampling.num_logprobs or 0
        return tuple(logprob_of(token_id, told, num_top) for token_id, told in zip(prompt, entries, strict=False))


def logprob_of(token_id: int, entries: dict[int, Any] | None, num_top: int) -> TokenLogprob:
    """From vLLM's table of the likeliest tokens and this one; None for the prompt's first."""
    if entries is None:
        return TokenLogprob(token_id, None)
    likeliest = sorted(((other, entry.logprob) for other, entry in entries.items()), key=lambda one: -one[1])
    return TokenLogprob(token_id, entries[token_id].logprob, tuple(likeliest[:num_top]))
