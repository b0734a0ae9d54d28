"""The order of examples: a pure function that any rank, any resumed run and any world size agrees on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpaca_ray.config import UserError
from alpaca_ray.schema import Example
from alpaca_ray.train.order import batch_ids, split, steps_per_epoch


def epoch_ids(num_examples: int, batch: int, seed: int, epoch: int) -> list[int]:
    steps = steps_per_epoch(num_examples, batch)
    return [i for s in range(epoch * steps, (epoch + 1) * steps) for i in batch_ids(num_examples, batch, seed, s)]


@given(num_examples=st.integers(1, 60), batch=st.integers(1, 20), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_an_epoch_takes_each_example_exactly_once(num_examples: int, batch: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_ids(num_examples, batch, seed, epoch)) == list(range(num_examples))


@given(num_examples=st.integers(1, 60), batch=st.integers(1, 20), step=st.integers(0, 200))
def test_only_the_last_batch_of_an_epoch_is_short(num_examples: int, batch: int, step: int) -> None:
    steps = steps_per_epoch(num_examples, batch)
    is_last = step % steps == steps - 1
    rest = num_examples % batch or batch
    assert len(batch_ids(num_examples, batch, 0, step)) == (rest if is_last else batch)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [epoch_ids(50, 8, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_of_a_finished_run_stays() -> None:
    """Another order would make a resumed run see examples twice: this one is on record."""
    assert batch_ids(10, 4, seed=0, step=0) == [8, 4, 2, 6]
    assert batch_ids(10, 4, seed=0, step=5) == [6, 2]


def examples(num: int) -> list[Example]:
    return [Example(f"{i:04d}", f"do {i}", "", "done") for i in range(num)]


@given(num=st.integers(2, 300), fraction=st.floats(0.001, 0.999))
def test_every_example_is_either_trained_on_or_held_out(num: int, fraction: float) -> None:
    training, heldout = split(examples(num), fraction)
    assert training
    assert heldout
    assert sorted(training + heldout, key=lambda e: e.id) == examples(num)
    assert abs(len(heldout) - fraction * num) <= 1


def test_the_split_does_not_depend_on_the_order() -> None:
    assert split(examples(50), 0.2) == split(examples(50)[::-1], 0.2)


@pytest.mark.parametrize("num", [0, 1])
def test_too_few_to_split(num: int) -> None:
    with pytest.raises(UserError, match=f"{num} examples"):
        split(examples(num), 0.5)
