"""Engine replicas killed under the streams of clients.

`benchmarks/serve_kills.py` makes more of it; this is its short form, in a process of its own: the driver of a cluster
that no other test of this process may find.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.table import FaultRow

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 900

Rows = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    found = tmp_path_factory.mktemp("kills") / "found.json"
    command = [sys.executable, "-m", "benchmarks.serve_kills", "--quick", "--parts", "kills", "--out", str(found)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ran = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert found.stat().st_size, ran.stderr[-5000:]  # not stdout: there Ray tells of workers that died
    return {row["name"]: row for row in json.loads(found.read_text())["rows"]}


def test_streams_outlive_the_engine_that_gives_them(rows: Rows, fault_row: FaultRow) -> None:
    complete = rows["streams_complete"]["ours"] == 8
    fault_row(
        "serve replica",
        lost="nothing" if complete else "streams",
        repeated=f"the prompts of {rows['streams_resumed']['ours']} of 8 streams",
        recovery_s=rows["kill_to_next_replica_s"]["ours"],  # on a slow machine no stream's pause stands out
        until="the next replica; its streams go on at once at the other",
    )
    assert rows["kills_of_engines"]["ours"] == 1
    assert rows["streams_resumed"]["ours"] >= 1
    assert rows["streams_complete"]["ours"] == 8
    assert rows["greedy_streams_identical"]["ours"] == 4
    assert rows["seeded_streams_identical"]["ours"] == 4


def test_the_mark_holds_through_a_resume(rows: Rows) -> None:
    # The same tokens as of an undisturbed stream, that test says; and the detector finds the mark on it.
    assert rows["resumed_streams_marked"]["ours"] == ["marked", "marked"]


@pytest.mark.slow_fault
def test_the_loss_of_a_node_cuts_streams_at_most_and_loses_no_answer(tmp_path: Path, fault_row: FaultRow) -> None:
    out = tmp_path / "found.json"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "tests.faults.serve_node", str(out)]
    ran = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert ran.returncode == 0, ran.stderr[-5000:]
    found = json.loads(out.read_text())
    where = "with" if found["ingress_on_node"] else "without"
    fault_row(
        "serve node",
        lost="nothing" if found["same"] == 8 else "answers",
        repeated=f"{found['cut']} of 8 streams were cut and asked again (a node {where} the ingress)",
        recovery_s=found["recovery_s"],
        until="the next token of every stream",
    )
    assert found["engines_on_node"] == 1
    assert found["same"] == 8
    assert found["ingress_on_node"] or found["cut"] == 0
