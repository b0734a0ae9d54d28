"""Driver, generation actor, limiter and node killed over one run: nothing is paid for twice, nothing is lost.

Four kills here; `benchmarks/kills.py` makes fifty.
"""

from pathlib import Path

from benchmarks.kills import MAX_IN_FLIGHT, TARGETS, trial
from tests.faults.table import FaultRow

NAMES = {"actor": "generation actor", "limiter": "limiter", "node": "generation node", "driver": "driver"}


def test_a_run_survives_the_loss_of_each_of_its_processes(tmp_path: Path, fault_row: FaultRow) -> None:
    outcome = trial(tmp_path, ["actor", "limiter", "node", "driver"], seed=0)
    for target, after in outcome.after.items():
        fault_row(
            NAMES[target],
            lost="nothing" if outcome.same_dataset else "rows",
            repeated=f"{after.repaid} requests, of {MAX_IN_FLIGHT} that may be in flight",
            recovery_s=after.silence_s,
            until="longest silence at the teacher",
        )
    assert dict(outcome.kills) == dict.fromkeys(TARGETS, 1)
    assert outcome.driver_starts == 2
    assert outcome.late == 0
    assert outcome.twice == 0
    assert outcome.refused == 0
    # What was sent counts as in flight from just before it went out.
    assert outcome.paid - outcome.needed <= outcome.counted
    assert all(after.repaid <= MAX_IN_FLIGHT for after in outcome.after.values())
    assert outcome.same_dataset
