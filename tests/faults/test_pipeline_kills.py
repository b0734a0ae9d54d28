"""A pipeline killed, and one stopped, submitted again: the same artifacts, no stage twice, nothing left running.

Two blows here; `benchmarks/pipeline_kills.py` deals ten, to drivers of stages too.
"""

from pathlib import Path

from benchmarks.pipeline_kills import trial


def test_a_pipeline_that_is_killed_and_stopped_ends_as_one_that_is_not(tmp_path: Path, tiny_model: Path) -> None:
    rows = trial(tmp_path, str(tiny_model), ["pipeline", "stop"], seed=0, num_quiet=1)
    assert [row for row in rows if not row["holds"]] == []
