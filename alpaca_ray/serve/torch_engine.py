"""The PyTorch engine: one thread takes waiting requests as a batch and decodes them together until all are done.

B rows of the batch, T tokens so far (left-padded prompt and completion), V vocabulary.
"""

import asyncio
import logging
import os
import queue
import threading
import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from alpaca_ray import models
from alpaca_ray.config import Placement, ServeArgs
from alpaca_ray.serve.engine import Delta, EngineError, FinishReason, Health, TokenRequest, room_for_completion

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def load_engine(args: ServeArgs) -> "TorchEngine":
    """The engine that the application's args ask for. Raises UserError if the model cannot be loaded."""
    device = "cuda" if args.placement.num_gpus > 0 else "cpu"
    if args.dtype == "bfloat16" and device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        logger.warning(
            "this CPU has no bfloat16 instructions, which makes prompts and batches 6 to 9 times slower than float32: "
            "set dtype: float32 in the application's args"
        )
    model: Any = models.load_model(args.model, args.dtype)
    return TorchEngine(
        model.to(device),
        max_length=min(args.max_length, getattr(model.config, "max_position_embeddings", args.max_length)),
        max_batch_size=args.max_batch_size,
        batch_wait_s=args.batch_wait_s,
        num_threads=num_threads(args.placement),
    )


def num_threads(placement: Placement) -> int:
    """The whole CPUs that were asked for, at least 1; all cores where none was asked for."""
    return int(max(1, placement.num_cpus)) if placement.num_cpus > 0 else (os.cpu_count() or 1)


