"""`alpaca-ray runs`: what is in the run directories, and no cluster."""

import json
from pathlib import Path

import pytest
import yaml

from alpaca_ray import cli
from alpaca_ray.artifacts import RunDirectory, begin_stage, open_run
from alpaca_ray.cluster import ledger
from alpaca_ray.cluster.ledger import Attempt
from alpaca_ray.cluster.runs import states
from alpaca_ray.config import UserError
from alpaca_ray.settings import load_config

ROOT = Path(__file__).parents[2]
NOW_S = 1_795_000_000.0


def manifest(counts: dict[str, object]) -> dict[str, object]:
    return {"counts": counts, "wall_time_s": 12.5, "finished_at": "2026-11-23T12:34:56+00:00"}


def attempt(stage: str, state: ledger.State, seen_s: float = NOW_S, **known: object) -> Attempt:
    values = {"stage": stage, "number": 1, "submission_id": f"{stage}-0-1", "started_s": NOW_S - 100}
    return Attempt.model_validate(values | {"state": state, "seen_s": seen_s} | known)


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    first = open_run(str(tmp_path), "first")
    first.write_json("generate/manifest.json", manifest({"kept": 40, "requests": 24, "usd": 1.234567, "reasons": {}}))
    ledger.put(first, attempt("train", "failed", reason="the driver was killed by SIGKILL"))
    second = open_run(str(tmp_path), "second")
    second.write_bytes("config.yaml", yaml.safe_dump({"begun": {"generate": {}}}).encode())
    open_run(str(tmp_path), "no_run").write_bytes("config.yaml", b"of: something else")
    (tmp_path / "a_file").touch()
    return tmp_path


def by_stage(storage_path: str) -> dict[tuple[str, str], str]:
    return {(state.run, state.stage): state.state for state in states(storage_path, NOW_S)}


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_every_run_and_nothing_else_is_listed(storage: Path, prefix: str) -> None:
    assert by_stage(f"{prefix}{storage}") == {
        ("first", "generate"): "done", ("first", "train"): "failed", ("first", "evaluate"): "not begun",
        ("second", "generate"): "begun", ("second", "train"): "not begun", ("second", "evaluate"): "not begun",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("known", "state"),
    [
        (attempt("train", "running"), "running"),
        (attempt("train", "running", NOW_S - ledger.SILENT_AFTER_S - 1), "lost"),
        (attempt("train", "stopped"), "stopped"),
        (attempt("train", "lost"), "lost"),
        (attempt("train", "succeeded"), "failed"),  # without a manifest
    ],
)
def test_a_stage_that_is_not_done_is_as_the_ledger_has_it(storage: Path, known: Attempt, state: str) -> None:
    ledger.put(open_run(str(storage), "first"), known)
    assert by_stage(str(storage))["first", "train"] == state


def test_a_manifest_says_more_than_the_ledger(storage: Path) -> None:
    run: RunDirectory = open_run(str(storage), "first")
    run.write_json("train/manifest.json", manifest({"steps": 8}))
    assert by_stage(str(storage))["first", "train"] == "done"


def test_the_table_has_a_line_a_stage_and_json_has_all(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", str(storage)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "stage", "state", "counts", "usd", "when", "where"]
    assert lines[1].split() == [
        "first", "generate", "done", "kept", "40,", "requests", "24", "1.23", "2026-11-23", "12:34Z",
        f"{storage}/first/generate",
    ]  # fmt: skip
    assert "the driver was killed by SIGKILL" in lines[2]
    assert len(lines) == 7

    assert cli.main(["runs", str(storage), "--json"]) == 0
    [first, *_] = json.loads(capsys.readouterr().out)
    assert first["counts"] == {"kept": 40, "requests": 24, "usd": 1.234567, "reasons": {}}
    assert first["usd"] == 1.234567


def test_what_a_run_did_cost_is_told_on_the_nodes_of_a_cluster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(["--recipe", "alpaca_7b", "--name", "r", "--storage-path", str(tmp_path)])
    run = open_run(str(tmp_path), "r")
    begin_stage(run, config, "generate", {})
    run.write_json("generate/manifest.json", {"stage": "generate", **manifest({"usd": 37.5}), "wall_time_s": 7200})
    prices = tmp_path / "prices.yaml"
    prices.write_text(
        "{region: here, read: 2026-01-01, source: a test, instances: "
        "{m6i.2xlarge: {on_demand_usd_per_hour: 0.5, spot_usd_per_hour: 0.25}}}"
    )

    assert cli.main(["runs", str(tmp_path), "--cluster", str(ROOT / "cluster.yaml"), "--prices", str(prices)]) == 0

    [row] = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("generate")]
    nodes = int(row[1])
    assert row[2:] == ["x", "m6i.2xlarge", "2.00", f"${nodes * 1:.2f}", f"${nodes * 0.5:.2f}*", "$37.50"]


def test_a_run_on_this_machine_cost_nothing_on_a_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(["--recipe", "tiny_cpu", "--name", "r", "--storage-path", str(tmp_path)])
    run = open_run(str(tmp_path), "r")
    begin_stage(run, config, "generate", {})
    run.write_json("generate/manifest.json", {"stage": "generate", **manifest({"usd": 0.0})})
    assert cli.main(["runs", str(tmp_path), "--cluster", str(ROOT / "cluster.yaml")]) == 0
    assert "select no group" in capsys.readouterr().out


def test_no_runs_are_no_error_and_a_wrong_path_is(tmp_path: Path) -> None:
    assert states(str(tmp_path / "none"), NOW_S) == []
    with pytest.raises(UserError, match="cannot be opened"):
        states("nowhere://x", NOW_S)
