"""Workers, checkpoints and nodes killed under a training run: nothing is lost, repeated or half loaded.

`benchmarks/train_kills.py` makes more of each.
"""

from pathlib import Path

import pytest

from benchmarks.train_kills import NOTICE_S, RARE, kill_steps, kill_writers, lose_nodes, resize
from tests.faults.table import FaultRow
from tests.nodes import Nodes

# A checkpoint that was being written when a worker died is none: the one before it counts.
MAX_REPEATED_STEPS = 2 * int(RARE["checkpoint_every_steps"])


def test_no_kill_leaves_a_partial_checkpoint_to_be_chosen(tmp_path: Path) -> None:
    outcome = kill_writers(tmp_path, kills=5, seed=1)
    assert outcome.whole_loads == 6  # each try that followed a kill, and the first
    assert outcome.while_writing > 0
    assert outcome.left_behind == 0


def test_a_run_with_killed_workers_is_the_undisturbed_run(tmp_path: Path, fault_row: FaultRow) -> None:
    with Nodes(3, 2) as cluster:
        outcome = kill_steps(tmp_path, cluster, kills=1, seed=1)
    fault_row(
        "train worker",
        lost="nothing" if outcome.same_weights else "steps",
        repeated=f"{outcome.repeated_steps} steps, of {MAX_REPEATED_STEPS} since the last whole checkpoint",
        recovery_s=outcome.recovery_s[0],
        until="the next step",
    )
    assert outcome.kills == 1
    assert outcome.repeated_steps <= MAX_REPEATED_STEPS
    assert outcome.same_losses
    assert outcome.same_weights
    assert outcome.each_once
    assert outcome.unfinished == 0


@pytest.mark.slow_fault  # three runs; tests/distributed/test_train_ranks.py is the short form
def test_a_killed_run_goes_on_with_another_number_of_workers(tmp_path: Path) -> None:
    with Nodes(3, 2) as cluster:
        outcome = resize(tmp_path, cluster, num_examples=16, step=2)
    assert outcome.loss <= 1e-5
    assert outcome.weights <= 1e-5


@pytest.mark.slow_fault  # eleven workers start, one after the other: six minutes on two busy cores
def test_a_run_goes_on_without_a_node_and_grows_back(tmp_path: Path, fault_row: FaultRow) -> None:
    with Nodes(2, 2) as cluster:
        outcome = lose_nodes(tmp_path, cluster, is_taken=False)
    lost = "nothing" if outcome.each_once else "examples"
    repeated = f"{outcome.repeated_steps} steps, of {MAX_REPEATED_STEPS} since the last whole checkpoint"
    fault_row("train node", lost=lost, repeated=repeated, recovery_s=outcome.fewer_s, until="the next step, on fewer")
    in_time = f"0 steps, if the checkpoint comes in the {NOTICE_S:.0f} s of notice"
    saved_s = outcome.notice_to_checkpoint_s
    fault_row("preemption notice", lost=lost, repeated=in_time, recovery_s=saved_s, until="the checkpoint")
    assert outcome.repeated_steps <= MAX_REPEATED_STEPS
    assert outcome.each_once
    assert outcome.notice_to_checkpoint_s <= NOTICE_S
