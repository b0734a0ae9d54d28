"""The gate: what it lets out, what it remembers, when it stops a run. Its clock is an argument."""

from pathlib import Path
from typing import Any

import pytest

from alpaca_ray.artifacts import RunDirectory, open_run
from alpaca_ray.config import BudgetConfig, GenerateConfig, LimitsConfig, Price, TeacherConfig
from alpaca_ray.provider.budget import Charge
from alpaca_ray.provider.gate import MIN_FAILED, Ask, Gate, Permit, Permits, Report
from alpaca_ray.provider.journal import Cost, Writer
from alpaca_ray.provider.limiter import LimitHeaders

JOURNAL = "generate/journal"
WORST = Charge(100, 100)
DOLLAR_A_TOKEN = Price(input_usd_per_million=1e6, output_usd_per_million=1e6)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return open_run(str(tmp_path), "run")


@pytest.fixture
def clock() -> Clock:
    return Clock()


def config(**changes: Any) -> GenerateConfig:
    teacher = TeacherConfig(price=DOLLAR_A_TOKEN, timeout_s=60.0, **changes.pop("teacher", {}))
    limits = changes.pop("limits", {"requests_per_minute": 6000})
    return GenerateConfig(num_instructions=1, teacher=teacher, limits=LimitsConfig(**limits), **changes)


def asks(*keys: str) -> list[Ask]:
    return [Ask(key, WORST.tokens, WORST) for key in keys]


def report(permit: Permit, error: str | None = None, tokens: int = 50, final: bool = True) -> Report:
    return Report(permit.lease_id, permit.key, error, Charge(tokens, 0), LimitHeaders(), final, "said so")


def granted(permits: Permits) -> list[str]:
    return [permit.key for permit in permits.granted]


def test_what_is_granted_is_settled_at_what_it_used(run: RunDirectory, clock: Clock) -> None:
    gate = Gate(config(), run, JOURNAL, clock=clock)
    permits = gate.acquire("one", asks("a", "b"))
    assert granted(permits) == ["a", "b"]
    assert gate.state().reserved_usd == 400.0
    gate.settle([report(permits.granted[0]), report(permits.granted[1], "server_error", final=False)])
    state = gate.state()
    assert (state.usd, state.reserved_usd, state.tokens) == (50.0, 0.0, 50)
    assert (state.answered, state.retried, state.failed) == (1, 1, 0)


def test_a_report_that_comes_twice_is_paid_once(run: RunDirectory, clock: Clock) -> None:
    """Ray makes calls again that were under way when an actor restarted."""
    gate = Gate(config(), run, JOURNAL, clock=clock)
    [permit] = gate.acquire("one", asks("a")).granted
    gate.settle([report(permit)])
    gate.settle([report(permit)])
    assert gate.state().usd == 50.0


def test_a_permit_given_back_costs_nothing(run: RunDirectory, clock: Clock) -> None:
    gate = Gate(config(), run, JOURNAL, clock=clock)
    gate.give_back(gate.acquire("one", asks("a")).granted)
    assert (gate.state().usd, gate.state().reserved_usd) == (0.0, 0.0)


def test_what_another_has_sent_is_looked_up_first(run: RunDirectory, clock: Clock) -> None:
    gate = Gate(config(), run, JOURNAL, clock=clock)
    gate.acquire("dead", asks("a"))
    permits = gate.acquire("alive", asks("a", "b"))
    assert (permits.replay, granted(permits)) == (("a",), ["b"])
    [looked_up] = asks("a")
    again = gate.acquire("alive", [Ask("a", looked_up.tokens, WORST, replayed=True)])
    assert granted(again) == ["a"]
    assert gate.state().usd == 200.0  # the dead one's request may have been billed: its worst case is spent


def test_a_sender_that_died_is_charged_when_its_lease_runs_out(run: RunDirectory, clock: Clock) -> None:
    gate = Gate(config(), run, JOURNAL, clock=clock)
    gate.acquire("dead", asks("a"))
    clock.now_s = 1000.0
    gate.acquire("alive", [])
    assert (gate.state().usd, gate.state().reserved_usd) == (200.0, 0.0)


def test_a_gate_come_back_waits_and_then_knows_what_was_sent(run: RunDirectory, clock: Clock) -> None:
    writer = Writer(run, JOURNAL)
    writer.sent("lost", Cost(200, 200.0))
    writer.failed("timed out", writer.sent("timed out", Cost(200, 200.0)), "timeout", Cost(200, 200.0))
    gate = Gate(config(), run, JOURNAL, restarted=True, clock=clock)
    early = gate.acquire("one", asks("new"))
    assert not early.granted
    assert early.retry_in_s > 0
    clock.now_s = early.retry_in_s
    writer.sent("sent meanwhile", Cost(200, 200.0))  # by a lease of the gate that died
    permits = gate.acquire("one", asks("new", "lost", "sent meanwhile"))
    assert (granted(permits), permits.replay) == (["new"], ("lost", "sent meanwhile"))
    assert gate.state().usd == 600.0


def test_a_budget_waits_for_what_is_in_flight_before_it_is_spent(run: RunDirectory, clock: Clock) -> None:
    gate = Gate(config(budget=BudgetConfig(max_usd=400.0)), run, JOURNAL, clock=clock)
    first = gate.acquire("one", asks("a", "b", "c"))
    assert granted(first) == ["a", "b"]
    assert (first.stopped, first.retry_in_s > 0) == (None, True)
    gate.settle([report(permit) for permit in first.granted])  # 100 dollars
    second = gate.acquire("one", asks("c", "d"))
    assert granted(second) == ["c"]
    gate.settle([report(permit, tokens=200) for permit in second.granted])
    third = gate.acquire("one", asks("d"))
    assert "generate.budget.max_usd=400" in str(third.stopped)
    assert gate.acquire("two", asks("e")).stopped == third.stopped


def test_an_error_that_all_would_meet_stops_the_run(run: RunDirectory, clock: Clock) -> None:
    gate = Gate(config(), run, JOURNAL, clock=clock)
    [permit] = gate.acquire("one", asks("a")).granted
    gate.settle([report(permit, "insufficient_quota")])
    assert gate.acquire("two", asks("b")).stopped == "the teacher refuses (insufficient_quota): said so"


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_failure_budget_is_a_share_of_what_has_ended(run: RunDirectory, clock: Clock, share: float) -> None:
    gate = Gate(config(max_failed_share=share), run, JOURNAL, clock=clock)
    for k in range(MIN_FAILED):
        assert gate.state().stopped is None
        permits = gate.acquire("one", asks(f"good {k}", f"bad {k}")).granted
        gate.settle([report(permits[0]), report(permits[1], "server_error")])
    assert (gate.state().stopped is not None) == (share < 0.5)


def test_silence_is_borne_only_so_long(run: RunDirectory, clock: Clock) -> None:
    gate = Gate(config(teacher={"max_wait_s": 100.0}, max_failed_share=1.0), run, JOURNAL, clock=clock)
    for now_s, stopped in ((0.0, False), (90.0, False), (101.0, True)):
        clock.now_s = now_s
        permits = gate.acquire("one", asks(f"at {now_s}")).granted
        gate.settle([report(permit, "rate_limit", final=False) for permit in permits])
        assert permits
        assert (gate.state().stopped is not None) == stopped


def test_a_request_that_no_window_holds_stops_the_run_with_the_remedy(run: RunDirectory, clock: Clock) -> None:
    gate = Gate(config(limits={"tokens_per_minute": 199}), run, JOURNAL, clock=clock)
    assert "generate.teacher.max_tokens" in str(gate.acquire("one", asks("a")).stopped)
