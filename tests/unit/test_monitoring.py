"""Dashboards and alerts ask for metrics that the code makes, and have their fields, tests and runbook pages."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.util.metrics import Counter, Histogram, Metric

from alpaca_ray.generate import dataset
from alpaca_ray.provider import gate_actor
from alpaca_ray.serve.engine_metrics import Counts, MeteredEngine
from alpaca_ray.serve.monitor import Monitor
from alpaca_ray.train import worker
from tests.scripted import ScriptedEngine

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "deploy" / "monitoring"
DASHBOARDS = sorted((MONITORING / "grafana").glob("*.json"))
NAME = re.compile(r"\bray_\w+")
# What Grafana needs to show a dashboard, and its panels (its JSON model, "Dashboard JSON model").
BOARD_FIELDS = {"uid", "title", "schemaVersion", "panels", "time", "refresh", "templating", "annotations"}
PANEL_FIELDS = {"id", "type", "title", "description", "datasource", "gridPos", "fieldConfig", "options", "targets"}


def exported() -> set[str]:
    """The names as Ray's exporter has them: a prefix, and a suffix by kind."""
    names = {f"ray_alpaca_ray_generate_{name}" for name in gate_actor._METRICS}
    names |= {f"ray_alpaca_ray_train_{name}" for name in worker.GAUGES}
    for metric in made():
        name = f"ray_{metric.info['name']}"
        if isinstance(metric, Histogram):
            names |= {f"{name}_{part}" for part in ("bucket", "sum", "count")}
        else:
            names.add(f"{name}_total" if isinstance(metric, Counter) else name)
    return names


def made() -> Iterator[Metric]:
    """All that these objects hold."""

    def no_stats() -> Counts:
        raise AssertionError("nobody reports here")

    for owner in (dataset.gauges(), vars(Monitor()), vars(MeteredEngine(ScriptedEngine([]), no_stats, True))):
        for value in owner.values():
            yield from (m for m in (value.values() if isinstance(value, dict) else [value]) if isinstance(m, Metric))


def rules() -> list[dict[str, Any]]:
    parsed = yaml.safe_load((MONITORING / "alerts.yml").read_text(encoding="utf-8"))
    return [rule for group in parsed["groups"] for rule in group["rules"]]


def panels(path: Path) -> list[dict[str, Any]]:
    board: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return list(board["panels"])


def test_every_query_names_a_metric_that_the_code_makes() -> None:
    known = exported()
    queries = [target["expr"] for path in DASHBOARDS for panel in panels(path) for target in panel["targets"]]
    queries += [rule["expr"] for rule in rules()]
    for query in queries:
        assert NAME.findall(query), query
        assert set(NAME.findall(query)) <= known, query


def test_there_are_three_dashboards_with_what_each_must_show() -> None:
    shown = {path.stem: " ".join(t["expr"] for p in panels(path) for t in p["targets"]) for path in DASHBOARDS}
    must = {
        "generation": ["requests_per_minute", "requests_limit", "kept", "rejects", "usd"],
        "training": ["loss", "tokens_per_s", "mfu", "checkpoint_stall_s"],
        "serving": ["request_s_bucket", "waiting", "refusal", "verdicts_total"],
    }
    assert set(shown) == set(must)
    for name, parts in must.items():
        assert not [part for part in parts if part not in shown[name]]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_has_the_fields_that_grafana_needs(path: Path) -> None:
    board = json.loads(path.read_text(encoding="utf-8"))
    assert board.keys() >= BOARD_FIELDS
    assert [variable["type"] for variable in board["templating"]["list"]] == ["datasource"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    places = set()
    for panel in board["panels"]:
        assert panel.keys() >= PANEL_FIELDS
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= 24
        places.add((grid["x"], grid["y"]))
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    assert len(places) == len(board["panels"])


def test_every_alert_has_a_page_in_the_runbook_and_a_test_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    pages = re.findall(r"^### (\w+)$", (ROOT / "docs" / "operations.md").read_text(encoding="utf-8"), re.MULTILINE)
    tests = yaml.safe_load((MONITORING / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    assert pages
    for rule in rules():
        name = rule["alert"]
        assert name in pages
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
        assert {bool(case.get("exp_alerts")) for case in cases if case["alertname"] == name} == {True, False}
    assert {page for page in pages if page.startswith("Alpaca")} == {rule["alert"] for rule in rules()}


@pytest.mark.parametrize(
    "command",
    [["check", "config", "prometheus.yml"], ["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]],
)
def test_promtool_has_no_complaint(command: list[str]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt install prometheus)")
    done = subprocess.run([promtool, *command], cwd=MONITORING, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_promtool_parses_every_query(path: Path, tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt install prometheus)")
    queries = [target["expr"] for panel in panels(path) for target in panel["targets"]]
    recorded = [{"record": f"panel:{k}", "expr": query} for k, query in enumerate(queries)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": recorded}]}))
    done = subprocess.run(
        [promtool, "check", "rules", "rules.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
