"""The lens on heads: importance, strength by distance and patterns of all heads on one page.

The numbers are those of the room `vit-visual-analytics`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from transom import hosts, registry
from transom.lens.drawing import colours
from transom.lens.seen import OF_ROOM, Array, Look, Panel, drawn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TABLES = {
    "distribution": "importance: change of the prediction\n(Jensen-Shannon divergence, nats)",
    "confidence_predicted": "importance: fall of the confidence\nin the predicted class",
    "representation": "importance: change of the features\n(1 - cosine)",
    "distance": "mean distance of attention\n(patches)",
    "self": "attention of patches\non themselves",
    "entropy": "entropy of attention\n(nats)",
    "content": "part of the attention that\ndepends on the image",
}


def heads(model: nn.Module, x: Tensor, labels: Tensor | None, seed: int) -> Look:
    """Look at every head: the overview of the room, and one figure of all of it.

    Returns:
        arrays: the table, each (L, H), and mass (L, H, R). details: the overview.

    Raises:
        HostError: the model returns neither logits nor features.
        TokensError: tokens leave on the way.
    """
    offers = {o.name: o.build for o in registry.rooms()[OF_ROOM["heads"]].offers}
    labelled = classifies(model, x)
    found = offers["heads"](model, x, labels, classes=labelled, seed=seed, compact=True)
    table = {name: values.cpu().numpy() for name, values in found.table.items()}
    order = found.importance.order()
    kept = min(3, len(order))
    told = [", ".join(f"{i}.{h}" for i, h in part) for part in (order[:kept], order[-kept:])]
    lines = [f"most important heads (layer.head): {told[0]}; least: {told[1]}"]
    if not labelled:
        lines.append("the model has no classifier: importance is the change of its features alone")
    reach = found.trend()["distance"].cpu().numpy()
    lines.append(
        f"mean distance of attention: {reach[0]:.2f} patches in the first layer, "
        f"{reach[-1]:.2f} in the last"
    )
    if found.patterns is not None:
        sizes = found.patterns.cluster.bincount().tolist()
        lines.append(f"{len(sizes)} patterns, of {', '.join(map(str, sizes))} heads")
    mass = np.stack([s.mass.cpu().numpy() for s in found.strength])
    # with one image nothing varies, and the table says nothing
    shown = {name: values for name, values in table.items() if name != "content" or len(x) > 1}
    figure = plot(shown, mass, found.patterns, _grid(model, found.patterns))
    result = Look("heads", {**table, "mass": mass}, {"heads": figure}, summary=lines, details=found)
    result.panels.append(Panel("all heads", [("all layers", drawn(figure))]))
    return result


def classifies(model: nn.Module, x: Tensor) -> bool:
    """Whether the model returns logits of a classifier."""
    out = model(x[:1])
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        return False
    get = getattr(model, "get_classifier", None)
    return not (callable(get) and isinstance(get(), nn.Identity))


def _grid(model: nn.Module, patterns: Any) -> tuple[int, int]:
    grid = hosts.find(model).grid or (0, 0)
    count = 0 if patterns is None else patterns.prototypes.shape[-1]
    side = round(count**0.5)
    return grid if grid[0] * grid[1] == count else (side, side)


def plot(table: dict[str, Array], mass: Array, patterns: Any, grid: tuple[int, int]) -> Figure:
    """One page of all heads.

    Args:
        table: by name (L, H).
        mass: (L, H, R) attention at each distance.
        patterns: of the heads, or None.
        grid: (h, w) of the patches.
    """
    from matplotlib.figure import Figure

    shown = [(name, title) for name, title in _TABLES.items() if name in table]
    if "distribution" in table:  # there is more than one metric to rank by
        shown.insert(3, ("rank", "importance: mean rank by all metrics\n(0 = most important)"))
    across = 5 if len(shown) <= 5 else 4
    rows = math.ceil(len(shown) / across)
    figure = Figure(figsize=(13, 3.1 * rows + 4.6), layout="constrained", facecolor="white")
    parts: Any = figure.subfigures(2, 1, height_ratios=(3.1 * rows, 4.6))
    above, below = parts
    flat = above.subplots(rows, across, squeeze=False).flatten()
    for ax, (name, title) in zip(flat, shown, strict=False):
        ax.set_title(title, fontsize=9)
        image = ax.imshow(table[name], aspect="auto", cmap="viridis")
        ax.set_xlabel("head", fontsize=8)
        ax.set_ylabel("layer", fontsize=8)
        ax.locator_params(integer=True)
        above.colorbar(image, ax=ax)
    for ax in flat[len(shown) :]:
        ax.set_axis_off()
    rings, plane, seen = below.subplots(1, 3, width_ratios=(1, 1.15, 1.15))
    _plot_rings(rings, mass)
    _plot_plane(plane, patterns, table)
    _plot_prototypes(seen, patterns, grid)
    return figure


def _plot_rings(ax: Any, mass: Array) -> None:
    """Attention of every head by distance, heads of a layer below one another."""
    layers, count, rings = mass.shape
    image = ax.imshow(mass.reshape(-1, rings) ** 0.5, aspect="auto", cmap="viridis")
    ax.set_title("attention of each head by distance", fontsize=9)
    ax.set_xlabel("distance (patches)", fontsize=8)
    ax.set_ylabel("layer (rows: its heads)", fontsize=8)
    ax.set_yticks([(i + 0.5) * count - 0.5 for i in range(layers)], [str(i) for i in range(layers)])
    for i in range(1, layers):
        ax.axhline(i * count - 0.5, color="white", linewidth=0.6)
    bar = ax.figure.colorbar(image, ax=ax)
    marks = [m for m in (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1) if m <= mass.max()]
    bar.set_ticks([m**0.5 for m in marks], labels=[f"{m:g}" for m in marks])


def _plot_plane(ax: Any, patterns: Any, table: dict[str, Array]) -> None:
    """Heads on the plane of their codes."""
    ax.set_title("map of the heads' patterns (numbers: layer.head)", fontsize=9)
    ax.set_xticks([])
    ax.set_yticks([])
    if patterns is None:
        ax.text(0.5, 0.5, "too few heads", ha="center", va="center", transform=ax.transAxes)
        return
    plane, cluster = patterns.plane.cpu().numpy(), patterns.cluster.cpu().numpy()
    count = int(cluster.max()) + 1
    hues = colours(count) / 255
    across = table["cluster"].shape[1]
    for c in range(count):
        own = plane[cluster == c]
        ax.scatter(*own.T, color=hues[c], s=90, edgecolor="#333333", linewidth=0.5, label=f"{c}")
    for i, point in enumerate(plane):
        label = f"{i // across}.{i % across}"
        ax.annotate(label, point, fontsize=5.5, ha="center", va="center")
    ax.legend(title="pattern", fontsize=7, title_fontsize=7, loc="best")
    ax.margins(0.08)


def _plot_prototypes(ax: Any, patterns: Any, grid: tuple[int, int]) -> None:
    """Where a patch looks, as seen from itself, in each pattern."""
    ax.set_axis_off()
    if patterns is None:
        return
    ax.set_title("patterns: where a patch looks, seen from itself (centre)", fontsize=9)
    prototypes = patterns.prototypes.detach().cpu().numpy()
    sizes = patterns.cluster.bincount().tolist()
    columns = math.ceil(len(sizes) ** 0.5)
    step = 1 / columns
    for c, prototype in enumerate(prototypes):
        left, top = c % columns * step, 1 - (c // columns + 1) * step
        inset = ax.inset_axes((left + 0.02 * step, top + 0.02, 0.92 * step, 0.82 * step))
        inset.imshow(offsets(prototype.clip(0), grid) ** 0.5, cmap="inferno")
        inset.set_title(f"pattern {c}: {sizes[c]} heads", fontsize=7, pad=2)
        inset.set_xticks([])
        inset.set_yticks([])


def offsets(attention: Array, grid: tuple[int, int]) -> NDArray[np.float64]:
    """Mean attention by offset.

    Args:
        attention: (n, n) among the patches of a grid.
        grid: (h, w).

    Returns:
        (2h - 1, 2w - 1), a patch itself in the middle; means over the patches that have another
        one there.
    """
    h, w = grid
    down, right = np.divmod(np.arange(h * w), w)
    row = down[None] - down[:, None] + h - 1
    column = right[None] - right[:, None] + w - 1
    total = np.zeros((2 * h - 1, 2 * w - 1))
    count = np.zeros_like(total)
    np.add.at(total, (row, column), attention)
    np.add.at(count, (row, column), 1)
    return total / count
