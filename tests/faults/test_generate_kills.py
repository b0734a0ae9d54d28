"""Driver, generation actor, limiter and node killed over one run: nothing is paid for twice, nothing is lost.

Four kills here; `benchmarks/kills.py` makes fifty.
"""

from pathlib import Path

from benchmarks.kills import TARGETS, trial


def test_a_run_survives_the_loss_of_each_of_its_processes(tmp_path: Path) -> None:
    outcome = trial(tmp_path, ["actor", "limiter", "node", "driver"], seed=0)
    assert dict(outcome.kills) == dict.fromkeys(TARGETS, 1)
    assert outcome.driver_starts == 2
    assert outcome.late == 0
    assert outcome.twice == 0
    assert outcome.refused == 0
    # What was sent counts as in flight from just before it went out.
    assert outcome.paid - outcome.needed <= outcome.counted
    assert outcome.same_dataset
