"""Every failure of a provider has its outcome: stop at once, wait, try again, or record and go on. Never a text.

The referee is a real HTTP server in a process of its own; gate, senders and journal are the real ones, without Ray.
"""

import asyncio
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from alpaca_ray.artifacts import RunDirectory, open_run
from alpaca_ray.config import BudgetConfig, GenerateConfig, LimitsConfig, Price, TeacherConfig
from alpaca_ray.provider.gate import Ask, Gate, Permit, Permits, Report
from alpaca_ray.provider.journal import Journal
from alpaca_ray.provider.request import Request
from alpaca_ray.provider.sender import NOT_ASKED, Sender
from alpaca_ray.schema import Completion
from tests.referee.process import RefereeProcess

JOURNAL = "generate/journal"
PRICE = Price(input_usd_per_million=1.5, output_usd_per_million=2.0)  # the referee's
NUM_REQUESTS = 24


class LocalGate:
    """The gate without an actor around it."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    async def acquire(self, owner: str, asks: Sequence[Ask]) -> Permits:
        return self.gate.acquire(owner, asks)

    async def give_back(self, permits: Sequence[Permit]) -> None:
        self.gate.give_back(permits)

    async def settle(self, reports: Sequence[Report]) -> None:
        self.gate.settle(reports)

    async def stop(self, reason: str) -> None:
        self.gate.stop(reason)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RefereeProcess]:
    ledger = tmp_path_factory.mktemp("referee") / "ledger.jsonl"
    with RefereeProcess(ledger=str(ledger)) as referee:
        yield referee


@pytest.fixture
def referee(process: RefereeProcess) -> RefereeProcess:
    process.configure(limits={"requests_per_minute": None, "tokens_per_minute": None}, faults=[])
    process.reset()
    return process


def settings(referee: RefereeProcess, **changes: Any) -> GenerateConfig:
    teacher = {
        "model": "gpt-3.5-turbo-instruct", "base_url": referee.base_url, "max_tokens": 200, "timeout_s": 1.0,
        "price": PRICE,
    }  # fmt: skip
    teacher |= changes.pop("teacher", {})
    return GenerateConfig(
        num_instructions=1, concurrent_requests_per_actor=4, teacher=TeacherConfig(**teacher), **changes
    )


def run_of(tmp_path: Path) -> RunDirectory:
    return open_run(str(tmp_path), "run")


def requests(number: int = NUM_REQUESTS) -> list[Request]:
    return [Request(f"Write tasks.\n###\n1. Instruction:{k}", seed=k, stop="\n9. Instruction:") for k in range(number)]


def answer(
    config: GenerateConfig, run: RunDirectory, asked: Sequence[Request], gate: Gate | None = None
) -> tuple[list[Completion], Gate]:
    gate = gate or Gate(config, run, JOURNAL)

    async def all_at_once() -> list[Completion]:
        sender = Sender(config, str(config.teacher.base_url), LocalGate(gate), (run, JOURNAL))
        found = await asyncio.gather(*(sender.answer(request) for request in asked))
        await sender.close()
        return [completion for _, completion in found]

    return asyncio.run(all_at_once()), gate


def texts(completions: Sequence[Completion]) -> list[str | None]:
    return [completion.text for completion in completions]


def test_every_request_is_answered_once_and_filed(referee: RefereeProcess, tmp_path: Path) -> None:
    config, run = settings(referee), run_of(tmp_path)
    completions, gate = answer(config, run, requests())
    assert all(completion.text for completion in completions)
    ledger = referee.ledger()
    assert len(ledger) == NUM_REQUESTS
    spent = Journal(run, JOURNAL).spent
    assert spent.usd == pytest.approx(sum(entry["usd"] for entry in ledger))
    assert gate.state().usd == pytest.approx(spent.usd)
    assert gate.state().reserved_usd == 0.0


def test_what_is_in_the_journal_is_never_asked_again(referee: RefereeProcess, tmp_path: Path) -> None:
    """Another sender, the same gate: as when an actor has died and its block runs again. Then a gate come back."""
    config, run = settings(referee), run_of(tmp_path)
    first, gate = answer(config, run, requests())
    again, _ = answer(config, run, requests(), gate)
    restarted, _ = answer(config, run, requests(), Gate(config, run, JOURNAL, restarted=True))
    assert first == again == restarted
    assert len(referee.ledger()) == NUM_REQUESTS


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("unauthorized", "authentication"),
        ("forbidden", "authentication"),
        ("model_not_found", "model_not_found"),
        ("insufficient_quota", "insufficient_quota"),
        ("wrong_model", "wrong_model"),
    ],
)
def test_what_no_waiting_mends_stops_the_run_at_once(
    referee: RefereeProcess, tmp_path: Path, kind: str, error: str
) -> None:
    referee.configure(faults=[{"kind": kind, "every": 1}])
    completions, gate = answer(settings(referee), run_of(tmp_path), requests())
    assert texts(completions) == [None] * NUM_REQUESTS
    assert {completion.error for completion in completions} == {error, NOT_ASKED}
    stopped = gate.state().stopped
    assert stopped is not None
    assert error in stopped
    assert len(referee.ledger()) <= 4  # those that were under way together


@pytest.mark.parametrize("retry_after_s", [1.0, None])
def test_a_429_is_waited_out_by_all(referee: RefereeProcess, tmp_path: Path, retry_after_s: float | None) -> None:
    fault = {"kind": "rate_limited", "first": 1} | ({} if retry_after_s is None else {"retry_after_s": retry_after_s})
    referee.configure(faults=[fault])
    completions, _ = answer(settings(referee), run_of(tmp_path), requests())
    assert all(texts(completions))
    refused, after, *_ = referee.ledger()
    assert refused["status"] == 429
    if retry_after_s is not None:
        assert after["arrived_s"] - refused["finished_s"] >= retry_after_s


@pytest.mark.parametrize(
    "kind",
    ["server_error", "unavailable", "timeout", "reset", "reset_in_body", "slow_body", "truncated_json", "short_body",
     "empty_choices", "null_text", "login_page"],
)  # fmt: skip
def test_what_passes_is_tried_again(referee: RefereeProcess, tmp_path: Path, kind: str) -> None:
    seeds = [3, 11]
    referee.configure(faults=[{"kind": kind, "seeds": seeds, "attempts": 1, "duration_s": 5.0}])
    config, run = settings(referee), run_of(tmp_path)
    completions, gate = answer(config, run, requests())
    assert all(texts(completions))
    assert gate.state().retried == len(seeds)
    assert len(referee.ledger()) == NUM_REQUESTS + len(seeds)
    billed_usd = sum(entry["usd"] for entry in referee.ledger())
    assert Journal(run, JOURNAL).spent.usd >= billed_usd - 1e-12  # what may have been billed counts


@pytest.mark.parametrize("kind", ["content_filter", "content_filter_refusal"])
def test_a_filtered_answer_is_recorded_and_the_run_goes_on(referee: RefereeProcess, tmp_path: Path, kind: str) -> None:
    referee.configure(faults=[{"kind": kind, "seeds": [5]}])
    config, run = settings(referee), run_of(tmp_path)
    completions, gate = answer(config, run, requests())
    assert [k for k, completion in enumerate(completions) if completion.error == "content_filter"] == [5]
    assert sum(completion.text is not None for completion in completions) == NUM_REQUESTS - 1
    assert gate.state().stopped is None
    again, _ = answer(config, run, requests(), Gate(config, run, JOURNAL))
    assert again == completions
    assert len(referee.ledger()) == NUM_REQUESTS


def test_a_run_that_goes_bad_is_stopped_by_its_failure_budget(referee: RefereeProcess, tmp_path: Path) -> None:
    referee.configure(faults=[{"kind": "server_error", "seeds": list(range(12, NUM_REQUESTS))}])
    config = settings(referee, teacher={"max_attempts": 1})
    completions, gate = answer(config, run_of(tmp_path), requests())
    assert "generate.max_failed_share" in str(gate.state().stopped)
    assert {completion.error for completion in completions[12:]} <= {"server_error", NOT_ASKED}
    assert all(texts(completions[:4]))


def test_an_outage_is_waited_out_only_so_long(referee: RefereeProcess, tmp_path: Path) -> None:
    referee.configure(faults=[{"kind": "unavailable", "every": 1}])
    config = settings(referee, teacher={"max_wait_s": 0.01}, max_failed_share=1.0)
    completions, gate = answer(config, run_of(tmp_path), requests())
    assert not any(texts(completions))
    assert "generate.teacher.max_wait_s" in str(gate.state().stopped)


def test_the_limit_is_kept_and_no_429_is_seen(referee: RefereeProcess, tmp_path: Path) -> None:
    limits = {"requests_per_minute": 60, "tokens_per_minute": None, "window_s": 6.0}
    referee.configure(limits=limits)
    config = settings(referee, limits=LimitsConfig(**limits))
    completions, _ = answer(config, run_of(tmp_path), requests())
    referee.configure(limits={"window_s": 60.0})
    assert all(texts(completions))
    assert {entry["status"] for entry in referee.ledger()} == {200}


@pytest.mark.parametrize("max_usd", [0.0, *(random.Random(k).uniform(0.0005, 0.006) for k in range(19))])
def test_spent_never_exceeds_the_budget_and_a_higher_one_repays_nothing(
    referee: RefereeProcess, tmp_path: Path, max_usd: float
) -> None:
    run = run_of(tmp_path)
    limits = LimitsConfig(requests_per_minute=1000, window_s=6.0)  # a gate waits for the one before it, 0.2 s here
    completions, gate = answer(settings(referee, limits=limits, budget=BudgetConfig(max_usd=max_usd)), run, requests())
    assert sum(entry["usd"] for entry in referee.ledger()) <= max_usd
    assert "generate.budget.max_usd" in str(gate.state().stopped)
    assert NOT_ASKED in {completion.error for completion in completions}
    config = settings(referee, limits=limits, budget=BudgetConfig(max_usd=1.0))
    completions, _ = answer(config, run, requests(), Gate(config, run, JOURNAL))
    assert all(texts(completions))
    assert len(referee.ledger()) == NUM_REQUESTS
    assert referee.summary()["duplicates"] == {}


def test_a_journal_that_cannot_be_written_stops_the_run(referee: RefereeProcess, tmp_path: Path) -> None:
    class FullDisk:
        gather_s = 0.0

        def append(self, data: bytes) -> None:
            raise OSError(28, "No space left on device")

        write_durably = append

    config, run = settings(referee), run_of(tmp_path)
    gate = Gate(config, run, JOURNAL)

    async def ask() -> Completion:
        sender = Sender(config, referee.base_url, LocalGate(gate), (run, JOURNAL))
        sender._writer._sink = FullDisk()
        _, completion = await sender.answer(requests(1)[0])
        await sender.close()
        return completion

    completion = asyncio.run(ask())
    assert completion.text is None
    assert "No space left" in str(gate.state().stopped)
    assert referee.ledger() == []
