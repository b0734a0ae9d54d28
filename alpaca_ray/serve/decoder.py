"""What turns token ids into logits for the engine: rows keep their keys and values in numbered slots between calls.

T tokens of a chunk, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Chunk:
    """The next tokens of the row in `slot`; the first stands at position `start`, behind what the slot holds."""

    slot: int
    start: int
    token_ids: Sequence[int]  # never empty
    num_logits: int  # the last so many tokens need logits: none, one or all


class Decoder(Protocol):
    """A causal language model with room for `num_slots` rows of `max_length` tokens."""

    num_slots: int
    max_length: int
    vocab_size: int
    device: torch.device

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits, float32, one chunk's after the other: (sum of num_logits, V). Repeating a call changes nothing."""
        ...

    def release(self, slot: int) -> None:
        """The row is over: nothing of it may reach the next one in its slot."""
        ...


class ModuleDecoder:
    """A Decoder over transformers' own modelling code, for any architecture: each row by itself, with its own cache.

    Slow, but a row needs no padding, so sliding windows and the like are as right as they are in transformers.
    """

    def __init__(self, model: "PreTrainedModel", num_slots: int, max_length: int) -> None:
        self.num_slots, self.max_length = num_slots, max_length
        self.vocab_size, self.device = int(model.config.vocab_size), model.device
        self._model: Any = model.eval()  # type: ignore[no-untyped-call]  # transformers has no annotation there
        self._caches: dict[int, DynamicCache] = {}  # by slot
        self._ids: dict[int, list[int]] = {}  # what each slot holds
        self._keeps_last = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """See `Decoder`."""
        return torch.cat([self._one(chunk) for chunk in chunks])

    def release(self, slot: int) -> None:
        """See `Decoder`."""
        self._caches.pop(slot, None)
        self._ids.pop(slot, None)

    def _one(self, chunk: Chunk) -> Tensor:
        before = self._ids.get(chunk.slot, [])
        assert len(before) >= chunk.start, "the slot lacks the row's first tokens"
        cache = self._caches.pop(chunk.slot, None)  # back when the call has succeeded: else it may be half written
        token_ids = list(chunk.token_ids)
        if cache is None or len(before) > chunk.start:
            cache, token_ids = DynamicCache(config=self._model.config), [*before[: chunk.start], *token_ids]
        # The others would cost T x V floats.
        last = {"logits_to_keep": max(1, chunk.num_logits)} if self._keeps_last else {}
        ids = torch.tensor([token_ids], device=self.device)  # (1, T)
        logits: Tensor = self._model(input_ids=ids, past_key_values=cache, use_cache=True, **last).logits[0]
        self._caches[chunk.slot] = cache
        self._ids[chunk.slot] = [*before[: chunk.start], *chunk.token_ids]
        return logits[len(logits) - chunk.num_logits :].float()
