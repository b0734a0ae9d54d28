"""The PyTorch engine: one thread decodes all requests together; they join and leave between steps."""

import asyncio
import logging
import os
import queue
import secrets
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from alpaca_ray import models
from alpaca_ray.config import Placement, Quantization, ServeArgs, UserError
from alpaca_ray.serve.decoder import Decoder, ModuleDecoder
from alpaca_ray.serve.engine import Delta, EngineError, Health, SchemaError, TokenRequest, room_for_completion
from alpaca_ray.serve.grammar import Grammar, Grammars
from alpaca_ray.serve.linear import has_bfloat16, has_quantization
from alpaca_ray.serve.llama import LlamaDecoder, supports
from alpaca_ray.serve.sampling import RowSampling
from alpaca_ray.serve.schedule import Row, Schedule, Turn
from alpaca_ray.serve.step import Choice, Marks, Outcome, run_and_sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Tokens of prompts in a step. On a CPU a step of 16 rows takes 2 to 3 times as long with 64 more, and the arithmetic is
# as fast as it gets; where it computes in bfloat16, 128 take as long as 64 in float32, and prompts 0.8 of the time that
# they take by 64. A GPU has room for more beside its rows.
PREFILL_CHUNK = {"cpu": 64, "cpu_bfloat16": 128, "cuda": 1024}


def load_engine(args: ServeArgs, marks: Marks | None = None) -> "TorchEngine":
    """The engine that the application's args ask for. Raises UserError if the model cannot be loaded."""
    # A thread that ends gives its OpenMP threads back. Kept, they and the engine's are more than there are cores, and
    # then libgomp has none of them wait awake between two products: 35 ms for a step of one row become 62.
    with ThreadPoolExecutor(1) as thread:
        decoder, end_ids = thread.submit(_load, args).result()
    is_fast = args.dtype == "bfloat16" and decoder.device.type == "cpu" and has_bfloat16()
    return TorchEngine(
        decoder,
        end_ids,
        marks=marks,
        grammars=Grammars(models.load_tokenizer(args.model), decoder.vocab_size),
        prefill_chunk=PREFILL_CHUNK["cpu_bfloat16" if is_fast else decoder.device.type],
        num_threads=num_threads(args.placement),
    )


def _load(args: ServeArgs) -> tuple[Decoder, frozenset[int]]:
    device = "cuda" if args.placement.num_gpus > 0 else "cpu"
    if args.dtype == "bfloat16" and device == "cpu" and not has_bfloat16():
        logger.warning(
            "this CPU has no bfloat16 instructions, which makes prompts and batches 6 to 9 times slower than float32: "
            "set dtype: float32 in the application's args"
        )
    model: Any = models.load_model(args.model, args.dtype)
    if args.quantization and not has_quantization():
        raise UserError(f"quantization: {args.quantization} needs a torch with FBGEMM: leave it out")
    return decoder_for(model.to(device), args.max_batch_size, args.max_length, args.quantization), end_token_ids(model)


def decoder_for(
    model: "PreTrainedModel", num_slots: int, max_length: int, quantization: Quantization | None = None
) -> Decoder:
    """Our own forward pass where it knows the architecture, transformers' where not.

    Raises UserError where `quantization` is asked of the latter.
    """
    max_length = min(max_length, getattr(model.config, "max_position_embeddings", max_length))
    if not supports(model):
        if quantization:
            raise UserError(
                f"quantization: {quantization} is for Llama models, not {type(model).__name__}: leave it out"
            )
        logger.warning("%s is decoded row by row, with transformers' own code", type(model).__name__)
        return ModuleDecoder(model, num_slots, max_length)
    decoder = LlamaDecoder(model, num_slots, max_length, quantization)
    logger.info("the cache of %d rows of %d tokens is %.1f GB", num_slots, max_length, decoder.cache_bytes / 1e9)
    return decoder


def num_threads(placement: Placement) -> int:
    """The whole CPUs that were asked for, at least 1; all cores where none was asked for."""
    return int(max(1, placement.num_cpus)) if placement.num_cpus > 0 else (os.cpu_count() or 1)


