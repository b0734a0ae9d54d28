"""Prices, the hard stop and the estimate before a run."""

import pickle
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpaca_ray.config import LimitsConfig, Price, UserError
from alpaca_ray.provider.budget import (
    Budget,
    Charge,
    Estimate,
    PilotRow,
    Spent,
    estimate,
    pico_usd,
    price_of,
    worst_case,
)

CHEAP = Price(input_usd_per_million=0.15, output_usd_per_million=0.6)
charges = st.builds(Charge, st.integers(0, 5000), st.integers(0, 5000))


def usd_of(charge: Charge, price: Price) -> Fraction:
    rates = Fraction(str(price.input_usd_per_million)), Fraction(str(price.output_usd_per_million))
    return (charge.prompt_tokens * rates[0] + charge.completion_tokens * rates[1]) / 10**6


@given(
    steps=st.lists(st.tuples(charges, st.sampled_from(["settle", "unknown", "release", "wait"]), st.floats(0, 1))),
    max_usd=st.none() | st.floats(0, 0.02),
    max_tokens=st.none() | st.integers(0, 40_000),
)
def test_spent_and_reserved_never_pass_a_limit(
    steps: list[tuple[Charge, str, float]], max_usd: float | None, max_tokens: int | None
) -> None:
    budget = Budget(max_usd, max_tokens, CHEAP)
    open_charges: dict[str, Charge] = {}
    paid, tokens = Fraction(0), 0
    for number, (charge, step, share) in enumerate(steps):
        answer = budget.reserve(str(number), charge)
        assert answer != "exhausted" or not open_charges
        assert answer != "wait" or open_charges
        if answer == "reserved":
            open_charges[str(number)] = charge
        if open_charges and step != "wait":
            key, reserved = open_charges.popitem()
            actual = Charge(int(reserved.prompt_tokens * share), int(reserved.completion_tokens * share))
            if step == "release":
                budget.release(key)
            else:
                taken = actual if step == "settle" else reserved
                cost_usd = budget.settle(key, actual if step == "settle" else None)
                paid, tokens = paid + usd_of(taken, CHEAP), tokens + taken.tokens
                assert pico_usd(cost_usd) == usd_of(taken, CHEAP) * 10**12
        held = sum((usd_of(each, CHEAP) for each in open_charges.values()), Fraction(0))
        assert Fraction(budget.spent.pico_usd, 10**12) == paid
        assert Fraction(budget.reserved.pico_usd, 10**12) == held
        assert max_usd is None or paid + held <= Fraction(str(max_usd))
        assert max_tokens is None or budget.spent.tokens + budget.reserved.tokens <= max_tokens
        assert budget.spent.tokens == tokens


def test_a_budget_is_used_to_the_last_token() -> None:
    budget = Budget(None, 300, None)
    assert [budget.reserve(key, Charge(50, 50)) for key in "abcd"] == ["reserved"] * 3 + ["wait"]
    budget.settle("a", Charge(50, 0))
    assert budget.reserve("d", Charge(50, 0)) == "reserved"
    for key in "bcd":
        budget.settle(key, None)
    assert budget.spent == Spent(0, 300)
    assert budget.reserve("e", Charge(0, 1)) == "exhausted"
    assert budget.reserve("f", Charge(0, 0)) == "reserved"


def test_a_run_goes_on_from_what_was_spent_with_a_higher_budget() -> None:
    first = Budget(0.001, None, CHEAP)
    assert first.reserve("a", Charge(0, 1500)) == "reserved"
    first.settle("a", Charge(0, 1000))
    assert first.reserve("b", Charge(0, 1000)) == "exhausted"
    second = Budget(0.002, None, CHEAP, spent=first.spent)
    assert second.reserve("b", Charge(0, 1000)) == "reserved"


def test_more_than_was_reserved_is_booked_as_it_is() -> None:
    budget = Budget(None, 100, None)
    budget.reserve("a", Charge(10, 10))
    budget.settle("a", Charge(10, 200))
    assert budget.spent.tokens == 210
    assert budget.reserve("b", Charge(0, 1)) == "exhausted"


def test_a_key_has_one_reservation() -> None:
    budget = Budget(None, None, None)
    budget.reserve("a", Charge(1, 1))
    with pytest.raises(ValueError, match="a is reserved already"):
        budget.reserve("a", Charge(1, 1))


def test_dollars_need_a_price() -> None:
    with pytest.raises(UserError, match=r"generate\.teacher\.price"):
        Budget(1.0, None, None)
    assert Budget(None, 10, None).usd(Charge(5, 5)) == 0.0


def test_the_batch_api_costs_half() -> None:
    charge = Charge(1000, 1000)
    assert Budget(None, None, CHEAP, batch=True).usd(charge) * 2 == pytest.approx(Budget(None, None, CHEAP).usd(charge))


