"""Llama's forward pass for many rows at once: the tokens of all chunks lie flat, so a step reads each weight once.

N tokens of all chunks, S slots, M aligned length of a slot, H query heads, K key heads, D width of a head, E hidden
width, I width of the MLP, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from alpaca_ray.config import Quantization
from alpaca_ray.serve.attention import Segment, aligned, segments
from alpaca_ray.serve.decoder import Chunk
from alpaca_ray.serve.linear import Linear, fuse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# "longrope" changes with the length of the row, so its keys cannot be kept.
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


def supports(model: "PreTrainedModel") -> bool:
    """Whether `LlamaDecoder` computes what this model's own code computes."""
    config: Any = model.config
    return (
        type(model).__name__ == "LlamaForCausalLM"
        and config.hidden_act == "silu"
        and config.rope_parameters["rope_type"] in ROPE_TYPES
    )


@dataclass(frozen=True)
class _Layer:
    attention_norm: Tensor  # (E,)
    query_key_value: Linear  # E -> (H + 2 K) D
    output: Linear  # H D -> E
    mlp_norm: Tensor  # (E,)
    gate_up: Linear  # E -> 2 I
    down: Linear  # I -> E


class LlamaDecoder:
    """A Decoder with fused and packed weights. Its cache is allocated at once: every slot at full length."""

    def __init__(
        self, model: "PreTrainedModel", num_slots: int, max_length: int, quantization: Quantization | None = None
    ) -> None:
        llama: Any = model
        self.num_slots, self.max_length, self.device = num_slots, max_length, model.device
        self.vocab_size = int(llama.config.vocab_size)
        self._eps = llama.config.rms_norm_eps
        self._num_key_heads = llama.config.num_key_value_heads
        self._head_dim = llama.model.layers[0].self_attn.head_dim
        self._embedding = llama.model.embed_tokens.weight.detach()  # (V, E)
        self._layers = [_layer(layer, quantization) for layer in llama.model.layers]
        self._norm = llama.model.norm.weight.detach()
        self._head = fuse([llama.lm_head], quantization)
        self._cos, self._sin = _rotations(llama.model.rotary_emb, max_length, self._embedding)
        # On a CPU a page of zeros takes no memory before it is written to.
        shape = (len(self._layers), 2, num_slots, self._num_key_heads, aligned(max_length), self._head_dim)
        self._cache = torch.zeros(shape, dtype=self._embedding.dtype, device=self.device)
        self._used = [0] * num_slots  # tokens that each slot has held since its release

    @property
    def cache_bytes(self) -> int:
        """Memory for keys and values."""
        return self._cache.nbytes

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """See `Decoder`."""
        batch = _Batch(chunks, self)
        for chunk in chunks:
            self._used[chunk.slot] = max(self._used[chunk.slot], chunk.start + len(chunk.token_ids))
        hidden = self._embedding[batch.ids]  # (N, E)
        for layer, cache in zip(self._layers, self._cache, strict=True):
            fused = layer.query_key_value(self._normed(hidden, layer.attention_norm))
            hidden = hidden + layer.output(self._attend(batch, fused, cache))
            gate, up = layer.gate_up(self._normed(hidden, layer.mlp_norm)).chunk(2, dim=-1)
            hidden = hidden + layer.down(silu(gate) * up)
        wanted = self._normed(hidden[batch.wanted], self._norm)
        return self._head(wanted).float() if len(wanted) else torch.empty(0, self.vocab_size, device=self.device)

    def release(self, slot: int) -> None:
        """See `Decoder`. Zeros: a NaN left behind would pass through the mask of the next row."""
        self._cache[:, :, slot, :, : self._used[slot]] = 0
        self._used[slot] = 0

    def places(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Where the key heads of each token lie in a layer's cache: (N K,) of S K M."""
        heads = slots[:, None] * self._num_key_heads + torch.arange(self._num_key_heads, device=self.device)
        places: Tensor = heads * self._cache.shape[-2] + positions[:, None]
        return places.flatten()

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine for `_rotated`: (N, 1, D) each."""
        return self._cos[positions], self._sin[positions]

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(hidden, weight.shape, weight, self._eps)

    def _attend(self, batch: "_Batch", fused: Tensor, cache: Tensor) -> Tensor:
        """fused: (N, (H + 2 K) D), cache: (2, S, K, M, D), returns (N, H D)."""
        num_key_heads = self._num_key_heads
        by_head = fused.view(len(fused), -1, self._head_dim)  # (N, H + 2 K, D)
        rotated = _rotated(by_head[:, :-num_key_heads], *batch.rotation)
        for new, kept in ((rotated[:, -num_key_heads:], cache[0]), (by_head[:, -num_key_heads:], cache[1])):
            kept.view(-1, self._head_dim).index_copy_(0, batch.places, new.flatten(0, 1))
        query = rotated[:, :-num_key_heads]
        parts = [segment.attend(query, cache[0], cache[1]) for segment in batch.segments]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Batch:
    """The chunks of one call, flat."""

    def __init__(self, chunks: Sequence[Chunk], decoder: LlamaDecoder) -> None:
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        wanted: list[int] = []
        for chunk in chunks:
            end = chunk.start + len(chunk.token_ids)
            assert end <= decoder.max_length, "the row is longer than its slot"
            ids += chunk.token_ids
            positions += range(chunk.start, end)
            slots += [chunk.slot] * len(chunk.token_ids)
            wanted += range(len(ids) - chunk.num_logits, len(ids))
        device = decoder.device
        self.ids = torch.tensor(ids, device=device)  # (N,)
        at = torch.tensor(positions, device=device)  # (N,)
        self.places = decoder.places(torch.tensor(slots, device=device), at)
        self.wanted = torch.tensor(wanted, dtype=torch.long, device=device)
        self.rotation = decoder.rotation(at)
        self.segments: list[Segment] = segments(chunks, self.rotation[0])


def _layer(layer: Any, quantization: Quantization | None) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        attention_norm=layer.input_layernorm.weight.detach(),
        query_key_value=fuse([attention.q_proj, attention.k_proj, attention.v_proj], quantization),
        output=fuse([attention.o_proj], quantization),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=fuse([mlp.gate_proj, mlp.up_proj], quantization),
        down=fuse([mlp.down_proj], quantization),
    )


def _rotations(rotary: Any, max_length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' own cosines and sines of every position, the first half of the sines negated: (M, 1, D) each."""
    positions = torch.arange(max_length, device=like.device)[None]
    cos, sin = (table[0, :, None] for table in rotary(like, positions))
    first, second = sin.chunk(2, dim=-1)
    return cos, torch.cat([-first, second], dim=-1)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021), the halves of a head as the two coordinates. heads: (N, H + K, D)."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, dims=-1), sin)
