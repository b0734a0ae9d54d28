"""Attention of a step's new tokens over the cache, in as few calls as waste little.

N new tokens, R rows of a segment, T tokens of a chunk, S slots, M length of a slot, L longest row of a segment, H query
heads, K key heads, G = H / K query heads that share a key head, D width of a head.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from alpaca_ray.serve.decoder import Chunk

# Lengths of rows are rounded up to so many tokens, and so many query heads at most share a product. At these shapes a
# row's result has the same bits whatever rows stand beside it (measured, MKL with AVX2); at others it often has not.
ALIGNMENT, SHARING = 32, 3
SPREAD = 2  # rows are attended together while the longest is at most so many times the shortest, ...
SLACK = 64  # ... and so many tokens longer: padding costs memory traffic, another call some 20 us


@dataclass(frozen=True)
class Segment:
    """New tokens that one call attends: one of each row in consecutive slots, or a whole chunk of one row."""

    first: int  # of the N tokens
    num_tokens: int
    slots: slice
    length: int  # L
    mask: Tensor | None  # added to the scores: (R, 1, 1, L) or (1, 1, T, L); None: causal, nothing before the chunk
    is_chunk: bool

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """query: (N, H, D), keys and values: (S, K, M, D), returns (R or T, H D)."""
        query = query[self.first : self.first + self.num_tokens]
        key, value = keys[self.slots, :, : self.length], values[self.slots, :, : self.length]  # (R or 1, K, L, D)
        if self.is_chunk:
            by_head = query.transpose(0, 1)[None]  # (1, H, T, D)
            causal = self.mask is None
            attended = scaled_dot_product_attention(by_head, key, value, self.mask, is_causal=causal, enable_gqa=True)
            return attended[0].transpose(0, 1).flatten(1)
        # The query heads that share a key head stand in for a chunk's tokens, so keys are read once for all of them.
        grouped = query.view(len(query), key.shape[1], -1, key.shape[-1])  # (R, K, G, D)
        assert self.mask is not None
        if query.device.type == "cpu" and query.dtype == torch.float32:
            return _by_products(grouped, key, value, self.mask).flatten(1)
        return scaled_dot_product_attention(grouped, key, value, self.mask).flatten(1)


def _by_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention for a few query tokens a row, 1.2 to 1.7 times as fast as torch's CPU kernel, which is made for many.

    query: (R, K, G, D), key and value: (R, K, L, D), mask: (R, 1, 1, L), returns (R, K, G, D).
    """
    num_heads, scale = query.shape[1], query.shape[-1] ** -0.5
    flat_key, flat_value = key.flatten(0, 1).transpose(1, 2), value.flatten(0, 1)  # views: (R K, D, L), (R K, L, D)
    flat_mask = mask.expand(-1, num_heads, -1, -1).flatten(0, 1)  # (R K, 1, L)
    parts = [
        torch.bmm(torch.baddbmm(flat_mask, some, flat_key, alpha=scale).softmax(-1), flat_value)
        for some in torch.split(query.flatten(0, 1), SHARING, dim=1)
    ]
    return torch.cat(parts, dim=1).view(query.shape)


def aligned(length: int) -> int:
    """The next length that a row may be attended at."""
    return -(-length // ALIGNMENT) * ALIGNMENT


def segments(chunks: Sequence[Chunk], like: Tensor) -> list[Segment]:
    """Segments that cover the chunks in their order; masks have the dtype and device of `like`."""
    found, first = [], 0
    for group in _groups(chunks):
        segment = _rows(group, first, like) if len(group[0].token_ids) == 1 else _chunk(group[0], first, like)
        found.append(segment)
        first += segment.num_tokens
    return found


def _groups(chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    group: list[Chunk] = []
    for chunk in chunks:
        if group and not _joins(chunk, group):
            yield group
            group = []
        group.append(chunk)
    yield group


def _joins(chunk: Chunk, group: list[Chunk]) -> bool:
    lengths = [chunk.start, *(member.start for member in group)]
    return (
        chunk.slot == group[-1].slot + 1
        and len(chunk.token_ids) == len(group[-1].token_ids) == 1
        and max(lengths) <= SPREAD * min(lengths) + SLACK
    )


def _rows(group: list[Chunk], first: int, like: Tensor) -> Segment:
    ends = [chunk.start + 1 for chunk in group]
    slots = slice(group[0].slot, group[-1].slot + 1)
    length = aligned(max(ends))
    hidden = torch.arange(length, device=like.device) >= torch.tensor(ends, device=like.device)[:, None]
    return Segment(first, len(group), slots, length, _additive(hidden, like)[:, None, None], is_chunk=False)


def _chunk(chunk: Chunk, first: int, like: Tensor) -> Segment:
    num_tokens = len(chunk.token_ids)
    end = chunk.start + num_tokens
    mask = None
    if chunk.start > 0:
        positions = torch.arange(end, device=like.device)
        mask = _additive(positions > positions[chunk.start :, None], like)[None, None]
    return Segment(first, num_tokens, slice(chunk.slot, chunk.slot + 1), end, mask, is_chunk=True)


def _additive(hidden: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))
