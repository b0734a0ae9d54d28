"""Workers, checkpoints and nodes killed under a training run: nothing is lost, repeated or half loaded.

`benchmarks/train_kills.py` makes more of each.
"""

from pathlib import Path

from benchmarks.train_kills import NOTICE_S, kill_steps, kill_writers, lose_nodes
from tests.nodes import Nodes


def test_no_kill_leaves_a_partial_checkpoint_to_be_chosen(tmp_path: Path) -> None:
    outcome = kill_writers(tmp_path, kills=5, seed=1)
    assert outcome.whole_loads == 6  # each try that followed a kill, and the first
    assert outcome.while_writing > 0
    assert outcome.left_behind == 0


def test_a_run_with_killed_workers_is_the_undisturbed_run(tmp_path: Path) -> None:
    with Nodes(3, 2) as cluster:
        outcome = kill_steps(tmp_path, cluster, kills=1, seed=1)
    assert outcome.kills == 1
    assert outcome.same_losses
    assert outcome.same_weights
    assert outcome.each_once
    assert outcome.unfinished == 0
    assert outcome.other_size_loss <= 1e-5
    assert outcome.other_size_weights <= 1e-5


def test_a_run_goes_on_without_a_node_and_grows_back(tmp_path: Path) -> None:
    with Nodes(2, 2) as cluster:
        outcome = lose_nodes(tmp_path, cluster, is_taken=False)
    assert outcome.each_once
    assert outcome.notice_to_checkpoint_s <= NOTICE_S
