"""Inline SVG charts for the report: stacked columns, a line, bars, a sunburst.

Made by hand, for each is a few dozen lines and no plotting library gives small SVG with a sunburst. Colours are
classes (`s0` to `s5`) that the page defines for light and dark; every mark has a tooltip (`<title>`) and every chart a
caption and a description for screen readers. Sizes are in the units of the view box: 1 is a pixel at 360 wide, so that
the text stays readable on a phone.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 26, 40
NUM_HUES = 6
CHARACTER_WIDTH = 6.2  # of the 11 px labels, on average
SUNBURST_SIZE = 460
_RINGS = (50, 134, 226)  # radii: hole, verbs, objects

Tick = tuple[float, str]


@dataclass(frozen=True)
class Caption:
    """What a chart says to those who cannot see it, and what stands under its axis."""

    id: str  # unique in the page
    title: str
    description: str
    x: str = ""


@dataclass(frozen=True)
class Layer:
    """One colour of a stack: a height per column."""

    name: str
    hue: int
    heights: Sequence[float]


def columns(
    caption: Caption, edges: Sequence[float], layers: Sequence[Layer], ticks: Sequence[Tick], mark: Tick | None = None
) -> Markup:
    """Stacked columns; column i stands between edges[i] and edges[i + 1]. `mark` is a vertical line with its label."""
    totals = [sum(heights) for heights in zip(*(layer.heights for layer in layers), strict=True)]
    headroom = 1.2 if mark is not None else 1.0  # for its label
    frame = _Frame(edges[0], edges[-1], headroom * max(totals, default=0))
    parts = [frame.axes(caption, ticks)]
    for i in range(len(edges) - 1):
        base = 0.0
        for layer in layers:
            if layer.heights[i] > 0:
                tip = f"{caption.x} {_span(edges[i], edges[i + 1], ticks)}, {layer.name}: {number(layer.heights[i])}"
                parts.append(frame.box((edges[i], edges[i + 1]), (base, base + layer.heights[i]), layer.hue, tip))
            base += layer.heights[i]
    if mark is not None:
        parts.append(frame.vertical(*mark))
    if len(layers) > 1:
        parts.append(_legend([(layer.name, layer.hue) for layer in layers]))
    return _figure(caption, WIDTH, HEIGHT, Markup("").join(parts))


def line(
    caption: Caption, xs: Sequence[float], ys: Sequence[float], ticks: Sequence[Tick], goal: Tick | None
) -> Markup:
    """A line through points in order, over a filled area. `goal` is a horizontal line with its label."""
    top = max([*ys, goal[0] if goal is not None else 0])
    frame = _Frame(xs[0], xs[-1], top)
    points = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(xs, ys, strict=True))
    floor = f"{frame.x(xs[-1]):.1f},{frame.y(0):.1f} {frame.x(xs[0]):.1f},{frame.y(0):.1f}"
    tip = escape(f"{caption.title}: {number(ys[-1])} at the end")
    drawn = Markup(
        f'<g><title>{tip}</title><polygon class="area" points="{points} {floor}"/>'
        f'<polyline class="line" points="{points}"/></g>'
    )
    target = frame.horizontal(*goal) if goal is not None else Markup("")
    return _figure(caption, WIDTH, HEIGHT, frame.axes(caption, ticks) + drawn + target)


def bars(caption: Caption, counts: Mapping[str, int], hue: int) -> Markup:
    """Horizontal bars, one a row, with name and number written out."""
    row, label, value = 24, 150, 56
    longest = max(counts.values(), default=0) or 1
    parts = []
    for i, (name, count) in enumerate(counts.items()):
        middle, width = i * row + row / 2, (WIDTH - label - value) * count / longest
        parts.append(
            f"<g><title>{escape(f'{name}: {number(count)}')}</title>"
            f'<text x="{label - 8}" y="{middle + 4:.0f}" text-anchor="end">{escape(clip(name, 22))}</text>'
            f'<rect class="s{hue}" x="{label}" y="{i * row + 4}" width="{width:.1f}" height="{row - 8}" rx="2"/>'
            f'<text x="{label + width + 6:.1f}" y="{middle + 4:.0f}">{number(count)}</text></g>'
        )
    return _figure(caption, WIDTH, max(row, row * len(counts)), Markup("".join(parts)))


def sunburst(caption: Caption, tree: Mapping[str, Mapping[str, int]]) -> Markup:
    """Two rings: the inner one the keys, the outer one their parts, angles as the counts."""
    total = sum(sum(parts.values()) for parts in tree.values())
    drawn, start = [], 0.0
    for i, (name, parts) in enumerate(tree.items()):
        sectors, angle = [], start
        for part, count in parts.items():
            sweep = 2 * math.pi * count / total
            sectors.append(_sector(1, (angle, sweep), part, f"{name} {part}: {number(count)}"))
            angle += sweep
        sectors.append(_sector(0, (start, angle - start), name, f"{name}: {number(sum(parts.values()))}"))
        drawn.append(Markup('<g class="p{}">{}</g>').format(i % NUM_HUES, Markup("").join(sectors)))
        start = angle
    middle = SUNBURST_SIZE / 2
    group = Markup('<g transform="translate({0} {0})">{1}</g>').format(f"{middle:.0f}", Markup("").join(drawn))
    return _figure(caption, SUNBURST_SIZE, SUNBURST_SIZE, group)


def even_ticks(high: float, at_most: int = 6) -> list[Tick]:
    """Round numbers from 0 to `high`, at steps of 1, 2 or 5 times a power of ten."""
    if high <= 0:
        return [(0, "0")]
    rough = high / at_most
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [(k * step, _short(k * step)) for k in range(math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """With thousands separated; whole numbers whole, others to three significant digits."""
    if float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def clip(text: str, length: int) -> str:
    """At most `length` characters, the last one an ellipsis where something is left out."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


