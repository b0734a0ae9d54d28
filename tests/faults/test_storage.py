"""The storage is away for a minute of a generation: the run waits, and every answer that was paid for is filed.

About 100 s.
"""

import sys
import time
from pathlib import Path

import pytest

from alpaca_ray.artifacts import open_run
from alpaca_ray.provider.journal import FLUSH_S, STALL_S, records
from benchmarks.kills import MAX_IN_FLIGHT, Driver, job, paid, violations
from tests.faults.table import FaultRow
from tests.nodes import Nodes
from tests.referee.process import RefereeProcess
from tests.waiting import wait

AWAY_S = 60.0
REQUESTS_PER_MINUTE = 300
PATIENCE_S = 600.0


@pytest.mark.slow_fault
def test_a_storage_that_is_away_makes_a_run_late_and_costs_no_answer(tmp_path: Path, fault_row: FaultRow) -> None:
    flag = tmp_path / "away"
    answers = {"num_tasks": [2, 3], "latency_s": [0.1, 1.0]}
    with Nodes(3, 2) as cluster, RefereeProcess(answers=answers, ledger=str(tmp_path / "ledger.jsonl")) as referee:
        options = ("--generate.limits.requests-per-minute", str(REQUESTS_PER_MINUTE))
        plain = job(referee, tmp_path, 160, *options)
        command = [sys.executable, "-m", "tests.faults.away", str(flag), *plain[2:]]
        driver = Driver(command, cluster.environment, tmp_path / "log")
        wait(lambda: driver.finished() or referee.summary()["requests"] >= 20, "twenty requests")
        flag.touch()
        away_at = time.time()
        time.sleep(AWAY_S)
        flag.unlink()
        back_at = time.time()
        wait(driver.finished, "the end of the run", PATIENCE_S)
        ledger = paid(referee)
    late, twice = violations(ledger, filed := list(records(open_run(str(tmp_path), "kills"), "generate/journal")))
    answered = {record["completion"]["response_id"] for record in filed if record["kind"] == "answered"}
    unfiled = {entry["response_id"] for entry in ledger if entry["response_id"]} - answered
    repaid = len(ledger) - len({entry["key"] for entry in ledger})
    meanwhile = [entry for entry in ledger if away_at < entry["arrived_at"] < back_at]
    after_s = min(entry["arrived_at"] for entry in ledger if entry["arrived_at"] > back_at) - back_at
    fault_row(
        "storage unreachable",
        lost=f"{len(unfiled)} answers" if unfiled else "nothing",
        repeated=f"{repaid} requests; {len(meanwhile)} went out before the rest was held back",
        recovery_s=after_s,
        until="the next request, from the storage's return",
    )
    assert (late, twice, repaid, unfiled) == (0, 0, 0, set())
    # What is under way, and what goes out until a write counts as stalled.
    assert len(meanwhile) <= MAX_IN_FLIGHT + (FLUSH_S + STALL_S) * REQUESTS_PER_MINUTE / 60
