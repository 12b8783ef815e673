"""The Pareto plot: what a speed-up costs in quality, measured, with the limit and the control."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.errors import DataError
from transom.measure.row import CONTROL, LOWER_IS_BETTER, PLAIN, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from transom.measure.comparison import Comparison

_MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Palette:
    """Colours of everything that is not a method."""

    ink: str
    soft: str
    grid: str
    paper: str
    methods: tuple[str, ...]


# Okabe and Ito's colours without black and yellow, which most colour-blind readers tell apart;
# on a dark ground the dark ones are lightened.
_LIGHT = Palette(
    ink="#1c2733",
    soft="#6b7785",
    grid="#e3e7ec",
    paper="#ffffff",
    methods=("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
)
_DARK = Palette(
    ink="#e6ebf0",
    soft="#95a1ae",
    grid="#28323c",
    paper="#141b22",
    methods=("#4aa8e6", "#ff8a3d", "#2fc79a", "#e08fc0", "#f0b840", "#9ad4f5"),
)


def pareto(comparison: Comparison, y: str | None = None, *, dark: bool = False) -> Figure:
    """Measured speed-up (x) against a measure of quality (y), one colour a method.

    Filled markers are measured, with their quartiles as a line; the hollow one beside each is the
    limit, the speed-up that the FLOPs would allow. The front joins what no other row beats in
    both. Small crosses are the control: random pruning to the same token counts, drawn at the
    speed-up of the row it belongs to.

    Args:
        comparison: With at least one row.
        y: Name of a quality column; the first by default.
        dark: Light lines on a dark ground.

    Raises:
        DataError: If no row was measured or no row has that measure.
    """
    from matplotlib.figure import Figure

    name = y if y is not None else next(iter(comparison.qualities), None)
    timed = [row for row in comparison.rows if row.timed]
    rows = [row for row in timed if name is not None and name in row.quality]
    if name is None or not rows:
        raise DataError(
            f"no row has a measure {name!r} to plot; measured are {comparison.qualities}"
        )
    palette = _DARK if dark else _LIGHT
    figure = Figure(figsize=(8.4, 5.0), facecolor=palette.paper, layout="constrained")
    axes = figure.add_subplot()
    lower = name in LOWER_IS_BETTER
    _frame(axes, palette, name, lower)
    _front(axes, rows, name, palette)
    styles = _styles(rows, palette)
    for method, (colour, marker) in styles.items():
        _method(axes, [r for r in rows if r.method == method], name, colour, marker, palette)
    if comparison.plain is not None and name in comparison.plain.quality:
        at = comparison.plain.quality[name]
        axes.plot(1.0, at, "*", ms=15, color=palette.ink, mec=palette.paper, zorder=6)
        axes.annotate(
            "plain", (1.0, at), (0, 9), textcoords="offset points",
            ha="center", va="bottom", color=palette.ink, fontsize=9.5, fontweight="bold",
        )  # fmt: skip
    axes.margins(x=0.06, y=0.12)
    if lower:
        axes.invert_yaxis()
    _annotate(axes, rows, name, styles)
    _legend(axes, styles, palette, any(row.control for row in rows))
    return figure


def front(rows: Iterable[Row], name: str) -> list[Row]:
    """The rows that no other beats in both speed-up and quality, from slow to fast.

    The random control is no candidate.

    Args:
        rows: Candidates that have the measure.
        name: Of the measure.
    """
    sign = -1 if name in LOWER_IS_BETTER else 1
    best: list[Row] = []
    candidates = [row for row in rows if row.method != CONTROL]
    for row in sorted(candidates, key=lambda r: (-_speed(r), -sign * r.quality[name])):
        if not best or sign * row.quality[name] > sign * best[-1].quality[name]:
            best.append(row)
    return best[::-1]


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure; the ending of the path says as what (png, svg, pdf)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200, facecolor=figure.get_facecolor())
    return path


def _styles(rows: Iterable[Row], palette: Palette) -> dict[str, tuple[str, str]]:
    """Colour and marker of every method; the random control is grey."""
    names = dict.fromkeys(row.method for row in rows if row.method != PLAIN)
    styles: dict[str, tuple[str, str]] = {}
    for name in names:
        i = sum(known != CONTROL for known in styles)
        colour = palette.methods[i % len(palette.methods)]
        styles[name] = (palette.soft, "h") if name == CONTROL else (colour, _MARKERS[i % 6])
    return styles


def _speed(row: Row) -> float:
    return 1.0 if row.method == PLAIN else row.speedup[1]


def _frame(axes: Axes, palette: Palette, name: str, lower: bool) -> None:
    axes.set_facecolor(palette.paper)
    axes.grid(True, color=palette.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(palette.soft)
    axes.tick_params(colors=palette.soft, labelsize=9.5, length=3)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.set_xlabel("speed-up over the plain host (measured)", color=palette.ink, fontsize=10.5)
    better = ", lower is better" if lower else ""
    axes.set_ylabel(f"{name}{better}", color=palette.ink, fontsize=10.5)


def _front(axes: Axes, rows: Sequence[Row], name: str, palette: Palette) -> None:
    best = front(rows, name)
    if len(best) < 2:
        return
    xs, ys = [_speed(r) for r in best], [r.quality[name] for r in best]
    axes.plot(xs, ys, color=palette.soft, linewidth=9, alpha=0.18, solid_capstyle="round",
              solid_joinstyle="round", zorder=1)  # fmt: skip


def _method(
    axes: Axes, rows: list[Row], name: str, colour: str, marker: str, palette: Palette
) -> None:
    rows = sorted(rows, key=_speed)
    xs, ys = [_speed(r) for r in rows], [r.quality[name] for r in rows]
    axes.plot(xs, ys, color=colour, linewidth=1.6, alpha=0.9, zorder=3)
    for row, x, at in zip(rows, xs, ys, strict=True):
        axes.plot([x, row.limit], [at, at], ":", color=colour, linewidth=1.1, alpha=0.7, zorder=2)
        axes.plot(row.speedup[::2], [at, at], color=colour, linewidth=3.2, alpha=0.35, zorder=3)
        axes.plot(row.limit, at, marker, ms=6, mfc=palette.paper, mec=colour, mew=1.3, zorder=4)
        if name in row.control:
            axes.plot(x, row.control[name], "x", ms=5, mew=1.4, color=colour, alpha=0.75, zorder=3)
    axes.plot(xs, ys, marker, ms=8, color=colour, mec=palette.paper, mew=1.0, ls="", zorder=5)


def _annotate(
    axes: Axes, rows: Sequence[Row], name: str, styles: dict[str, tuple[str, str]]
) -> None:
    """Write settings beside the markers, where there is room among those already written."""
    figure: Any = axes.figure
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    markers = [axes.transData.transform((_speed(r), r.quality[name])) for r in rows]
    markers += [axes.transData.transform((r.limit, r.quality[name])) for r in rows]
    taken = [(x - 6 * scale, y - 6 * scale, x + 6 * scale, y + 6 * scale) for x, y in markers]
    frame = axes.get_window_extent()
    for row in sorted(rows, key=lambda r: -r.quality[name]):
        text = ", ".join(part.partition("=")[2] for part in row.label.split(", "))
        if row.method == PLAIN or not row.settings or len(row.label) > 28:
            continue
        if len(row.settings) > 1:
            text = row.label
        x, y = axes.transData.transform((_speed(row), row.quality[name]))
        width, height = (5.2 * len(text) + 2) * scale, 10 * scale
        for dx, dy in ((-0.5, 0.9), (-0.5, -1.9), (0.15, 0.9), (-1.1, 0.9), (0.15, -1.9)):
            left, bottom = x + dx * width, y + dy * height
            box = (left, bottom, left + width, bottom + height)
            inside = box[0] > frame.x0 and box[2] < frame.x1 and box[1] > frame.y0
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                axes.annotate(
                    text,
                    (_speed(row), row.quality[name]),
                    ((left + width / 2 - x) / scale, (bottom - y) / scale),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    fontsize=8,
                    color=styles[row.method][0],
                    zorder=7,
                )
                break


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _legend(
    axes: Axes, styles: dict[str, tuple[str, str]], palette: Palette, controls: bool
) -> None:
    from matplotlib.lines import Line2D

    soft = palette.soft
    figure: Any = axes.figure
    methods = [
        Line2D([], [], color=colour, marker=marker, ms=7, mec=palette.paper, label=name)
        for name, (colour, marker) in styles.items()
    ]
    signs = [
        Line2D([], [], lw=8, alpha=0.25, color=soft, label="Pareto front"),
        Line2D([], [], ls=":", marker="o", mfc=palette.paper, color=soft, label="limit by FLOPs"),
    ]
    if controls:
        label = "random, same token counts"
        signs.append(Line2D([], [], ls="", marker="x", ms=5, mew=1.4, color=soft, label=label))
    for handles, loc in ((methods, "outside upper left"), (signs, "outside lower left")):
        figure.legend(
            handles=handles,
            loc=loc,
            ncols=min(len(handles), 7),
            frameon=False,
            fontsize=9.5,
            labelcolor=palette.ink,
            handlelength=1.8,
            columnspacing=1.6,
        )
