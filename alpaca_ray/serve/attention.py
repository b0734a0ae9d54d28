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

SPREAD = 2  # rows are attended together while the longest is at most so many times the shortest, ...
SLACK = 64  # ... and so many tokens longer: padding costs memory traffic, another call some 20 us


@dataclass(frozen=True)
class Segment:
    """New tokens that one call attends: one of each row in consecutive slots, or a whole chunk of one row."""

    first: int  # of the N tokens
    num_tokens: int
    slots: slice
    length: int  # L
    mask: Tensor | None  # added to the scores: (R, 1, 1, L) or (1, 1, T, L); None: everything is seen, or causal
    is_chunk: bool

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """query: (N, H, D), keys and values: (S, M, K, D), returns (R or T, H D)."""
        query = query[self.first : self.first + self.num_tokens]
        key = keys[self.slots, : self.length].transpose(1, 2)  # (R or 1, K, L, D)
        value = values[self.slots, : self.length].transpose(1, 2)
        if self.is_chunk:
            by_head = query.transpose(0, 1)[None]  # (1, H, T, D)
            causal = self.mask is None
            attended = scaled_dot_product_attention(by_head, key, value, self.mask, is_causal=causal, enable_gqa=True)
            return attended[0].transpose(0, 1).flatten(1)
        # The query heads that share a key head stand in for a chunk's tokens, so keys are read once for all of them.
        grouped = query.view(len(query), key.shape[1], -1, key.shape[-1])  # (R, K, G, D)
        return scaled_dot_product_attention(grouped, key, value, self.mask).flatten(1)


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
    mask = None
    if min(ends) < max(ends):
        hidden = torch.arange(max(ends), device=like.device) >= torch.tensor(ends, device=like.device)[:, None]
        mask = _additive(hidden, like)[:, None, None]
    return Segment(first, len(group), slots, max(ends), mask, is_chunk=False)


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
