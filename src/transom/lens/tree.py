"""The lens on dependency trees: which patch hangs on which, and the parts that subtrees make.

Graph and tree are those of the room `dependency-vit`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from transom import api, hosts, registry
from transom.errors import HostError, TokensError
from transom.lens.drawing import Pixels, colours, montage, tint
from transom.lens.seen import OF_ROOM, Array, Given, Look, with_panels

_SLUG = OF_ROOM["tree"]
_PARTS = (10, 20)  # about how many parts a picture is cut into
_SIDE = 320  # pixels of a tile


def tree(given: Given) -> Look:
    """Grow the tree of every picture, over all layers, the second half, and the last quarter.

    Returns:
        arrays mask (R, B, T, T), rows receive, columns send; parents (R, B, T), -1 for the root;
        share (R, B, T) of the edge to the parent; parts (R, B, S, h, w), the top of the subtree
        that a patch is in. R ranges of layers, T patches, S sizes of parts. details: the trees.

    Raises:
        HostError, TokensError: the model holds no graph over the patches.
    """
    room = registry.rooms()[_SLUG]
    offers = {offer.name: offer.build for offer in room.offers}
    own = isinstance(given.model, room.module.DependencyViT)
    depth = len(given.model.blocks) if own else hosts.find(given.model).depth  # type: ignore[arg-type]
    starts = sorted({0, depth // 2, 3 * depth // 4})
    ranges = [tuple(range(start, depth)) for start in starts]
    masks = [offers["dependency-mask"](given.model, given.x, layers) for layers in ranges]
    grid = _grid(given, masks[0].shape[-1])
    trees = [[offers["dependency-tree"](each) for each in mask] for mask in masks]
    told = [f"layers {start} to {depth - 1}" if start else "all layers" for start in starts]
    sizes = [max(2, round(grid[0] * grid[1] / parts)) for parts in _PARTS]
    lines = []
    if own or _SLUG in {fitting.slug for fitting in api.fittings(given.model)}:
        lines.append("the graph is that of the model's reversed attention")
    else:
        lines.append(
            "this model attends as usual: its attention was read turned around, so the tree says "
            "where patches look, not what a model with reversed attention has learnt "
            f"(fit and train {_SLUG!r}, or load a trained one, for that)"
        )
    for b, name in enumerate(given.names):
        each = trees[0][b]
        row, column = divmod(each.root, grid[1])
        near = _near(each.parents, grid)
        lines.append(
            f"{name}: the root is the patch in row {row}, column {column}; the tree over all "
            f"layers is {each.depths.max()} deep, {len(each.leaves)} of {len(each.parents)} "
            f"patches are leaves, {100 * near:.0f} % hang on a neighbour"
        )
    frames = [
        [
            (range_, _frame(picture, grown[b], grid, sizes))
            for range_, grown in zip(told, trees, strict=True)
        ]
        for b, picture in enumerate(given.pixels)
    ]
    parts = [[[t.cut(size).reshape(grid) for size in sizes] for t in row] for row in trees]
    arrays: dict[str, Array] = {
        "mask": np.stack([mask.cpu().numpy() for mask in masks]),
        "parents": np.stack([[t.parents for t in row] for row in trees]),
        "share": np.stack([[t.share for t in row] for row in trees]),
        "parts": np.array(parts),
    }
    return with_panels(
        Look("tree", arrays, summary=lines, details=trees), given.names, frames, "graph of"
    )


def _near(parents: NDArray[np.int64], grid: tuple[int, int]) -> float:
    """Part of the patches whose parent is one of the eight around them."""
    child = np.flatnonzero(parents >= 0)
    down = np.abs(child // grid[1] - parents[child] // grid[1])
    right = np.abs(child % grid[1] - parents[child] % grid[1])
    return float((np.maximum(down, right) == 1).mean()) if len(child) else 0.0


def _frame(picture: Pixels, grown: Any, grid: tuple[int, int], sizes: list[int]) -> Pixels:
    """The picture, the tree on it, and its parts in colours, coarse and fine."""
    factor = _SIDE / min(picture.shape[:2])
    size = (round(picture.shape[1] * factor), round(picture.shape[0] * factor))
    large = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
    cuts = [np.unique(grown.cut(size), return_inverse=True)[1] for size in sizes]
    hues = [colours(int(cut.max()) + 1) for cut in cuts]
    tiles = [("", large), ("tree", _lines(large, grown, grid, hues[0][cuts[0]]))]
    for cut, hue, least in zip(cuts, hues, sizes, strict=True):
        tiles.append((f"subtrees of {least} patches or more", tint(large, cut.reshape(grid), hue)))
    return montage(tiles, side=_SIDE)


def _lines(picture: Pixels, grown: Any, grid: tuple[int, int], hues: NDArray[np.uint8]) -> Pixels:
    """A line from every patch to its parent, in the colours (T, 3) of the patches."""
    fine = 3  # drawn larger and shrunk, for smooth lines
    high, wide = picture.shape[0] * fine, picture.shape[1] * fine
    page = Image.fromarray((0.45 * picture).astype(np.uint8)).resize((wide, high))
    pen = ImageDraw.Draw(page)
    step = (high / grid[0], wide / grid[1])
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    x, y = (columns + 0.5) * step[1], (rows + 0.5) * step[0]
    thick, dot = max(1, round(min(step) / 10)), min(step) / 9
    for child, parent in enumerate(grown.parents):
        hue = tuple(int(c) for c in hues[child])
        if parent >= 0:
            pen.line((x[child], y[child], x[parent], y[parent]), fill=hue, width=thick)
        pen.ellipse((x[child] - dot, y[child] - dot, x[child] + dot, y[child] + dot), fill=hue)
    root, half = grown.root, min(step) / 3
    corners = (x[root] - half, y[root] - half, x[root] + half, y[root] + half)
    pen.rectangle(corners, fill="white", outline="black", width=thick)
    return np.asarray(page.resize((wide // fine, high // fine), Image.Resampling.LANCZOS))


def _grid(given: Given, count: int) -> tuple[int, int]:
    try:
        grid = hosts.find(given.model).grid
    except HostError:
        grid = getattr(getattr(given.model, "patch_embed", None), "grid_size", None)
    if grid is None or grid[0] * grid[1] != count:
        side = round(count**0.5)
        grid = (side, side)
    if grid[0] * grid[1] != count:
        raise TokensError(
            f"{count} patches make no grid that is known; look at images of the host's own size"
        )
    return int(grid[0]), int(grid[1])
