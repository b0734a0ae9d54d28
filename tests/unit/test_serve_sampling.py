"""Choosing tokens: the distribution, its restrictions, the draw from (seed, index)."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alpaca_ray.serve.engine import SamplingParams
from alpaca_ray.serve.sampling import RowSampling, choose, exponentials, logprobs

NUM_DRAWS = 4000


def row(seed: int = 0, emitted: tuple[int, ...] = (), vocab_size: int = 4, **params: Any) -> RowSampling:
    return RowSampling.start(SamplingParams(**params), seed, emitted, vocab_size, torch.device("cpu"))


def shares(probabilities: list[float], **params: Any) -> Tensor:
    logits = torch.log(torch.tensor(probabilities)).repeat(NUM_DRAWS, 1)
    drawn = choose(logits, [row(seed, **params) for seed in range(NUM_DRAWS)])
    return torch.bincount(torch.tensor(drawn), minlength=len(probabilities)) / NUM_DRAWS


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [0.15, 0.5, 0.05, 0.3]),
        ({"temperature": 0.5}, [0.0616, 0.6849, 0.0068, 0.2466]),  # squares
        # 0.5 alone does not reach 0.6, so the second token belongs to the nucleus, the third does not
        ({"top_p": 0.6}, [0.0, 0.625, 0.0, 0.375]),
        ({"top_p": 0.4}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_k": 3}, [0.1579, 0.5263, 0, 0.3158]),
        ({"top_k": 2, "top_p": 0.62}, [0.0, 1.0, 0.0, 0.0]),  # among the two, 0.5 is 0.625
        ({"top_k": 99}, [0.15, 0.5, 0.05, 0.3]),
        ({"top_p": 1e-9}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_p": 0.0}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_k": 1, "temperature": 2.0}, [0.0, 1.0, 0.0, 0.0]),
        ({"temperature": 1e-30}, [0.0, 1.0, 0.0, 0.0]),
        ({"temperature": 0}, [0.0, 1.0, 0.0, 0.0]),
    ],
)
def test_tokens_are_drawn_from_the_distribution_that_was_asked_for(params: Any, expected: list[float]) -> None:
    assert torch.allclose(shares([0.15, 0.5, 0.05, 0.3], **params), torch.tensor(expected), atol=0.03)


def test_draws_depend_on_seed_and_index_alone() -> None:
    pairs = [(seed, index) for seed in (-3, 0, 1, 2**70) for index in range(20)]
    draws = torch.stack([exponentials(seed, index, 1000) for seed, index in pairs])

    assert torch.equal(draws, torch.stack([exponentials(seed, index, 1000) for seed, index in pairs]))
    assert len({tuple(row[:5].tolist()) for row in draws}) == len(pairs)
    assert bool(((draws > 0) & draws.isfinite()).all())
    assert draws.mean().item() == pytest.approx(1, abs=0.02)
    assert draws.var().item() == pytest.approx(1, abs=0.05)


@settings(max_examples=60, deadline=None)
@given(
    vocab_size=st.sampled_from([3, 300, 5000]),
    spread=st.sampled_from([0.0, 0.1, 3.0]),
    top_p=st.sampled_from([0.05, 0.5, 0.95, 0.999, 1.0]),
    top_k=st.sampled_from([0, 1, 40, 400]),
    seed=st.integers(0, 10**6),
)
def test_a_token_is_of_the_nucleus_and_the_nucleus_is_the_smallest(
    vocab_size: int, spread: float, top_p: float, top_k: int, seed: int
) -> None:
    logits = torch.randn(2, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread
    params = SamplingParams(top_p=top_p, top_k=top_k)

    first, second = choose(logits.clone(), [RowSampling(params, seed), RowSampling(params, seed + 1)])

    for token_id, row_logits in zip((first, second), logits.double(), strict=True):
        assert token_id is not None
        weights = row_logits.exp()
        mass = weights.sort(descending=True).values[: top_k or vocab_size].sum()
        above = weights[weights > weights[token_id]]
        assert above.sum() < top_p * mass + 1e-5 * mass
        assert not top_k or len(above) < top_k


def test_ties_do_not_widen_the_nucleus() -> None:
    drawn = choose(torch.zeros(400, 100), [row(seed, top_p=0.1) for seed in range(400)])
    assert len(set(drawn)) == 10


def test_a_row_chooses_the_same_alone_and_in_company() -> None:
    logits = torch.randn(5, 5000, generator=torch.Generator().manual_seed(1))
    rows = [row(3), row(4, temperature=0), row(5, top_p=0.9), row(6, top_k=7), row(7, top_p=0.99, temperature=1.7)]

    together = choose(logits.clone(), rows)

    assert together == [choose(logits[i : i + 1].clone(), [rows[i]])[0] for i in range(5)]


@pytest.mark.parametrize("spread", [0.1, 5.0])
def test_last_bits_do_not_change_the_draw(spread: float) -> None:
    logits = spread * torch.randn(100, 20_000, generator=torch.Generator().manual_seed(2))
    noise = 1e-5 * torch.randn(100, 20_000, generator=torch.Generator().manual_seed(3))
    rows = [row(seed, top_p=0.9 if seed % 4 == 0 else 1.0) for seed in range(100)]
    assert choose(logits.clone(), rows) == choose(logits + noise, rows)


def test_penalties_follow_openai_s_formula_over_the_completion_alone() -> None:
    logits = torch.tensor([[1.0, 0.9, 0.0, -5.0]])

    def greedy(emitted: tuple[int, ...], **params: Any) -> int | None:
        return choose(logits.clone(), [row(0, emitted, temperature=0, **params)])[0]

    assert greedy((0, 0)) == 0
    assert greedy((0,), presence_penalty=0.05) == 0
    assert greedy((0, 0, 0), presence_penalty=0.05) == 0  # presence does not count
    assert greedy((0, 0, 0), frequency_penalty=0.05) == 1
    assert greedy((0, 1), presence_penalty=0.95) == 0
    assert greedy((0, 1, 1), presence_penalty=0.8, frequency_penalty=0.3) == 2
    assert greedy((3,) * 9, frequency_penalty=-2) == 3


def test_a_row_counts_what_it_appends() -> None:
    appended, begun = row(frequency_penalty=1), row(0, (2, 2, 1), frequency_penalty=1)
    for token_id in (2, 2, 1):
        appended.append(token_id)
    assert appended.num_chosen == begun.num_chosen == 3
    assert appended.counts is not None
    assert appended.counts.tolist() == [0, 1, 2, 0]
    assert torch.equal(appended.counts, torch.as_tensor(begun.counts))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_give_no_token_and_leave_the_others(bad: float) -> None:
    logits = torch.tensor([[0.0, bad, 0.0, 0.0], [0.0, 9.0, 0.0, 0.0], [bad] * 4])
    rows = [row(0), row(1, temperature=0), row(2, top_p=0.5)]
    assert choose(logits, rows) == [None, 1, None]


def test_log_probabilities_are_of_the_whole_vocabulary_and_likeliest_first() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.6, 0.3], [0.2, 0.2, 0.6]])) + 3

    first, second = logprobs(logits, [0, 2], 2)

    assert (first.token_id, [token_id for token_id, _ in first.top]) == (0, [1, 2])
    assert first.logprob == pytest.approx(-2.302585, abs=1e-5)
    assert second.logprob == second.top[0][1] == pytest.approx(-0.510826, abs=1e-5)
    assert logprobs(logits, [0, 2], 0)[0].top == ()
    assert len(logprobs(logits, [0, 2], 20)[0].top) == 3
