"""[RAY] The novelty filter over a pool that lies in several actors, with the decisions of `NoveltyFilter`.

For pools past one machine's memory only. One process takes about 0.6 GiB and half a minute for a million instructions,
so `NoveltyFilter` serves up to tens of millions; every shard here tokenizes and looks up every candidate, and a batch
waits for the slowest of them.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import ray

from alpaca_ray.generate.novelty import KEPT, Novelty, TextPool
from alpaca_ray.generate.tokens import Array


class Shard:
    """A part of the pool. `numbers` are the places of its texts in the whole pool, rising."""

    def __init__(self, threshold: float) -> None:
        self._pool = TextPool(threshold)
        self._numbers: list[int] = []

    def add(self, numbers: Sequence[int], texts: Sequence[str]) -> None:
        self._pool.add(texts)
        self._numbers += numbers

    def query(self, texts: Sequence[str]) -> tuple[Array, Array, list[str]]:
        """Of each text's most similar duplicate: its number or -1, their ROUGE-L or 0, the duplicate or ""."""
        nearest, scores = self._pool.offer(texts, np.ones(len(texts), bool))
        numbers = [self._numbers[where] if where >= 0 else -1 for where in nearest.tolist()]
        duplicates = [self._pool.texts[where] if where >= 0 else "" for where in nearest.tolist()]
        return np.array(numbers, np.int64), scores, duplicates


class ShardedNoveltyFilter:
    """As `NoveltyFilter`, with its pool in `num_shards` actors of one CPU each.

    Per batch: all shards look the candidates up as the pool stands, in parallel; then the batch's own order decides
    among what they let through. The pool itself is never in this process.
    """

    def __init__(
        self, seed_instructions: Iterable[str], threshold: float = 0.7, *, num_shards: int, batch_size: int = 8192
    ) -> None:
        TextPool(threshold)  # a threshold that cannot be fails here rather than in an actor
        self._threshold, self._batch_size = threshold, batch_size
        self._shards: list[Any] = [ray.remote(Shard).remote(threshold) for _ in range(num_shards)]
        self._size = 0
        self.add_many(list(seed_instructions))

    def add_many(self, instructions: Sequence[str]) -> None:
        """Put instructions into the pool without a decision; they are dealt out one by one."""
        for k, shard in enumerate(self._shards):
            first = (k - self._size) % len(self._shards)
            texts = list(instructions[first :: len(self._shards)])
            numbers = list(range(self._size + first, self._size + len(instructions), len(self._shards)))
            shard.add.remote(numbers, texts)  # an actor answers in the order of calls: no query overtakes this
        self._size += len(instructions)

    def offer_many(self, instructions: Sequence[str]) -> list[Novelty]:
        """Decide on each instruction in turn; kept ones join the pool."""
        size = self._batch_size
        batches = [instructions[first : first + size] for first in range(0, len(instructions), size)]
        return [novelty for batch in batches for novelty in self._offer(batch)]

    def _offer(self, instructions: Sequence[str]) -> list[Novelty]:
        shared = ray.put(instructions)
        # Waiting here, batch by batch: which candidates the pool holds at the next batch is decided by this one.
        duplicates = _best(ray.get([shard.query.remote(shared) for shard in self._shards]), len(instructions))
        batch = TextPool(self._threshold)
        nearest, scores = batch.offer(instructions, np.array([not novelty.kept for novelty in duplicates], bool))
        for i in np.flatnonzero(nearest >= 0).tolist():
            if scores[i] > (duplicates[i].rouge_l or 0):  # of equals, those in the shards came earlier
                duplicates[i] = Novelty(False, float(scores[i]), batch.texts[nearest[i]])
        self.add_many(batch.texts)
        return duplicates


def _best(answers: list[tuple[Array, Array, list[str]]], size: int) -> list[Novelty]:
    """Of each candidate, the most similar duplicate in any shard, the first of equals; KEPT where there is none."""
    best, numbers = [KEPT] * size, np.full(size, -1)
    for number, scores, texts in answers:
        for i in np.flatnonzero(number >= 0).tolist():
            score = float(scores[i])
            highest = best[i].rouge_l or 0.0
            if score > highest or (score == highest and number[i] < numbers[i]):
                best[i], numbers[i] = Novelty(False, score, texts[i]), number[i]
    return best
