"""Token fates: which patches of a picture were kept, merged or dropped, drawn on the picture.

with transom.trace(model) as trace:
    model(images)
record = trace.tokens[-1]
drawn = draw_fates(picture, record.index[0], record.layout)
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transom import api
from transom.errors import DataError, FitError, TokensError
from transom.lens.drawing import montage
from transom.lens.seen import Given, Look, with_panels
from transom.tokens import Layout

Pixels = NDArray[np.uint8]
Dropped = Literal["dim", "hide"]

_DIM = 0.22  # brightness that is left of a dropped patch
_HIDDEN = 128  # grey of a dropped patch when it is hidden


def fates(given: Given) -> Look:
    """Where a fitted method sends the tokens of pictures.

    Returns:
        arrays index (L, B, N0).

    Raises:
        FitError: nothing that moves tokens is fitted.
    """
    model, x, names, pixels = given
    if not api.fittings(model):
        raise FitError(
            "fates shows where a method sends the tokens, but nothing is fitted to this model; "
            "fit one first: transom.apply(model, 'tome'), or --method tome"
        )
    with api.trace(model) as trace:
        model(x)
    records = trace.tokens
    index = [record.index for record in records]
    if not index or any(i is None for i in index):
        raise FitError("no provenance was recorded; fit a method that moves tokens")
    places = torch.stack([i for i in index if i is not None]).cpu()  # (L, B, N0)
    layout = records[-1].layout
    lines = [f"tokens behind each layer: {' → '.join(map(str, trace.lengths))}"]
    for b, name in enumerate(names):
        last = places[-1, b, layout.prefix :]
        own = last[last >= 0].bincount()
        alone, merged = int((own == 1).sum()), int((own > 1).sum())
        lines.append(
            f"{name}: {alone} patches stayed alone, {int(own[own > 1].sum())} became {merged} "
            f"tokens, {int((last < 0).sum())} were dropped"
        )
    frames = [
        [
            (f"layer {i}", montage([("", pic), ("", draw_fates(pic, places[i, b], layout))]))
            for i in range(len(places))
        ]
        for b, pic in enumerate(pixels)
    ]
    return with_panels(Look("fates", {"index": places.numpy()}, summary=lines), names, frames)


def draw_fates(
    image: Pixels,
    index: Tensor | NDArray[np.int64],
    layout: Layout,
    dropped: Dropped = "dim",
) -> Pixels:
    """Draw where every patch of one picture went.

    Patches that became one token share their mean colour and the colour of their outline, also
    where they lie apart. A patch that stayed alone is as it was, a dropped one is dark.

    Args:
        image: (H, W, 3) as the model saw it, not normalised; any multiple of the grid looks best.
        index: (N0,) current position of every original token, -1 where dropped, for example
            `trace.tokens[-1].index[0]`.
        layout: Of the original sequence, with a grid.
        dropped: "dim" darkens dropped patches, "hide" paints them grey.

    Returns:
        (H, W, 3), a new picture.

    Raises:
        DataError: If the picture is not uint8 (H, W, 3), or smaller than the grid.
        TokensError: If the grid is not known, or the index does not belong to the layout.
    """
    if dropped not in ("dim", "hide"):
        raise DataError(f"dropped={dropped!r}: expected 'dim' or 'hide'")
    groups = _groups(index, layout)  # (h, w)
    height, width = groups.shape
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(
            f"got a picture of shape {image.shape} and type {image.dtype}; expected uint8 (H, W, 3)"
        )
    if image.shape[0] < height or image.shape[1] < width:
        raise DataError(
            f"the picture has {image.shape[0]}×{image.shape[1]} pixels, but the grid "
            f"{height}×{width} patches; a patch needs at least one pixel"
        )
    rows, columns = _cells(image.shape[0], height), _cells(image.shape[1], width)
    places = groups[rows[:, None], columns[None, :]]  # (H, W): the group of every pixel
    merged = _merged(groups)
    drawn = _fill(image, places, merged)
    gone = places < 0
    if dropped == "dim":
        drawn[gone] = drawn[gone] * _DIM
    else:
        drawn[gone] = _HIDDEN
    _outline(drawn, places, merged, thickness=max(1, round(image.shape[0] / height / 12)))
    return drawn.round().astype(np.uint8)


def _groups(index: Tensor | NDArray[np.int64], layout: Layout) -> NDArray[np.int64]:
    values = np.asarray(index.cpu() if isinstance(index, Tensor) else index)
    if layout.grid is None:
        raise TokensError(
            "the grid of the patches is not known, so they have no place in the picture; run the "
            "host at its own image size"
        )
    if values.shape != (layout.count,) or layout.count - layout.prefix != np.prod(layout.grid):
        raise TokensError(
            f"got an index of shape {values.shape} for a layout of {layout.count} tokens "
            f"({layout.prefix} of them prefix) and the grid {layout.grid}; expected the index "
            "(N0,) of one image from the same trace"
        )
    return values[layout.prefix :].reshape(layout.grid)


def _cells(pixels: int, count: int) -> NDArray[np.int64]:
    """For every pixel along one side the patch that it belongs to."""
    return np.arange(pixels) * count // pixels


def _merged(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """The groups that hold more than one patch."""
    present, counts = np.unique(groups[groups >= 0], return_counts=True)
    return present[counts > 1]


def _fill(
    image: Pixels, places: NDArray[np.int64], merged: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Paint every merged group in the mean colour of its pixels."""
    drawn = image.astype(np.float64)
    inside = np.isin(places, merged)
    if not inside.any():
        return drawn
    members = places[inside]
    total = members.max() + 1
    counts = np.bincount(members, minlength=total)
    for channel in range(3):
        sums = np.bincount(members, weights=drawn[inside][:, channel], minlength=total)
        means = sums / np.maximum(counts, 1)
        drawn[..., channel][inside] = means[members]
    return drawn


def _outline(
    drawn: NDArray[np.float64],
    places: NDArray[np.int64],
    merged: NDArray[np.int64],
    thickness: int,
) -> None:
    """Line the inner edge of every merged group, in a colour of its own."""
    padded = np.pad(places, thickness, mode="edge")
    height, width = places.shape
    edge = np.zeros(places.shape, dtype=bool)
    for step in range(-thickness, thickness + 1):
        for down, right in ((step, 0), (0, step)):
            top, left = thickness + down, thickness + right
            edge |= padded[top : top + height, left : left + width] != places
    edge &= np.isin(places, merged)
    if edge.any():
        drawn[edge] = _colours(int(places.max()) + 1)[places[edge]]


def _colours(count: int) -> NDArray[np.float64]:
    """(count, 3) light colours 0 … 255; neighbours in number are far apart in hue."""
    hue = np.arange(count) * 0.618034 % 1.0  # steps of the golden ratio never come close to a round
    ramp = np.abs((hue[:, None] * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1  # (count, 3)
    return 255 * (0.5 + 0.5 * np.clip(ramp, 0, 1))