def end_token_ids(model: "PreTrainedModel") -> frozenset[int]:
    """The model's end-of-sequence tokens: none, one or several, as its generation config says."""
    ids: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])


@dataclass(frozen=True)
class EngineStats:
    """What the engine holds now, and what it has done since it began."""

    num_running: int
    num_waiting: int
    num_cached_tokens: int
    num_cache_tokens: int  # that there is room for
    num_generated_tokens: int
    num_steps: int


class TorchEngine:
    """An Engine over a Decoder. `marks` go on every row's logits at every step, before anything else is done to them.

    `drain` lets what is in hand end, `close` does not; either ends the thread.
    """

    def __init__(  # noqa: PLR0913 - each is a seam or a setting
        self,
        decoder: Decoder,
        end_token_ids: frozenset[int] = frozenset(),
        *,
        marks: Marks | None = None,
        grammars: Grammars | None = None,  # without them no request may ask for a JSON schema
        prefill_chunk: int = PREFILL_CHUNK["cpu"],
        num_threads: int = 1,
        new_seed: Callable[[], int] = lambda: secrets.randbits(63),
    ) -> None:
        self._decoder, self._end_token_ids = decoder, end_token_ids
        self._marks, self._grammars = marks, grammars
        self._num_threads, self._new_seed = num_threads, new_seed
        self._schedule = Schedule(decoder.num_slots, prefill_chunk)
        self._arrived: queue.SimpleQueue[Row | None] = queue.SimpleQueue()  # None: no more will come
        self._ending = self._closing = self._over = False
        self._num_steps = self._num_generated_tokens = 0
        self._lock = threading.Lock()
        self._refusal: str | None = None  # under the lock: nothing enters behind the None
        self._thread = threading.Thread(target=self._run, name="torch-engine", daemon=True)
        self._thread.start()

    async def generate(self, request: TokenRequest) -> AsyncGenerator[Delta, None]:
        """See `Engine`. Raises ValueError for ids that the model does not have."""
        schema = request.sampling.json_schema
        row = self._row(request, None if schema is None else await asyncio.to_thread(self._grammar, schema))
        if row.num_left <= 0 and not request.echoes_logprobs:
            yield Delta((), "length")
            return
        with self._lock:
            if self._refusal is not None:
                raise EngineError(self._refusal)
            self._arrived.put(row)
        try:
            async for delta in row.deltas():
                yield delta
        finally:
            row.cancelled = True

    async def health(self) -> Health:
        """See `Engine`. An engine that drains is healthy: what is in hand still succeeds."""
        if self._over:
            raise EngineError(self._refusal)
        stats = self.stats()
        return Health(stats.num_running, stats.num_waiting)

    def stats(self) -> EngineStats:
        """Counts as of this moment, from any thread."""
        running = list(self._schedule.running)
        return EngineStats(
            num_running=len(running),
            num_waiting=len(self._schedule.waiting) + self._arrived.qsize(),
            num_cached_tokens=sum(row.num_cached for row in running),
            num_cache_tokens=self._decoder.num_slots * self._decoder.max_length,
            num_generated_tokens=self._num_generated_tokens,
            num_steps=self._num_steps,
        )

    async def drain(self) -> None:
        """Refuse what comes, finish what is in hand, end the thread."""
        self._refuse("the engine is draining")
        await asyncio.to_thread(self._thread.join)

    def close(self) -> None:
        """Refuse what comes, fail what is in hand, end the thread after its step."""
        self._closing = True
        self._refuse("the engine is closed")
        self._thread.join()

    def _refuse(self, reason: str) -> None:
        with self._lock:
            self._refusal = reason
            self._arrived.put(None)

    def _grammar(self, json_schema: str) -> Grammar:
        if self._grammars is None:
            raise SchemaError("this engine has no tokenizer to spell JSON with")
        return self._grammars.start(json_schema)

    def _row(self, request: TokenRequest, grammar: Grammar | None) -> Row:
        decoder, params = self._decoder, request.sampling
        num_left = room_for_completion(request, decoder.max_length) - len(request.emitted)
        ids = [*request.prompt_token_ids, *request.emitted]
        if min(ids) < 0 or max(ids) >= decoder.vocab_size:
            # On a GPU such an id would end the process.
            raise ValueError(f"token ids are 0 to {decoder.vocab_size - 1}, not {min(ids)} or {max(ids)}")
        seed = self._new_seed() if params.seed is None else params.seed
        sampling = RowSampling.start(params, seed, request.emitted, decoder.vocab_size, decoder.device, grammar)
        return Row(request, sampling, num_left, request.stop_token_ids | self._end_token_ids)

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        try:
            with torch.inference_mode():
                while self._take_in():
                    self._step()
        except Exception:
            logger.exception("the engine's thread died")
        finally:  # however the thread ends, nobody is left waiting
            with self._lock:
                self._refusal, self._over = self._refusal or "the engine's thread has died", True
                self._arrived.put(None)
            error = EngineError(self._refusal)
            in_hand = [*self._schedule.running, *self._schedule.waiting, *iter(self._arrived.get, None)]
            _send([(row, error) for row in in_hand])

    def _take_in(self) -> bool:
        """Drop who has left, admit who has come, and wait for somebody if nobody is there. False: end."""
        schedule = self._schedule
        for row in schedule.drop_cancelled():
            self._decoder.release(row.slot)
        while not (self._ending and self._arrived.empty()):
            try:
                row_or_end = self._arrived.get(block=not (schedule.running or schedule.waiting or self._ending))
            except queue.Empty:
                break
            if row_or_end is None:
                self._ending = True
            else:
                schedule.waiting.append(row_or_end)
        schedule.admit()
        return not self._closing and (not self._ending or bool(schedule.running))

    def _step(self) -> None:
        """Schedule, run, sample, emit."""
        turns = self._schedule.turns()
        self._emit(self._run_and_sample(turns))
        self._num_steps += 1

    def _run_and_sample(self, turns: list[Turn]) -> list[Outcome]:
        """What the step found; where it fails, each row is tried by itself, so that only those fail that must."""
        try:
            return run_and_sample(self._decoder, self._marks, turns)
        except Exception as error:  # the boundary of a step
            logger.exception("a step with %d rows failed", len(turns))
            if len(turns) > 1:
                return [outcome for turn in turns for outcome in self._run_and_sample([turn])]
            return [Outcome(turn, Choice(error=f"{type(error).__name__}: {error}")) for turn in turns]

    def _emit(self, outcomes: list[Outcome]) -> None:
        messages = [(o.turn.row, message) for o in outcomes if (message := _message(o)) is not None]
        try:
            for row, message in messages:
                if isinstance(message, Delta):
                    self._num_generated_tokens += len(message.token_ids)
                if isinstance(message, EngineError) or message.finish_reason is not None:
                    self._schedule.remove([row])
                    self._decoder.release(row.slot)
        finally:
            _send(messages)  # last: who hears the end finds the slot free


def _message(outcome: Outcome) -> Delta | EngineError | None:
    """Take the outcome into the row; what its consumer hears of it."""
    row, choice = outcome.turn.row, outcome.choice
    if choice is not None and choice.error is not None:
        return EngineError(choice.error)
    row.num_cached += outcome.turn.num_tokens
    row.prompt_logprobs += outcome.prompt_logprobs
    if choice is not None and choice.token_id is not None:
        return row.accept(choice.token_id, choice.logprob)
    # An echo with no completion behind it.
    return row.end("length") if row.num_left <= 0 and row.num_cached == len(row.ids) else None


def _send(messages: list[tuple[Row, Delta | EngineError]]) -> None:
    """Every consumer's event loop is woken once a step, not once a row."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Row, Delta | EngineError]]] = {}
    for row, message in messages:
        by_loop.setdefault(row.loop, []).append((row, message))
    for loop, its_messages in by_loop.items():
        try:
            loop.call_soon_threadsafe(_receive, its_messages)
        except RuntimeError:  # the loop is closed: nobody waits any more
            for row, _ in its_messages:
                row.cancelled = True


def _receive(messages: list[tuple[Row, Delta | EngineError]]) -> None:
    for row, message in messages:
        row.receive(message)
