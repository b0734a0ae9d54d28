"""Inline SVG line charts over the steps of a run, for the training report.

Made by hand: a chart of any run's length is some kilobytes, and shows its values under the pointer without a script.
Colours are classes (`c0` to `c2`) that the page defines for light and dark. Sizes are in the units of the view box, 1
is a pixel at a chart's full width.
"""

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

LEFT, RIGHT, TOP, BOTTOM = 52, 14, 42, 38
LEGEND_Y, READING_Y = 14, 30
MAX_BINS = 240  # points of a line; what lies between is its band from lowest to highest
MAX_READINGS = 80  # places where the pointer finds a value
MAX_DOTS = 40  # a line of up to so many points shows each of them
CHARACTER_WIDTH = 6.2  # of the 11 px labels, on average

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """A line; its points lie in the order of x and are finite."""

    name: str
    hue: int
    points: Sequence[Point]
    faint: bool = False  # behind another one that stands for it: no entry in the legend, no reading


@dataclass(frozen=True)
class Chart:
    """A plane and what is drawn in it. At least one curve has a point."""

    id: str  # unique in the page
    title: str
    unit: str
    curves: Sequence[Curve]
    note: str = ""
    from_zero: bool = True
    goal: tuple[float, str] | None = None  # a horizontal line and its label
    width: int = 400
    height: int = 220


@dataclass(frozen=True)
class Bin:
    """Neighbouring points of a curve as one."""

    x: float
    low: float
    mean: float
    high: float


