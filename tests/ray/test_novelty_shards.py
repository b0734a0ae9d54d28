"""A pool in several actors decides as one in this process."""

import random

import pytest

from alpaca_ray.generate.novelty import NoveltyFilter
from alpaca_ray.generate.novelty_shards import ShardedNoveltyFilter


def made(size: int, seed: int) -> list[str]:
    """Short texts over few words: duplicates, ties and texts without tokens abound."""
    rng = random.Random(seed)
    return [" ".join(rng.choices("abcdefghijklm-", k=rng.randint(0, 9))) for _ in range(size)]


@pytest.mark.parametrize("num_shards", [1, 3])
def test_shards_decide_as_one_filter(num_shards: int) -> None:
    """In several batches, the last one not full."""
    seeds, rounds = made(40, 0), [made(400, 1), made(1, 2), [], made(300, 3)]
    single, sharded = NoveltyFilter(seeds), ShardedNoveltyFilter(seeds, num_shards=num_shards, batch_size=150)
    for offers in rounds:
        assert sharded.offer_many(offers) == single.offer_many(offers)


def test_a_resumed_sharded_filter_decides_as_the_first_would_have() -> None:
    before, after = made(200, 4), made(200, 5)
    first, resumed = (ShardedNoveltyFilter([], 0.6, num_shards=2) for _ in range(2))
    answers = first.offer_many(before)
    resumed.add_many([text for text, answer in zip(before, answers, strict=True) if answer.kept])
    assert resumed.offer_many(after) == first.offer_many(after)


def test_a_threshold_outside_the_scores_is_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        ShardedNoveltyFilter([], 7, num_shards=1)
