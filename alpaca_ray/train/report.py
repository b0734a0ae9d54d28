"""The page for people: how training went, step by step, and with what settings.

One file without scripts, fonts or images from elsewhere. The charts are inline SVG (curves.py), so its size does not
depend on the number of steps.
"""

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from alpaca_ray.train.curves import Chart, Curve, Point, draw, number, smoothed

BLUE, ORANGE, GREEN = 0, 1, 2
SMOOTHED_FROM_STEPS = 20  # a shorter curve is read as it is
SMOOTHING_SHARE = 0.02  # of all steps, before and after each: what the eye would do
END_SHARE = 0.05  # of all steps: the loss at the end is their mean, for batches differ
MAX_TABLE_ROWS = 24

Row = Mapping[str, Any]


def render(rows: Sequence[Row], facts: Mapping[str, Mapping[str, object]], title: str = "Training") -> str:
    """The whole page as HTML.

    `rows`: one of each step of metrics.jsonl, by `step`; a field that is missing, None or no finite number is left
    out of its chart, and a chart without a value out of the page. `facts`: heading -> name -> value, such as the
    settings and the counts; values of any kind that JSON knows.
    """
    environment = Environment(
        loader=PackageLoader("alpaca_ray", "train"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["shown"] = shown
    return environment.get_template("report.html.jinja").render(
        title=title, totals=totals(rows), charts=charts(rows), heldout=heldout_table(rows), facts=facts
    )


def totals(rows: Sequence[Row]) -> dict[str, str]:
    """Name -> figure, for the top of the page."""
    found = {"steps": f"{len(rows):,}"}
    training, heldout = series(rows, "loss"), series(rows, "heldout_loss")
    if training:
        found["training loss at the end"] = f"{at_the_end(training):.4f}"
    if heldout:
        found["held-out loss at the end"] = f"{heldout[-1][1]:.4f}"
    seconds = math.fsum(y for _, y in series(rows, "step_time_s"))
    if seconds > 0:
        found["useful tokens/s"] = number(round(num_tokens(rows) / seconds, 1))
        found["in steps"] = str(datetime.timedelta(seconds=round(seconds)))
    memory = series(rows, "memory_gb")
    if memory:
        found["GB at most on a worker"] = number(max(y for _, y in memory))
    return found


def num_tokens(rows: Sequence[Row]) -> float:
    """Tokens of prompts and answers that were trained on."""
    both = [row for row in rows if is_number(row.get("tokens_per_s")) and is_number(row.get("step_time_s"))]
    return math.fsum(row["tokens_per_s"] * row["step_time_s"] for row in both)


def charts(rows: Sequence[Row]) -> list[Markup]:
    """Those that have something to show, the loss first and largest."""
    return [draw(chart) for chart in planned(rows) if any(curve.points for curve in chart.curves)]


def planned(rows: Sequence[Row]) -> list[Chart]:
    """Every chart there may be."""
    share = [(step, 100 * mfu) for step, mfu in series(rows, "mfu")]
    return [
        loss_chart(rows),
        Chart("rate", "Learning rate", "", [Curve("learning rate", BLUE, series(rows, "learning_rate"))]),
        Chart("norm", "Gradient norm", "", [Curve("norm", BLUE, series(rows, "grad_norm"))], note="Before clipping."),
        speed_chart(rows),
        Chart("mfu", "Model FLOP utilization", "%", [Curve("MFU", BLUE, share)],
              note="Of the stated peak; recomputed activations and padding are no useful work."),
        Chart("time", "Time of a step", "s", [Curve("step", BLUE, series(rows, "step_time_s"))]),
        Chart("still", "Standing still", "s", [Curve("data", BLUE, waits(rows, "data_wait_s")),
              Curve("checkpoint", ORANGE, waits(rows, "checkpoint_stall_s"))],
              note="Waiting for examples, and for a checkpoint to be copied or finished."),
        Chart("memory", "Memory of a worker", "GB", [Curve("memory", BLUE, series(rows, "memory_gb"))],
              note="The most so far."),
        Chart("workers", "Workers", "", [Curve("workers", BLUE, changes(series(rows, "num_workers")))]),
    ]  # fmt: skip


def loss_chart(rows: Sequence[Row]) -> Chart:
    """Training loss, smoothed where it is long enough, and held-out loss."""
    each, heldout = series(rows, "loss"), series(rows, "heldout_loss")
    curves = [Curve("training", BLUE, each)]
    if len(each) >= SMOOTHED_FROM_STEPS:
        curves = [Curve("each step", BLUE, each, faint=True), Curve("training, smoothed", BLUE, smooth(each))]
    curves.append(Curve("held-out", ORANGE, heldout))
    return Chart("loss", "Loss", "nats per target token", curves, from_zero=False, width=860, height=320)


def speed_chart(rows: Sequence[Row]) -> Chart:
    """Tokens of examples a second, and with the padding, where there was some."""
    useful = series(rows, "tokens_per_s")
    both = [row for row in rows if is_number(row.get("row_tokens")) and is_number(row.get("step_time_s"))]
    computed = [(float(row["step"]), row["row_tokens"] / row["step_time_s"]) for row in both if row["step_time_s"] > 0]
    curves = [Curve("useful", BLUE, useful), Curve("with padding", ORANGE, computed)]
    return Chart("speed", "Tokens per second", "", curves, note="Useful: of prompts and answers.")


def series(rows: Sequence[Row], name: str) -> list[Point]:
    """(step, value) where the row has one."""
    return [(float(row["step"]), float(row[name])) for row in rows if is_number(row.get(name))]


def waits(rows: Sequence[Row], name: str) -> list[Point]:
    """Only where there was one: zeros between would pull the mean of neighbours down."""
    return [(step, wait_s) for step, wait_s in series(rows, name) if wait_s > 0]


def changes(points: list[Point]) -> list[Point]:
    """Nothing, if the value never changed."""
    return points if len({y for _, y in points}) > 1 else []


def is_number(value: object) -> bool:
    """Finite; a loss that is none ended the run, and would empty its chart."""
    return isinstance(value, int | float) and math.isfinite(value)


def smooth(points: Sequence[Point]) -> list[Point]:
    """The loss without the differences between batches."""
    return smoothed(points, round(SMOOTHING_SHARE * len(points)))


def at_the_end(points: Sequence[Point]) -> float:
    """Mean of the last few."""
    last = [y for _, y in points[-max(1, round(END_SHARE * len(points))) :]]
    return math.fsum(last) / len(last)


def heldout_table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Held-out beside training loss, some steps spread over the run; the lowest held-out loss is among them."""
    heldout, training = series(rows, "heldout_loss"), dict(smooth(series(rows, "loss")))
    if not heldout:
        return []
    best = min(heldout, key=lambda point: point[1])
    every = -(-len(heldout) // MAX_TABLE_ROWS)
    picked = [point for i, point in enumerate(reversed(heldout)) if i % every == 0 or point is best][::-1]
    return [
        {
            "step": f"{step:,.0f}",
            "heldout": f"{loss:.4f}",
            "training": f"{training[step]:.4f}" if step in training else "",
            "best": "lowest" if (step, loss) == best else "",
        }
        for step, loss in picked
    ]


def shown(value: object) -> str:
    """A setting or a count, as a person reads it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return repr(value).replace("e-0", "e-")
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
