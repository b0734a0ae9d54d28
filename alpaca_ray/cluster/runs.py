"""`alpaca-ray runs`: what the run directories of a storage path say of themselves. It asks no cluster."""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from alpaca_ray.artifacts import RunDirectory, open_runs
from alpaca_ray.cluster import ledger, pricing
from alpaca_ray.config import STAGES, RunConfig, explain

# "begun" without a pipeline: nobody has written down whether it runs. "lost": it ran, and nobody has seen it since.
State = Literal["done", "running", "failed", "stopped", "lost", "begun", "not begun"]
# Of each stage, what fits in a line; --json has all.
SHOWN = {
    "generate": ("kept", "rejected", "requests"),
    "train": ("examples", "steps", "last_loss"),
    "evaluate": ("responses", "heldout_loss_before", "heldout_loss_after"),
}
HEADINGS = ("run", "stage", "state", "counts", "usd", "when", "where")


@dataclass(frozen=True)
class StageState:
    """One stage of one run. `at_s`: Unix time of its end, or of the last that is known of it."""

    run: str
    stage: str
    state: State
    where: str
    attempts: int  # of the pipeline
    at_s: float | None = None
    wall_time_s: float | None = None
    counts: Mapping[str, Any] | None = None
    usd: float | None = None
    reason: str | None = None


def states(storage_path: str, now_s: float) -> list[StageState]:
    """All stages of all runs there. Raises UserError for a path that cannot be opened."""
    return [state for run in open_runs(storage_path) for state in _of_run(run, now_s)]


def render(states: Sequence[StageState]) -> str:
    """Plain columns."""
    rows = [HEADINGS, *(_row(state) for state in states)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def to_json(states: Sequence[StageState]) -> str:
    """A JSON list, one object a stage."""
    return json.dumps([asdict(state) for state in states], indent=2, ensure_ascii=False)


def costs(storage_path: str, cluster: Path, prices: Path | None) -> str:
    """What each run there did cost on the groups of a cluster.yaml, as far as its stages are done.

    Raises UserError for a path that cannot be opened, and for a wrong cluster.yaml or price table.
    """
    table, (groups, _) = pricing.load_prices(prices), pricing.load_groups(cluster)
    return "\n\n".join(
        f"{run.root.rpartition('/')[2]}\n{_cost(run, groups, table)}"
        for run in open_runs(storage_path)
        if any(run.exists(f"{stage}/manifest.json") for stage in STAGES)
    )


def _cost(run: RunDirectory, groups: Mapping[str, pricing.Group], prices: pricing.Prices) -> str:
    try:
        config = RunConfig.model_validate(yaml.safe_load(run.read_bytes("config.yaml"))["config"])
    except ValidationError as error:
        return explain(error, run.path("config.yaml"), RunConfig)
    paths = [f"{stage}/manifest.json" for stage in STAGES]
    manifests = [run.read_json(path) for path in paths if run.exists(path)]
    spent = pricing.cost_of(manifests, config, groups, prices)
    return pricing.render_spent(spent, prices) if spent else "its stages select no group: it cost nothing on a cluster"


def _of_run(run: RunDirectory, now_s: float) -> list[StageState]:
    """Empty for a directory that is no run's."""
    config = yaml.safe_load(run.read_bytes("config.yaml")) if run.exists("config.yaml") else {}
    begun = config.get("begun", {}) if isinstance(config, dict) else {}
    known = ledger.read(run)
    found = [_of_stage(run, stage, stage in begun, known, now_s) for stage in STAGES]
    return found if any(state.state != "not begun" for state in found) else []


def _of_stage(run: RunDirectory, stage: str, is_begun: bool, known: ledger.Ledger, now_s: float) -> StageState:
    where = run.place(stage)
    attempts = sum(attempt.stage == stage for attempt in known.attempts)
    name = run.root.rpartition("/")[2]
    if run.exists(f"{stage}/manifest.json"):
        manifest = run.read_json(f"{stage}/manifest.json")
        at_s = datetime.datetime.fromisoformat(manifest["finished_at"]).timestamp()
        counts = manifest["counts"]
        took_s = manifest["wall_time_s"]
        return StageState(name, stage, "done", where, attempts, at_s, took_s, counts, counts.get("usd"))
    last = known.last(stage)
    if last is None:
        return StageState(name, stage, "begun" if is_begun else "not begun", where, attempts)
    at_s = last.ended_s or last.seen_s
    return StageState(name, stage, _unfinished(last, now_s), where, attempts, at_s, usd=last.usd, reason=last.reason)


def _unfinished(last: ledger.Attempt, now_s: float) -> State:
    if last.state == "running":
        return "running" if now_s - last.seen_s <= ledger.SILENT_AFTER_S else "lost"
    return "failed" if last.state == "succeeded" else last.state  # it ended well and left no manifest


def _row(state: StageState) -> tuple[str, ...]:
    counts = state.counts or {}
    shown = ", ".join(f"{name} {counts[name]}" for name in SHOWN[state.stage] if name in counts) or (state.reason or "")
    usd = "" if state.usd is None else f"{state.usd:.2f}"
    at = None if state.at_s is None else datetime.datetime.fromtimestamp(state.at_s, datetime.UTC)
    when = "" if at is None else at.strftime("%Y-%m-%d %H:%MZ")
    return (state.run, state.stage, state.state, shown, usd, when, state.where)
