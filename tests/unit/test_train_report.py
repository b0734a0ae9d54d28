"""The training report of runs that never were: whole, alone, safe to open, of bounded size, and true to its rows."""

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpaca_ray.train.curves import MAX_READINGS, Chart, Curve, binned, draw, number, round_ticks, smoothed
from alpaca_ray.train.report import heldout_table, num_tokens, render, totals
from tests.unit.test_generate_report import ADDRESSES, Page

HOSTILE = "</td><script>alert(1)</script>"
POINT = st.tuples(st.integers(0, 10**6).map(float), st.floats(-1e6, 1e6))
POINTS = st.lists(POINT, min_size=1, max_size=900, unique_by=lambda point: point[0]).map(sorted)

Row = dict[str, Any]


def run(num_steps: int, **values: Any) -> list[Row]:
    """Rows with what the loop always knows."""
    return [
        {
            "step": step, "loss": 1 + 2 / step, "learning_rate": 2e-5 / step, "grad_norm": 1.0, "target_tokens": 40,
            "tokens_per_s": 50.0, "step_time_s": 2.0,
        } | values
        for step in range(1, num_steps + 1)
    ]  # fmt: skip


def full(num_steps: int) -> list[Row]:
    """Rows with all that may be known."""
    known = {"mfu": 0.4, "memory_gb": 3.0, "data_wait_s": 0.1, "checkpoint_stall_s": 0.0, "row_tokens": 120}
    rows = run(num_steps, **known)
    for row in rows[4::5]:
        row |= {"heldout_loss": row["loss"] + 0.1, "checkpoint_stall_s": 0.5}
    for row in rows[num_steps // 2 :]:
        row["num_workers"] = 2
    for row in rows[: num_steps // 2]:
        row["num_workers"] = 4
    return rows


def unusual_runs() -> Iterator[tuple[str, list[Row]]]:
    yield "no step", []
    yield "one step", run(1)
    yield "one full step", full(1)
    yield "long", full(3000)
    yield "resumed", full(40)[20:]
    yield "constant", run(30, loss=1.0, learning_rate=0.0, grad_norm=0.0)
    yield "broken", [*run(3), {"step": 4, "loss": math.nan, "grad_norm": math.inf, "step_time_s": 0.0}]
    yield "unknown fields", run(3, of_a_later_version="x", mfu=None)


@pytest.mark.parametrize("rows", [pytest.param(rows, id=name) for name, rows in unusual_runs()])
def test_every_run_has_a_whole_page(rows: list[Row]) -> None:
    page = Page(render(rows, {"Counts": {"examples": 7}}))
    ids = [value for key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    numbers = re.split(r"[ ,]", " ".join(str(value) for key, value in page.attributes if key in ("points", "x", "y")))
    assert not {"nan", "inf", "-inf"} & set(numbers)


def test_the_page_stands_alone_and_settings_cannot_act_in_it() -> None:
    html = render(full(20), {HOSTILE: {HOSTILE: HOSTILE, "nested": {"a": [HOSTILE]}}}, HOSTILE)
    page = Page(html)
    assert "script" not in page.elements
    assert not ADDRESSES & {key for key, _ in page.attributes}
    assert "url(" not in html
    assert "default-src 'none'" in html


def test_only_charts_with_a_value_are_shown() -> None:
    def titles(rows: list[Row]) -> list[str]:
        return re.findall(r'<figcaption id="(\w+)-title"', render(rows, {}))

    assert titles([]) == []
    assert titles(run(5)) == ["loss", "rate", "norm", "speed", "time"]
    assert titles(full(20)) == ["loss", "rate", "norm", "speed", "mfu", "time", "still", "memory", "workers"]


def test_the_size_does_not_grow_with_the_run() -> None:
    assert len(render(full(20_000), {})) < 1.3 * len(render(full(1000), {}))


def test_the_figures_on_top_are_those_of_the_run() -> None:
    found = totals(full(40))
    assert found["steps"] == "40"
    assert found["useful tokens/s"] == "50"
    assert found["in steps"] == "0:01:20"
    assert float(found["held-out loss at the end"]) == pytest.approx(1 + 2 / 40 + 0.1)
    assert num_tokens(run(10)) == 10 * 100


def test_settings_and_counts_are_on_the_page() -> None:
    texts = Page(render(run(2), {"Settings": {"lora": None, "packing": True, "examples": 52002, "rate": 2e-5}})).texts
    assert {"none", "yes", "52,002", "2e-5"} <= set(texts)


@pytest.mark.parametrize("num_losses", [1, 7, 300])
def test_the_heldout_table_is_short_and_has_the_lowest_and_the_last(num_losses: int) -> None:
    rows = [
        {"step": step, "loss": 1.0, "heldout_loss": 2 + (step - num_losses // 3) ** 2} for step in range(num_losses)
    ]
    table = heldout_table(rows)
    assert len(table) <= 26
    assert [row["step"] for row in table if row["best"]] == [f"{num_losses // 3}"]
    assert table[-1]["step"] == f"{num_losses - 1}"
    assert [int(row["step"]) for row in table] == sorted(int(row["step"]) for row in table)


@given(points=POINTS, at_most=st.integers(1, 300))
def test_bins_cover_every_point(points: list[tuple[float, float]], at_most: int) -> None:
    bins = binned(points, at_most)
    assert len(bins) <= at_most
    assert all(b.low <= b.mean <= b.high for b in bins)
    assert min(b.low for b in bins) == min(y for _, y in points)
    assert max(b.high for b in bins) == max(y for _, y in points)
    assert bins[-1].x == points[-1][0]


@given(points=POINTS)
def test_a_chart_stays_in_its_picture(points: list[tuple[float, float]]) -> None:
    chart = Chart("id", "title", "unit", [Curve("a", 0, points), Curve("b", 1, points[:3])], from_zero=False)
    page = Page(str(draw(chart)))
    pairs = [p.split(",") for key, value in page.attributes if key == "points" for p in str(value).split()]
    assert all(0 <= float(x) <= chart.width and 0 <= float(y) <= chart.height for x, y in pairs)
    assert page.attributes.count(("class", "at")) <= MAX_READINGS


def test_smoothing_keeps_a_line_and_drops_what_alternates() -> None:
    line = [(float(x), 3.0 * x) for x in range(50)]
    assert [y for _, y in smoothed(line, 5)[10:40]] == pytest.approx([y for _, y in line[10:40]])
    wave = smoothed([(float(x), (-1.0) ** x) for x in range(50)], 10)
    assert all(abs(y) < 0.1 for _, y in wave)


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-3, 1e6))
def test_ticks_are_few_and_inside(low: float, span: float) -> None:
    ticks = round_ticks(low, low + span)
    assert len(ticks) <= 7
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in ticks)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (2e-5, "2.00e-5"), (0.97, "0.97"), (1234.5, "1234"), (52002.4, "52,002")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text