@dataclass(frozen=True)
class _Frame:
    """The plane of a chart: from data to the view box."""

    low: float
    high: float
    top: float

    def x(self, value: float) -> float:
        span = (self.high - self.low) or 1
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.low) / span

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / ((self.top * 1.05) or 1)

    def axes(self, caption: Caption, ticks: Sequence[Tick]) -> Markup:
        parts = []
        for value, text in even_ticks(self.top or 1, 5):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>')
        for x, text in _apart([(self.x(value), text) for value, text in ticks]):
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{escape(text)}</text>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(
            f'<text class="axis" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(caption.x)}</text>'
        )
        return Markup("".join(parts))

    def box(self, across: tuple[float, float], up: tuple[float, float], hue: int, tip: str) -> Markup:
        left, top = self.x(across[0]), self.y(up[1])
        width, height = self.x(across[1]) - left, self.y(up[0]) - top
        width -= 1 if width > 4 else 0  # a gap between columns
        return Markup(
            f'<rect class="s{hue}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" '
            f'height="{height:.1f}"><title>{escape(tip)}</title></rect>'
        )

    def vertical(self, value: float, text: str) -> Markup:
        x = self.x(value)
        side, anchor = (-4, "end") if x > WIDTH / 2 else (4, "start")
        return Markup(
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text x="{x + side:.1f}" y="{TOP + 10}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def horizontal(self, value: float, text: str) -> Markup:
        y = self.y(value)
        return Markup(
            f'<line class="mark" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT + 4}" y="{y + 12:.1f}">{escape(text)}</text>'
        )


def _figure(caption: Caption, width: int, height: int, content: Markup) -> Markup:
    name = escape(caption.id)
    return Markup(
        f'<figure class="card"><figcaption id="{name}-title">{escape(caption.title)}</figcaption>'
        f'<svg role="img" viewBox="0 0 {width} {height}" aria-labelledby="{name}-title {name}-desc">'
        f'<desc id="{name}-desc">{escape(caption.description)}</desc>{content}</svg></figure>'
    )


def _legend(names: Sequence[tuple[str, int]]) -> Markup:
    parts, x = [], float(WIDTH - RIGHT)
    for name, hue in reversed(names):
        x -= CHARACTER_WIDTH * len(name)
        parts.append(f'<text x="{x:.1f}" y="12">{escape(name)}</text>')
        parts.append(f'<rect class="s{hue}" x="{x - 14:.1f}" y="3" width="10" height="10" rx="2"/>')
        x -= 24
    return Markup("".join(parts))


def _sector(ring: int, arc: tuple[float, float], text: str, tip: str) -> Markup:
    """A piece of a ring, clockwise from the top; its label lies along the radius where there is room for a line."""
    inner, outer = _RINGS[ring], _RINGS[ring + 1]
    start, sweep = arc
    end = start + min(sweep, 2 * math.pi - 1e-3)  # an arc that ends where it starts is not drawn
    large = int(end - start > math.pi)
    path = (
        f"M{_polar(outer, start)}A{outer} {outer} 0 {large} 1 {_polar(outer, end)}"
        f"L{_polar(inner, end)}A{inner} {inner} 0 {large} 0 {_polar(inner, start)}Z"
    )
    label = _radial_text(arc, inner, outer, text)
    return Markup(f'<g class="r{ring}"><title>{escape(tip)}</title><path d="{path}"/>{label}</g>')


def _radial_text(arc: tuple[float, float], inner: int, outer: int, text: str) -> str:
    """Along the radius, from the rim inwards; "" where the sector is narrower than a line where the text ends."""
    text = clip(text, int((outer - inner - 10) / CHARACTER_WIDTH))
    if arc[1] * (outer - 6 - CHARACTER_WIDTH * len(text)) < 11:
        return ""
    degrees = math.degrees(arc[0] + arc[1] / 2) - 90
    flip = 90 < degrees < 270  # on the left side the text would stand on its head
    x, turn = (6 - outer, degrees + 180) if flip else (outer - 6, degrees)
    anchor = "start" if flip else "end"
    return f'<text x="{x}" y="4" text-anchor="{anchor}" transform="rotate({turn:.1f})">{escape(text)}</text>'


def _polar(radius: float, angle: float) -> str:
    return f"{radius * math.sin(angle):.2f} {-radius * math.cos(angle):.2f}"


def _apart(labels: Sequence[Tick]) -> Iterator[Tick]:
    """Centred labels that lie inside the picture and not on the one before; the others are left out."""
    free_from = -math.inf
    for wanted, text in labels:
        half = CHARACTER_WIDTH * len(text) / 2
        x = min(wanted, WIDTH - 4 - half)
        if x - half >= free_from:
            free_from = x + half + 8
            yield x, text


def _span(left: float, right: float, ticks: Sequence[Tick]) -> str:
    named = dict(ticks).get((left + right) / 2)
    return named if named is not None else f"{number(left)} to {number(right)}"


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