class TorchEngine:
    """An Engine over a transformers causal language model. `close()` ends its thread."""

    def __init__(
        self,
        model: "PreTrainedModel",
        max_length: int,
        max_batch_size: int = 16,
        batch_wait_s: float = 0.02,
        num_threads: int = 1,
    ) -> None:
        self._model = model.eval()  # type: ignore[no-untyped-call]  # transformers has no annotation there
        self._max_length, self._max_batch_size, self._batch_wait_s = max_length, max_batch_size, batch_wait_s
        self._num_threads = num_threads
        self._end_token_ids = end_token_ids(model)
        self._waiting: queue.Queue[_Row | None] = queue.Queue()  # None: close
        self._running: list[_Row] = []
        self._open, self._lock = True, threading.Lock()  # under the lock: no request enters once it is closed
        self._thread = threading.Thread(target=self._run, name="torch-engine", daemon=True)
        self._thread.start()

    async def generate(self, request: TokenRequest) -> AsyncGenerator[Delta, None]:
        """See `Engine`."""
        room = room_for_completion(request, self._max_length)
        row = _Row(request, room, request.stop_token_ids | self._end_token_ids, self._model.device)
        with self._lock:
            if not self._open:
                raise EngineError("the engine is closed")
            self._waiting.put(row)
        try:
            async for delta in row.deltas():
                yield delta
        finally:
            row.cancelled = True

    async def health(self) -> Health:
        """See `Engine`."""
        if not self._open:
            raise EngineError("the engine is closed")
        return Health(num_running=len(self._running), num_waiting=self._waiting.qsize())

    def close(self) -> None:
        """Finish the batch in hand, fail what waits, and end the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        try:
            while rows := self._gather():
                self._decode_or_fail(rows)
        finally:  # however the thread ends, nobody is left waiting
            with self._lock:
                self._open = False
            while not self._waiting.empty():
                if row := self._waiting.get():
                    row.fail(EngineError("the engine is closed"))

    def _decode_or_fail(self, rows: "list[_Row]") -> None:
        try:
            self._decode(rows)
        except Exception as error:  # the boundary of a batch: whoever waits hears of it, the next batch is tried
            logger.exception("a batch of %d requests failed", len(rows))
            for row in rows:
                row.fail(EngineError(f"{type(error).__name__}: {error}"))
        finally:
            self._running = []

    def _gather(self) -> "list[_Row]":
        """Block for the first request, then give others batch_wait_s to join it. Empty: the engine closes."""
        rows: list[_Row] = []
        deadline_s = 0.0
        while len(rows) < self._max_batch_size:
            try:
                row = self._waiting.get(timeout=max(0.0, deadline_s - time.monotonic()) if rows else None)
            except queue.Empty:
                break
            if row is None:
                self._waiting.put(None)  # for the next call, when this batch is done
                break
            if not row.cancelled:
                deadline_s = deadline_s if rows else time.monotonic() + self._batch_wait_s
                rows.append(row)
        return rows

    @torch.inference_mode()
    def _decode(self, rows: "list[_Row]") -> None:
        batch = _Batch(self._model, [row.request.prompt_token_ids for row in rows])
        while rows:
            self._running = rows
            token_ids = choose(batch.logits, rows)
            kept = [i for i, row in enumerate(rows) if row.accept(token_ids[i])]
            rows = [rows[i] for i in kept]
            if rows:
                batch.step([token_ids[i] for i in kept], kept)


class _Batch:
    """Rows that share forward passes and a KV cache."""

    def __init__(self, model: "PreTrainedModel", prompts: list[tuple[int, ...]]) -> None:
        longest = max(len(prompt) for prompt in prompts)
        # Any id serves as padding: the mask hides it.
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])  # (B, T)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])  # (B, T)
        self._model, self._cache, self._mask = model, DynamicCache(), mask.to(model.device)
        positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)  # (B, T)
        self.logits = self._forward(ids.to(model.device), positions)  # (B, V)

    def step(self, token_ids: list[int], kept: list[int]) -> None:
        """Append one token to each of the rows `kept`; the others leave the batch.

        Dropping copies the cache once, as every step of a DynamicCache does anyway.
        """
        if len(kept) < len(self._mask):
            indices = torch.tensor(kept, device=self._mask.device)
            self._cache.batch_select_indices(indices)
            self._mask = self._mask[indices]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(kept), 1)], dim=1)  # (B, T)
        positions = self._mask.sum(dim=1, keepdim=True) - 1  # (B, 1)
        self.logits = self._forward(torch.tensor(token_ids, device=self._mask.device)[:, None], positions)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,  # the last position only: the others would cost T x V floats a row
        )
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits


class _Row:
    """One request in the engine's thread, and the way back to the event loop that waits for it."""

    def __init__(self, request: TokenRequest, room: int, stop: frozenset[int], device: torch.device) -> None:
        self.request = request
        self.cancelled = False  # set by the consumer, read by the thread
        self.generator = torch.Generator(device)
        seed = request.sampling.seed
        self.generator.manual_seed(seed) if seed is not None else self.generator.seed()
        self._room, self._stop = room, stop
        self._loop = asyncio.get_running_loop()
        self._inbox: asyncio.Queue[Delta | EngineError] = asyncio.Queue()

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """What the thread sent, up to the finish. Raises EngineError where the batch failed."""
        while True:
            item = await self._inbox.get()
            if isinstance(item, EngineError):
                raise item
            yield item
            if item.finish_reason is not None:
                return

    def accept(self, token_id: int) -> bool:
        """Send the token on; False if the row needs no further one."""
        if self.cancelled:
            return False
        if token_id in self._stop:
            self._send(Delta((), "stop"))
            return False
        self._room -= 1
        finish_reason: FinishReason | None = "length" if self._room == 0 else None
        self._send(Delta((token_id,), finish_reason))
        return finish_reason is None

    def fail(self, error: EngineError) -> None:
        """The batch failed; a consumer that is done already takes no notice."""
        self._send(error)

    def _send(self, item: Delta | EngineError) -> None:
        try:
            self._loop.call_soon_threadsafe(self._inbox.put_nowait, item)
        except RuntimeError:  # the consumer's event loop is closed: nobody waits any more
            self.cancelled = True


def choose(logits: torch.Tensor, rows: "list[_Row]") -> list[int]:
    """The next token of each row, by its own temperature, top_p and generator. logits: (B, V), float32."""
    token_ids: list[int] = logits.argmax(dim=-1).tolist()
    for i, row in enumerate(rows):
        sampling = row.request.sampling
        if sampling.temperature > 0:
            token_ids[i] = sample(logits[i], sampling.temperature, sampling.top_p, row.generator)
    return token_ids


def sample(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token by nucleus sampling (Holtzman et al. 2020): from the likeliest tokens that reach `top_p` together.

    logits: (V,). Temperature is applied first, as OpenAI and transformers do.
    """
    probabilities = torch.softmax(logits / temperature, dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        ordered[ordered.cumsum(dim=0) - ordered >= top_p] = 0  # the token that crosses top_p stays
        return int(order[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))


def end_token_ids(model: "PreTrainedModel") -> frozenset[int]:
    """The model's end-of-sequence tokens: none, one or several, as its generation config says."""
    ids: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    return frozenset(ids if isinstance(ids, list) else [] if ids is None else [ids])
