"""A pipeline killed, and one stopped, submitted again: the run ends, no stage is made twice, nothing is left running.

Two blows to one run here; `benchmarks/pipeline_kills.py` deals ten, to drivers of stages too, and holds the files of
the runs against those of undisturbed ones.
"""

from pathlib import Path

import pytest

from benchmarks.pipeline_kills import trial


@pytest.mark.slow_fault  # five minutes on a busy machine; tests/unit/test_pipeline.py is the short form
def test_a_pipeline_that_is_killed_and_stopped_ends_and_repeats_nothing(tmp_path: Path, tiny_model: Path) -> None:
    rows = {row["name"]: row for row in trial(tmp_path, str(tiny_model), ["pipeline", "stop"], seed=0, num_quiet=0)}
    assert [row for row in rows.values() if not row["holds"]] == []
    assert rows["kills"]["pipelines"] == 3
