"""Geometry: what is drawn stands for the numbers, lies inside the picture, and no label lies on another."""

import itertools
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alpaca_ray.generate.charts import (
    CHARACTER_WIDTH,
    SUNBURST_SIZE,
    WIDTH,
    Caption,
    Layer,
    bars,
    columns,
    even_ticks,
    line,
    sunburst,
)

CAPTION = Caption("c", "A title", "A description", "x")
COUNTS = st.lists(st.integers(0, 10**6), min_size=1, max_size=30)


def numbers(svg: str, element: str, attribute: str) -> list[float]:
    return [float(found) for found in re.findall(rf'<{element} [^>]*\b{attribute}="([-\d.]+)"', svg)]


def label_boxes(svg: str) -> list[tuple[float, float, float, float]]:
    """left, top, right, bottom of each label that is not turned, by the average width of a character."""
    boxes = []
    for attributes, text in re.findall(r"<text ([^>]*)>([^<]*)</text>", svg):
        x, y = (float(re.search(rf'\b{name}="([-\d.]+)"', attributes)[1]) for name in "xy")  # type: ignore[index]
        width = CHARACTER_WIDTH * len(text)
        left = x - width * (0.5 if "middle" in attributes else 1 if "end" in attributes else 0)
        boxes.append((left, y - 9, left + width, y + 2))
    return boxes


def overlapping(svg: str) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    return [
        (a, b)
        for a, b in itertools.combinations(label_boxes(svg), 2)
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
    ]


@given(COUNTS)
def test_heights_are_in_proportion(counts: list[int]) -> None:
    edges = [float(i) for i in range(len(counts) + 1)]
    layers = [Layer("a", 0, counts), Layer("b", 1, counts)]
    svg = columns(CAPTION, edges, layers, even_ticks(len(counts)))
    heights = [float(height) for height in re.findall(r'height="([\d.]+)"><title>', svg)]
    expected = [count for count in counts for _ in layers if count > 0]
    unit = max(heights, default=0) / max(expected, default=1)
    assert all(abs(h - unit * count) < 0.2 for h, count in zip(heights, expected, strict=True))


@given(COUNTS)
def test_labels_lie_inside_and_apart(counts: list[int]) -> None:
    edges = [float(i) for i in range(len(counts) + 1)]
    ticks = [(i + 0.5, f"{i} to {i + 1}") for i in range(len(counts))]
    svg = columns(CAPTION, edges, [Layer("kept", 0, counts), Layer("rejected", 1, counts)], ticks)
    assert not overlapping(svg)
    assert all(left >= 0 and right <= WIDTH for left, _, right, _ in label_boxes(svg))


@given(st.dictionaries(st.text(min_size=1, max_size=40), st.integers(0, 10**7), min_size=1, max_size=30))
def test_bars_keep_their_names_and_numbers_inside(counts: dict[str, int]) -> None:
    svg = bars(CAPTION, counts, 1)
    assert svg.count("<rect") == len(counts)
    ends = [x + width for x, width in zip(numbers(svg, "rect", "x"), numbers(svg, "rect", "width"), strict=True)]
    assert max(ends) <= WIDTH


def test_a_line_rises_where_its_values_rise() -> None:
    svg = line(CAPTION, [0, 1, 2], [0, 5, 10], even_ticks(2), (12, "goal"))
    found = re.search(r'<polyline [^>]*points="([^"]+)"', svg)
    assert found
    ys = [float(point.split(",")[1]) for point in found[1].split()]
    assert ys == sorted(ys, reverse=True)  # the picture's y grows downwards
    assert numbers(svg, "line", "y1")[-1] < ys[-1]


TREES = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=12),
    st.dictionaries(st.text("abcdefgh", min_size=1, max_size=12), st.integers(1, 1000), min_size=1, max_size=4),
    min_size=1,
    max_size=20,
)


@given(TREES)
def test_each_ring_of_the_sunburst_goes_once_round(tree: dict[str, dict[str, int]]) -> None:
    svg = sunburst(CAPTION, tree)
    for ring, sectors in ((0, len(tree)), (1, sum(len(parts) for parts in tree.values()))):
        paths = re.findall(
            rf'class="r{ring}">.*?<path d="M([-\d.]+) ([-\d.]+)A\S+ \S+ 0 (\d) 1 ([-\d.]+) ([-\d.]+)L', svg
        )
        assert len(paths) == sectors
        assert sum(swept(*path) for path in paths) == pytest.approx(2 * math.pi, abs=0.01)


def swept(x1: str, y1: str, large: str, x2: str, y2: str) -> float:
    """The angle from the first point clockwise to the second."""
    angle = (math.atan2(float(x2), -float(y2)) - math.atan2(float(x1), -float(y1))) % (2 * math.pi)
    assert (angle > math.pi) == (large == "1") or abs(angle - math.pi) < 0.01
    return angle


@given(TREES)
def test_labels_of_the_sunburst_lie_in_the_picture(tree: dict[str, dict[str, int]]) -> None:
    svg = sunburst(CAPTION, tree)
    reach = [abs(x) for x in numbers(svg, "text", "x")]
    assert all(x < SUNBURST_SIZE / 2 for x in reach)


@given(st.floats(1e-9, 1e12), st.integers(4, 10))
def test_ticks_are_round_within_and_not_too_many(high: float, at_most: int) -> None:
    values = [value for value, _ in even_ticks(high, at_most)]
    assert values[0] == 0
    assert values[-1] <= high * (1 + 1e-6)
    assert 2 <= len(values) <= at_most + 1


def test_what_is_written_is_escaped_and_every_chart_says_what_it_shows() -> None:
    hostile = '"><script>alert(1)</script>'
    caption = Caption("c", hostile, hostile, hostile)
    charts = [
        columns(caption, [0, 1], [Layer(hostile, 0, [1])], [(0.5, hostile)], (0.5, hostile)),
        line(caption, [0, 1], [0, 1], [(0, hostile)], (1, hostile)),
        bars(caption, {hostile: 1}, 0),
        sunburst(caption, {hostile: {hostile: 1}}),
    ]
    for svg in charts:
        assert "<script" not in svg
        assert 'role="img"' in svg
        assert 'aria-labelledby="c-title c-desc"' in svg
        assert "<title>" in svg