def binned(points: Sequence[Point], at_most: int) -> list[Bin]:
    """Equal numbers of points a bin; x is that of its last point."""
    size = -(-len(points) // at_most)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [_bin(part) for part in parts]


def _bin(part: Sequence[Point]) -> Bin:
    values = [y for _, y in part]
    mean = math.fsum(values) / len(values)
    # rounding must not put the mean of equal values outside of them
    return Bin(part[-1][0], min(values), min(max(values), max(min(values), mean)), max(values))


def smoothed(points: Sequence[Point], reach: int) -> list[Point]:
    """The mean of each point and of up to `reach` on either side of it."""
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    out = []
    for i, (x, _) in enumerate(points):
        first, end = max(0, i - reach), min(len(points), i + reach + 1)
        out.append((x, (sums[end] - sums[first]) / (end - first)))
    return out


def draw(chart: Chart) -> Markup:
    """The chart as a figure with caption, description and readings."""
    curves = [curve for curve in chart.curves if curve.points]
    assert curves  # an empty chart says nothing: its maker leaves it out
    plane = _Plane.around(chart, curves)
    parts = [plane.axes(), *(plane.curve(curve) for curve in curves)]
    if chart.goal is not None:
        parts.append(plane.level(*chart.goal))
    named = [curve for curve in curves if not curve.faint]
    parts += [plane.legend(named)] if len(named) > 1 else []
    parts.append(plane.readings(named))
    return _figure(chart, named, Markup("").join(parts))


def number(value: float) -> str:
    """To four significant digits; thousands separated, small ones in powers of ten."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.2e}".replace("e-0", "e-")


def round_ticks(low: float, high: float, at_most: int = 5) -> list[float]:
    """Round numbers between two values, at steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / at_most
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


@dataclass(frozen=True)
class _Plane:
    """From steps and values to the view box."""

    chart: Chart
    left: float
    right: float
    low: float
    high: float

    @classmethod
    def around(cls, chart: Chart, curves: Sequence[Curve]) -> "_Plane":
        xs = [x for curve in curves for x, _ in curve.points]
        ys = [y for curve in curves for _, y in curve.points] + ([chart.goal[0]] if chart.goal else [])
        low = min(0.0, *ys) if chart.from_zero else min(ys)
        high = max(ys)
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(chart, min(xs), max(xs), low if chart.from_zero else low - margin, high + margin)

    def x(self, step: float) -> float:
        span = (self.right - self.left) or 1
        share = (step - self.left) / span if self.right > self.left else 0.5
        return LEFT + (self.chart.width - LEFT - RIGHT) * share

    def y(self, value: float) -> float:
        floor = self.chart.height - BOTTOM
        return floor - (floor - TOP) * (value - self.low) / (self.high - self.low)

    def axes(self) -> Markup:
        width, floor = self.chart.width, self.chart.height - BOTTOM
        parts = []
        for value in round_ticks(self.low, self.high):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{_short(value)}</text>')
        for step in round_ticks(self.left, self.right, max(3, width // 80)):
            if step.is_integer():
                x = min(self.x(step), width - 4 - CHARACTER_WIDTH * len(_short(step)) / 2)
                parts.append(f'<text x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{_short(step)}</text>')
        middle = (LEFT + width - RIGHT) / 2
        parts.append(f'<text class="axis" x="{middle}" y="{floor + 33}" text-anchor="middle">step</text>')
        return Markup("".join(parts))

    def curve(self, curve: Curve) -> Markup:
        bins = binned(curve.points, MAX_BINS)
        line = " ".join(f"{self.x(b.x):.1f},{self.y(b.mean):.1f}" for b in bins)
        style = f"c{curve.hue} faint" if curve.faint else f"c{curve.hue}"
        parts = [f'<polyline class="line {style}" points="{line}"/>']
        if any(b.high > b.low for b in bins):
            upper = " ".join(f"{self.x(b.x):.1f},{self.y(b.high):.1f}" for b in bins)
            lower = " ".join(f"{self.x(b.x):.1f},{self.y(b.low):.1f}" for b in reversed(bins))
            parts.insert(0, f'<polygon class="band c{curve.hue}" points="{upper} {lower}"/>')
        if len(bins) <= MAX_DOTS and not curve.faint:
            parts += [
                f'<circle class="c{curve.hue}" cx="{self.x(b.x):.1f}" cy="{self.y(b.mean):.1f}" r="3"/>' for b in bins
            ]
        return Markup("".join(parts))

    def level(self, value: float, label: str) -> Markup:
        y = self.y(value)
        return Markup(
            f'<line class="goal" x1="{LEFT}" x2="{self.chart.width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT + 4}" y="{y - 4:.1f}">{escape(label)}</text>'
        )

    def legend(self, curves: Sequence[Curve]) -> Markup:
        parts, x = [], float(self.chart.width - RIGHT)
        for curve in reversed(curves):
            x -= CHARACTER_WIDTH * len(curve.name)
            parts.append(f'<text x="{x:.1f}" y="{LEGEND_Y}">{escape(curve.name)}</text>')
            parts.append(
                f'<rect class="c{curve.hue}" x="{x - 15:.1f}" y="{LEGEND_Y - 9}" width="10" height="10" rx="2"/>'
            )
            x -= 26
        return Markup("".join(parts))

    def readings(self, curves: Sequence[Curve]) -> Markup:
        """Columns that show, while the pointer is on them, a line and the values at it."""
        steps = [b.x for b in binned([(x, 0.0) for x in _all_steps(curves)], MAX_READINGS)]
        borders = [(a + b) / 2 for a, b in itertools.pairwise(steps)]
        edges = [LEFT, *(self.x(border) for border in borders), self.chart.width - RIGHT]
        parts, floor = [], self.chart.height - BOTTOM
        for (left, right), step in zip(itertools.pairwise(edges), steps, strict=True):
            x, text = self.x(step), escape(self._reading(curves, step))
            parts.append(
                f'<g class="at"><rect x="{left:.1f}" y="0" width="{right - left:.1f}" height="{floor}"/>'
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{READING_Y + 6}" y2="{floor}"/>'
                f'<text x="{LEFT}" y="{READING_Y}">{text}</text></g>'
            )
        return Markup("".join(parts))

    def _reading(self, curves: Sequence[Curve], step: float) -> str:
        values = []
        for curve in curves:
            after = bisect_right(curve.points, (step, math.inf))
            if after > 0:
                value = number(curve.points[after - 1][1])
                values.append(f"{curve.name} {value}" if len(curves) > 1 else value)
        return f"step {step:,.0f}: {', '.join(values)} {self.chart.unit}".rstrip()


def _all_steps(curves: Sequence[Curve]) -> list[float]:
    return sorted({x for curve in curves for x, _ in curve.points})


def _figure(chart: Chart, curves: Sequence[Curve], content: Markup) -> Markup:
    return Markup(
        '<figure class="card{}"><figcaption id="{}-title">{} <span class="unit">{}</span></figcaption>'
        '<svg role="img" viewBox="0 0 {} {}" aria-labelledby="{}-title {}-desc"><desc id="{}-desc">{}</desc>{}</svg>{}'
        "</figure>"
    ).format(
        " wide" if chart.width > Chart.width else "", chart.id, chart.title, chart.unit, chart.width, chart.height,
        chart.id, chart.id, chart.id, " ".join(_told(curve) for curve in curves), content,
        Markup('<p class="soft">{}</p>').format(chart.note) if chart.note else "",
    )  # fmt: skip


def _told(curve: Curve) -> str:
    (first, start), (last, end) = curve.points[0], curve.points[-1]
    lowest, highest = min(y for _, y in curve.points), max(y for _, y in curve.points)
    return (
        f"{curve.name}: from {number(start)} at step {first:,.0f} to {number(end)} at step {last:,.0f}, "
        f"lowest {number(lowest)}, highest {number(highest)}."
    )


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{round(value, 12):.3g}".replace("e-0", "e-")