@given(st.integers(0, 4 * 10**15))
def test_floats_give_back_the_sum_they_came_from(pico: int) -> None:
    assert pico_usd(Spent(pico).usd) == pico


@given(st.text())
def test_a_prompt_has_no_more_tokens_than_bytes(prompt: str) -> None:
    charge = worst_case(prompt, 100)
    assert charge.prompt_tokens >= len(prompt.encode())
    assert charge.completion_tokens == 100


def test_half_a_surrogate_pair_has_a_worst_case_too() -> None:
    assert worst_case("\ud83d", 1).prompt_tokens >= 3


@pytest.mark.parametrize(
    ("model", "known"),
    [
        ("gpt-3.5-turbo-instruct", (1.5, 2.0)),
        ("gpt-4o-mini", (0.15, 0.6)),
        ("gpt-4o-mini-2024-07-18", (0.15, 0.6)),
        ("gpt-4o-2024-08-06", (2.5, 10.0)),
        ("gpt-4o-2024-05-13", (5.0, 15.0)),  # a snapshot with a price of its own
        ("gpt-3.5-turbo-0125", (0.5, 1.5)),
        ("text-davinci-003", (20.0, 20.0)),
        ("smollm2-135m", (0.0, 0.0)),
        ("gpt-5-pro", None),  # another model, not a snapshot of gpt-5
        ("gpt-4o-mini-audio-preview", None),
        ("gpt", None),
        ("", None),
    ],
)
def test_prices(model: str, known: tuple[float, float] | None) -> None:
    price = price_of(model)
    found = None if price is None else (price.input_usd_per_million, price.output_usd_per_million)
    assert found == known


def test_a_price_of_ones_own_goes_first() -> None:
    assert price_of("gpt-4o", CHEAP) == CHEAP


def an_estimate(
    pilot: list[PilotRow], price: Price | None = CHEAP, limits: LimitsConfig | None = None, batch: bool = False
) -> Estimate:
    return estimate(
        pilot, 1000, price, limits=limits or LimitsConfig(), concurrency=10, rng=random.Random(0), batch=batch
    )


def test_a_pilot_without_spread_gives_a_point() -> None:
    result = an_estimate([PilotRow(100, 400, 3.0, 5)] * 20)
    assert result.requests == (200, 200, 200)
    assert result.prompt_tokens.expected == 20_000
    assert result.completion_tokens.expected == 80_000
    assert result.usd is not None
    assert result.usd.expected == pytest.approx(0.051)
    assert result.minutes is not None
    assert result.minutes.expected == pytest.approx(200 * 3.0 / 10 / 60)


@pytest.mark.parametrize(
    ("limits", "minutes"),
    [(LimitsConfig(requests_per_minute=20), 10.0), (LimitsConfig(tokens_per_minute=5000), 20.0)],
)
def test_the_limit_that_binds_decides_the_time(limits: LimitsConfig, minutes: float) -> None:
    result = an_estimate([PilotRow(100, 400, 0.1, 5)] * 20, limits=limits)
    assert result.minutes is not None
    assert result.minutes.expected == pytest.approx(minutes)


def test_the_interval_holds_the_truth_about_nine_times_in_ten() -> None:
    hits = 0
    for trial in range(60):
        rng = random.Random(trial)
        pilot = [PilotRow(100, rng.randint(100, 900), 1.0, rng.randint(0, 10)) for _ in range(40)]
        low, expected, high = an_estimate(pilot).requests
        assert low <= expected <= high
        hits += low <= 200 <= high
    assert hits >= 46  # of 60 at 0.9 (54 expected; 46 has a chance of about 0.002)


def test_what_is_not_known_is_said() -> None:
    rows = [PilotRow(100, 400, 3.0, 5)] * 3
    assert "price not known" in str(an_estimate(rows, price=None))
    assert "up to 24 hours" in str(an_estimate(rows, batch=True))
    table = str(an_estimate(rows)).splitlines()
    assert len({len(line) for line in table}) == 1
    assert table[1].split() == ["requests", "200", "200", "200"]


def test_a_resample_that_kept_nothing_has_no_upper_end() -> None:
    result = an_estimate([PilotRow(100, 0, 0.0, 1), PilotRow(100, 0, 0.0, 0)])
    assert result.requests.high == float("inf")
    assert result.requests.expected == 2000


@pytest.mark.parametrize("pilot", [[], [PilotRow(100, 400, 3.0, 0)] * 5])
def test_a_pilot_that_kept_nothing_estimates_nothing(pilot: list[PilotRow]) -> None:
    with pytest.raises(UserError, match="kept nothing"):
        an_estimate(pilot)


def test_the_books_pickle() -> None:
    result = an_estimate([PilotRow(100, 400, 3.0, 5)] * 3)
    assert pickle.loads(pickle.dumps((result, Spent(1, 2), Charge(3, 4)))) == (result, Spent(1, 2), Charge(3, 4))
