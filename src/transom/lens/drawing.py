"""Maps on pictures, side by side, and figures of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pixels = NDArray[np.uint8]

_TILE = 128  # pixels of a tile's shorter side
_BAR = 16  # pixels of the line of text over a tile


def overlay(picture: Pixels, values: NDArray[Any], strength: float = 0.65) -> Pixels:
    """A map (h, w) as colours on a picture (H, W, 3); the largest value is brightest."""
    from matplotlib import colormaps

    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low) if high > low else np.zeros(values.shape)
    height, width = picture.shape[:2]
    large = Image.fromarray((255 * scaled).astype(np.uint8))
    grown = np.asarray(large.resize((width, height), Image.Resampling.BICUBIC)) / 255
    colour = 255 * colormaps["inferno"](grown)[..., :3]
    # what is looked at stays visible, the rest sinks into the dark end of the colours
    mixed = (1 - strength) * picture + strength * colour
    return mixed.round().clip(0, 255).astype(np.uint8)


def montage(tiles: list[tuple[str, Pixels]]) -> Pixels:
    """Pictures of one size in rows, each with its name above."""
    height, width = tiles[0][1].shape[:2]
    factor = _TILE / min(height, width)
    size = (round(width * factor), round(height * factor))
    columns = min(len(tiles), 9)
    rows = math.ceil(len(tiles) / columns)
    page = Image.new("RGB", (columns * (size[0] + 4), rows * (size[1] + _BAR + 4)), "white")
    pen = ImageDraw.Draw(page)
    for i, (name, tile) in enumerate(tiles):
        left, top = i % columns * (size[0] + 4), i // columns * (size[1] + _BAR + 4)
        pen.text((left + 2, top + 2), name, fill="black")
        page.paste(Image.fromarray(tile).resize(size, Image.Resampling.BICUBIC), (left, top + _BAR))
    return np.asarray(page)


def sheet(title: str, frames: list[tuple[str, Pixels]]) -> Figure:
    """All frames below one another."""
    from matplotlib.figure import Figure

    height, width = frames[0][1].shape[:2]
    across = min(12.0, width / 100)
    each = across * height / width
    figure = Figure(figsize=(across + 1.2, each * len(frames) + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(len(frames), 1, squeeze=False)[:, 0]
    for ax, (name, pixels) in zip(axes, frames, strict=True):
        ax.imshow(pixels)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_frame_on(False)
        ax.set_ylabel(name, fontsize=8)
    return figure


def plot_heads(table: dict[str, NDArray[Any]], mass: NDArray[Any], patterns: Any) -> Figure:
    """One overview of all heads.

    Args:
        table: by name (L, H).
        mass: (L, H, R) attention at each distance.
        patterns: of the heads, or None.
    """
    from matplotlib.figure import Figure

    everything = [
        ("distribution", "importance: Jensen-Shannon divergence (nats)"),
        ("confidence_predicted", "importance: fall of confidence"),
        ("rank", "importance: mean rank (0 = most)"),
        ("distance", "mean distance of attention (patches)"),
        ("self", "attention on oneself"),
        ("entropy", "entropy of attention (nats)"),
        ("content", "part of the attention that depends on the image"),
    ]
    shown = [(name, title) for name, title in everything if name in table]
    rows = math.ceil((len(shown) + 2) / 3)
    figure = Figure(figsize=(13, 0.5 + 3.2 * rows), layout="constrained")
    flat = figure.subplots(rows, 3).flatten()
    for ax, (name, title) in zip(flat, shown, strict=False):
        ax.set_title(title, fontsize=9)
        image = ax.imshow(table[name], aspect="auto", cmap="viridis")
        ax.set_xlabel("head")
        ax.set_ylabel("layer")
        ax.locator_params(integer=True)
        figure.colorbar(image, ax=ax)
    rings, plane = flat[len(shown)], flat[len(shown) + 1]
    image = rings.imshow(mass.mean(1), aspect="auto", cmap="viridis")
    rings.set_title("attention by distance, mean of heads", fontsize=9)
    rings.set_xlabel("distance (patches)")
    rings.set_ylabel("layer")
    rings.locator_params(integer=True)
    figure.colorbar(image, ax=rings)
    _plot_patterns(plane, patterns, table)
    for ax in flat[len(shown) + 2 :]:
        ax.set_axis_off()
    return figure


def _plot_patterns(ax: Any, patterns: Any, table: dict[str, NDArray[Any]]) -> None:
    """Heads on the plane of their codes, with the prototype of each cluster."""
    ax.set_title("patterns of heads (numbers: layer)", fontsize=9)
    if patterns is None:
        ax.text(0.5, 0.5, "too few heads", ha="center", va="center")
        ax.set_axis_off()
        return
    plane, cluster = patterns.plane.cpu().numpy(), patterns.cluster.cpu().numpy()
    ax.scatter(plane[:, 0], plane[:, 1], c=cluster, cmap="tab20", s=26)
    across = table["cluster"].shape[1]
    for i, (x, y) in enumerate(plane):
        ax.annotate(str(i // across), (x, y), fontsize=6)
    prototypes = patterns.prototypes.detach().cpu().numpy()
    for c, prototype in enumerate(prototypes[:8]):
        inset = ax.inset_axes((c / 8 + 0.005, -0.32, 0.115, 0.16))
        inset.imshow(prototype.clip(0) ** 0.5, cmap="inferno")  # single patches get little
        inset.set_title(f"{c}", fontsize=6, pad=1)
        inset.set_xticks([])
        inset.set_yticks([])
