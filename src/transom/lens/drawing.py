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

_BAR = 16  # pixels of the line of text over a tile
_GAP = 4  # pixels between tiles

# light enough to be told apart on a photograph, far apart in hue from one to the next
_PALETTE = (
    (255, 196, 0),
    (0, 176, 255),
    (255, 77, 109),
    (56, 217, 122),
    (179, 102, 255),
    (255, 140, 46),
    (0, 220, 220),
    (255, 133, 216),
    (170, 210, 40),
    (120, 140, 255),
    (214, 158, 112),
    (190, 200, 210),
)


def colours(count: int) -> NDArray[np.uint8]:
    """(count, 3) of things to be told apart; they repeat after twelve."""
    return np.array([_PALETTE[i % len(_PALETTE)] for i in range(count)], dtype=np.uint8)


def overlay(
    picture: Pixels, values: NDArray[Any], strength: float = 0.65, clip: float = 1.0
) -> Pixels:
    """A map (h, w) as colours on a picture (H, W, 3); the largest value is brightest.

    With a clip below 1 everything above that quantile is as bright as the quantile.
    """
    from matplotlib import colormaps

    low, high = float(values.min()), float(np.quantile(values, clip))
    values = values.clip(low, high)
    scaled = (values - low) / (high - low) if high > low else np.zeros(values.shape)
    height, width = picture.shape[:2]
    large = Image.fromarray((255 * scaled).astype(np.uint8))
    grown = np.asarray(large.resize((width, height), Image.Resampling.BICUBIC)) / 255
    colour = 255 * colormaps["inferno"](grown)[..., :3]
    # what is looked at stays visible, the rest sinks into the dark end of the colours
    mixed = (1 - strength) * picture + strength * colour
    return mixed.round().clip(0, 255).astype(np.uint8)


def mark(picture: Pixels, share: NDArray[Any], hue: Any = _PALETTE[0]) -> Pixels:
    """Patches (h, w) stand out by a share of 0 ... 1, with a line around those above a half."""
    height, width = picture.shape[:2]
    large = _nearest(share.astype(float), height, width)
    drawn = picture * (0.25 + 0.75 * large[..., None])
    thick = max(1, round(min(height / share.shape[0], width / share.shape[1]) / 8))
    chosen = large > 0.5
    drawn[_edges(chosen, thick) & chosen] = hue
    return drawn.round().astype(np.uint8)


def tint(
    picture: Pixels,
    place: NDArray[np.int64],
    hues: NDArray[np.uint8],
    strength: float = 0.6,
) -> Pixels:
    """Patches in the colours of what they belong to, with a line where that changes.

    Args:
        picture: (H, W, 3).
        place: (h, w) number of the colour; -1 leaves the picture as it is, but dark.
        hues: (K, 3).
        strength: of the colour; the rest is the brightness of the picture.
    """
    height, width = picture.shape[:2]
    large = _nearest(place, height, width)
    grey = picture.mean(-1, keepdims=True)
    drawn = (1 - strength) * (0.3 * picture + 0.7 * grey) + strength * hues[large] * (
        0.35 + 0.65 * grey / 255
    )
    drawn = np.where(large[..., None] < 0, 0.4 * picture, drawn)
    thick = max(1, round(min(height / place.shape[0], width / place.shape[1]) / 10))
    edge = _edges(large, thick) & (large >= 0)
    drawn[edge] = hues[large[edge]]
    return drawn.round().clip(0, 255).astype(np.uint8)


def _nearest(place: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    rows = np.arange(height) * place.shape[0] // height
    columns = np.arange(width) * place.shape[1] // width
    return np.asarray(place[rows[:, None], columns])


def _edges(place: NDArray[Any], thick: int) -> NDArray[np.bool_]:
    """Pixels less than `thick` away from another number."""
    padded = np.pad(place, thick, mode="edge")
    height, width = place.shape
    edge = np.zeros(place.shape, dtype=bool)
    for step in range(-thick, thick + 1):
        for down, right in ((step, 0), (0, step)):
            top, left = thick + down, thick + right
            edge |= padded[top : top + height, left : left + width] != place
    return edge


def montage(
    tiles: list[tuple[str, Pixels]],
    *,
    side: int | None = None,
    columns: int | None = None,
    chips: list[Any] | None = None,
) -> Pixels:
    """Pictures of one size in rows, each with its name above.

    Args:
        tiles: names and pictures.
        side: pixels of a tile's shorter side; few tiles are larger by default.
        columns: in a row; at most 9 by default.
        chips: a colour (or None) for each tile, shown as a square before its name.
    """
    height, width = tiles[0][1].shape[:2]
    side = side or (256 if len(tiles) <= 4 else 160)
    factor = side / min(height, width)
    size = (round(width * factor), round(height * factor))
    columns = min(len(tiles), columns or 9)
    rows = math.ceil(len(tiles) / columns)
    bar = _BAR if any(name for name, _ in tiles) else 0
    across, down = size[0] + _GAP, size[1] + bar + _GAP
    page = Image.new("RGB", (columns * across - _GAP, rows * down - _GAP), "white")
    pen = ImageDraw.Draw(page)
    for i, (name, tile) in enumerate(tiles):
        left, top = i % columns * across, i // columns * down
        if chips is not None and chips[i] is not None:
            fill = tuple(int(c) for c in chips[i])
            pen.rectangle((left + 1, top + 3, left + 10, top + 12), fill=fill, outline="#444444")
            pen.text((left + 15, top + 2), name, fill="black")
        else:
            pen.text((left + 2, top + 2), name, fill="black")
        page.paste(Image.fromarray(tile).resize(size, Image.Resampling.BICUBIC), (left, top + bar))
    return np.asarray(page)


def sheet(title: str, frames: list[tuple[str, Pixels]]) -> Figure:
    """All frames in the columns that make the page most nearly square."""
    from matplotlib.figure import Figure

    height, width = frames[0][1].shape[:2]
    columns = max(1, min(len(frames), round(math.sqrt(len(frames) * height / width * 1.2))))
    rows = math.ceil(len(frames) / columns)
    wide = min(16.0 / columns, width / 110)  # inches of a frame
    high, bar, head = wide * height / width, 0.28, 0.4
    across, down = columns * (wide + 0.1) + 0.1, head + rows * (high + bar)
    figure = Figure(figsize=(across, down), facecolor="white")
    figure.suptitle(title, fontsize=11, y=1 - 0.1 / down, va="top")
    for i, (name, pixels) in enumerate(frames):
        left = 0.1 + i % columns * (wide + 0.1)
        below = down - head - (i // columns + 1) * (high + bar)
        ax = figure.add_axes((left / across, below / down, wide / across, high / down))
        ax.imshow(pixels, aspect="auto")
        ax.set_axis_off()
        ax.set_title(name, fontsize=9, loc="left", pad=3)
    return figure
