"""Charts as SVG that follow the page: colours come from the style sheet, text stays text.

A chart holds no script and no style attribute, so it stands under the strictest policy, and one
drawing serves light and dark. Points carry their numbers as `<title>`, and every chart on a page
has the table it was made from beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

WIDTH, HEIGHT = 540, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 14, 14, 50
COLOURS = 8  # classes s0 … s7 of the style sheet
_SHAPES = ("circle", "square", "triangle", "diamond", "down", "plus")


@dataclass(frozen=True)
class Point:
    """One measured value.

    Attributes:
        x, y: where.
        says: its numbers in words, shown when it is pointed at.
        spread: lower and upper quartile of x, if measured.
    """

    x: float
    y: float
    says: str = ""
    spread: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """Points of one colour and shape.

    Attributes:
        name: for the legend.
        points: in the order in which a line joins them.
        key: what links it to a page: a slug, or "".
        quiet: whether it is a control or a reference, drawn grey.
    """

    name: str
    points: Sequence[Point]
    key: str = ""
    quiet: bool = False


@dataclass(frozen=True)
class Chart:
    """What one chart shows.

    Attributes:
        title: over it.
        x, y: names of the axes, with units.
        series: what is drawn, first below.
        log: whether both axes are logarithmic.
        front: whether the Pareto front (more of both is better) is drawn.
        lower: whether less of y is better, for the front.
        diagonal: whether the line y = x is drawn, and what it means.
        joined: whether the points of a series are joined.
    """

    title: str
    x: str
    y: str
    series: Sequence[Series] = field(default_factory=tuple)
    log: bool = False
    front: bool = False
    lower: bool = False
    diagonal: str = ""
    joined: bool = True


@dataclass(frozen=True)
class Drawn:
    """A chart on a page: the picture and its legend."""

    title: str
    svg: Markup
    legend: list[tuple[str, str, str, str]]  # name, class, shape, key


def draw(chart: Chart, highlight: str = "") -> Drawn:
    """The chart as SVG.

    Args:
        chart: with at least one point.
        highlight: key of the series that stands out; the others step back.
    """
    points = [p for series in chart.series for p in series.points]
    xs = _Axis([p.x for p in points], WIDTH - _LEFT - _RIGHT, chart.log)
    ys = _Axis([p.y for p in points], HEIGHT - _TOP - _BOTTOM, chart.log)
    plane = _Plane(xs, ys)
    styles = _styles(chart.series)
    parts = [*_frame(chart, plane)]
    if chart.diagonal:
        parts += _diagonal(chart, plane)
    if chart.front:
        parts += _front(chart, plane)
    order = sorted(zip(chart.series, styles, strict=True), key=lambda s: s[0].key == highlight)
    for series, (colour, shape) in order:
        role = "" if not highlight else (" lit" if series.key == highlight else " dim")
        parts.append(f'<g class="series {colour}{role}">')
        if chart.joined and len(series.points) > 1:
            line = " ".join(f"{plane.x(p.x):.1f},{plane.y(p.y):.1f}" for p in series.points)
            parts.append(f'<polyline class="line" points="{line}"/>')
        for p in series.points:
            x, y = plane.x(p.x), plane.y(p.y)
            if p.spread is not None:
                low, high = (min(max(plane.x(v), _LEFT), WIDTH - _RIGHT) for v in p.spread)
                parts.append(f'<path class="spread" d="M{low:.1f} {y:.1f}H{high:.1f}"/>')
            says = escape(f"{series.name}: {p.says}" if p.says else series.name)
            parts.append(
                f'<path class="mark" d="{_mark(shape, x, y)}"><title>{says}</title></path>'
            )
        parts.append("</g>")
    said = escape(f"{chart.title}. {chart.y} over {chart.x}.")
    body = "".join(parts)
    svg = (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}">'
        f"{body}</svg>"
    )
    legend = [
        (series.name, colour, _mark(shape, 7, 7), series.key)
        for series, (colour, shape) in zip(chart.series, styles, strict=True)
    ]
    return Drawn(chart.title, Markup(svg), legend)


def pareto(points: Sequence[Point], lower: bool = False) -> list[Point]:
    """The points that no other beats in both, from small x to large."""
    sign = -1 if lower else 1
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.x, -sign * p.y)):
        if not best or sign * point.y > sign * best[-1].y:
            best.append(point)
    return best[::-1]


class _Axis:
    """Values to pixels, with round numbers for its ticks."""

    def __init__(self, values: Sequence[float], length: float, log: bool) -> None:
        self.length = length
        self.log = log and min(values) > 0
        moved = [math.log10(v) for v in values] if self.log else list(values)
        low, high = min(moved), max(moved)
        room = (high - low) * 0.07 or abs(high) * 0.1 or 0.5
        self.low, self.high = low - room, high + room
        self.ticks = self._powers() if self.log else _round(self.low, self.high)

    def at(self, value: float) -> float:
        moved = math.log10(value) if self.log else value
        return (moved - self.low) / (self.high - self.low) * self.length

    def _powers(self) -> list[float]:
        wide = self.high - self.low > 1.6
        steps = (1.0,) if wide else (1.0, 2.0, 5.0)
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        found = [s * 10.0**p for p in powers for s in steps]
        return [v for v in found if self.low <= math.log10(v) <= self.high]


@dataclass(frozen=True)
class _Plane:
    across: _Axis
    up: _Axis

    def x(self, value: float) -> float:
        return _LEFT + self.across.at(value)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - self.up.at(value)


def _round(low: float, high: float, wanted: int = 6) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / wanted))
    step *= next(f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= wanted)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step) + 1)]


def _frame(chart: Chart, plane: _Plane) -> list[str]:
    parts = ['<g class="axes">']
    floor = HEIGHT - _BOTTOM
    for value in plane.across.ticks:
        x = plane.x(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {_TOP}V{floor}"/>')
        text = _number(value, plane.across.ticks)
        parts.append(f'<text x="{x:.1f}" y="{floor + 19}" text-anchor="middle">{text}</text>')
    for value in plane.up.ticks:
        y = plane.y(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        text = _number(value, plane.up.ticks)
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    parts.append(f'<path class="base" d="M{_LEFT} {_TOP}V{floor}H{WIDTH - _RIGHT}"/>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="name" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{escape(chart.x)}</text>"
    )
    middle = (_TOP + floor) / 2
    parts.append(
        f'<text class="name" transform="translate(15 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(chart.y)}</text>"
    )
    return [*parts, "</g>"]


def _diagonal(chart: Chart, plane: _Plane) -> list[str]:
    low = max(plane.across.low, plane.up.low)
    high = min(plane.across.high, plane.up.high)
    if plane.across.log or low >= high:
        return []
    a, b = (plane.x(low), plane.y(low)), (plane.x(high), plane.y(high))
    return [
        f'<path class="diagonal" d="M{a[0]:.1f} {a[1]:.1f}L{b[0]:.1f} {b[1]:.1f}"/>',
        f'<text class="note" x="{b[0] - 6:.1f}" y="{b[1] + 12:.1f}" text-anchor="end">'
        f"{escape(chart.diagonal)}</text>",
    ]


def _front(chart: Chart, plane: _Plane) -> list[str]:
    candidates = [p for s in chart.series if not s.quiet for p in s.points]
    best = pareto(candidates, chart.lower)
    if len(best) < 2:
        return []
    line = " ".join(f"{plane.x(p.x):.1f},{plane.y(p.y):.1f}" for p in best)
    return [f'<polyline class="front" points="{line}"/>']


def _styles(series: Sequence[Series]) -> list[tuple[str, str]]:
    styles, i = [], 0
    for each in series:
        if each.quiet:
            styles.append(("quiet", "plus"))
            continue
        styles.append((f"s{i % COLOURS}", _SHAPES[(i // COLOURS + i) % 5]))
        i += 1
    return styles


def _mark(shape: str, x: float, y: float, r: float = 5.5) -> str:
    def path(*corners: tuple[float, float]) -> str:
        return "M" + "L".join(f"{x + dx * r:.1f} {y + dy * r:.1f}" for dx, dy in corners) + "Z"

    if shape == "square":
        return path((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85))
    if shape == "triangle":
        return path((0, -1.1), (1.05, 0.8), (-1.05, 0.8))
    if shape == "down":
        return path((0, 1.1), (1.05, -0.8), (-1.05, -0.8))
    if shape == "diamond":
        return path((0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0))
    if shape == "plus":
        arm = 0.3
        return path(
            (-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm),
            (arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm),
        )  # fmt: skip
    return f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0Z"


def _number(value: float, ticks: Sequence[float]) -> str:
    if abs(value) >= 10000:
        return f"{value / 1000:g}k"
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=1.0)
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step < 1 else 0
    return f"{value:.{digits}f}" if digits <= 5 else f"{value:g}"
