"""Dependency trees: every token below its main parent, the parts below a node, a drawing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from transom.errors import DataError, SettingsError, TokensError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class DependencyTree:
    """A tree over N tokens.

    Attributes:
        parents: (N,) parent of every token; -1 for the root.
        share: (N,) weight of the edge to the parent; 0 for the root.
    """

    parents: Ints
    share: Floats

    @property
    def root(self) -> int:
        """The token without a parent."""
        return int(np.flatnonzero(self.parents < 0)[0])

    @property
    def order(self) -> Ints:
        """(N,) all tokens, parents before children."""
        return np.argsort(self.depths, kind="stable")

    @property
    def depths(self) -> Ints:
        """(N,) edges between every token and the root."""
        depth = np.zeros(len(self.parents), dtype=np.int64)
        above = self.parents.copy()
        while (above >= 0).any():
            depth += above >= 0
            above = np.where(above >= 0, self.parents[above], -1)
        return depth

    @property
    def leaves(self) -> Ints:
        """Tokens that are nobody's parent."""
        return np.setdiff1d(np.arange(len(self.parents)), self.parents)

    def subtree(self, node: int) -> Ints:
        """A token and all below it, in rising order.

        Raises:
            TokensError: there is no such token.
        """
        if not 0 <= node < len(self.parents):
            raise TokensError(
                f"node is {node}, but the tree has tokens 0 to {len(self.parents) - 1}"
            )
        below = np.zeros(len(self.parents), dtype=bool)
        below[node] = True
        for token in self.order:
            below[token] |= self.parents[token] >= 0 and below[self.parents[token]]
        return np.flatnonzero(below)

    def parts(self, level: int = 1) -> Ints:
        """The subtrees whose tops are `level` edges below the root.

        Args:
            level: 0 gives one part.

        Returns:
            (N,) the top of the subtree every token is in; tokens above that level are tops of
            their own.

        Raises:
            SettingsError: the level is below 0.
        """
        if level < 0:
            raise SettingsError(f"level is {level}; expected at least 0")
        top = np.arange(len(self.parents))
        depth = self.depths
        for token in self.order:
            if depth[token] > level:
                top[token] = top[self.parents[token]]
        return top

    def cut(self, least: int) -> Ints:
        """Parts of a size: the smallest subtrees with so many tokens, cut off from the leaves up.

        A tree may be deep on one side only; these parts do not depend on how deep they lie.

        Args:
            least: tokens of a part; only what is left with the root may be smaller.

        Returns:
            (N,) the top of the part every token is in.

        Raises:
            SettingsError: `least` is below 1.
        """
        if least < 1:
            raise SettingsError(f"least is {least}; expected at least 1")
        size = np.ones(len(self.parents), dtype=np.int64)
        top = np.full(len(self.parents), -1, dtype=np.int64)
        order = self.order
        for token in order[::-1]:
            if size[token] >= least or self.parents[token] < 0:
                top[token] = token
            else:
                size[self.parents[token]] += size[token]
        for token in order:
            if top[token] < 0:
                top[token] = top[self.parents[token]]
        return top


def grow(mask: Tensor | Floats, root: int | None = None) -> DependencyTree:
    """The tree of a soft graph: the arborescence with the largest sum of shares.

    Where the main parents of all tokens make no circle, these are the parents.

    Args:
        mask: (N, N), row i receives (parent), column j sends (child); summed over layers.
        root: None takes the token that receives most, from itself too.

    Raises:
        TokensError: the mask is not square, or holds values that are not finite; or there is no
            such token.
    """
    given = mask.detach().cpu().double().numpy() if isinstance(mask, Tensor) else mask
    weight: Floats = np.asarray(given, dtype=np.float64)
    if weight.ndim != 2 or weight.shape[0] != weight.shape[1] or not len(weight):
        raise TokensError(
            f"got a mask of shape {weight.shape}; expected (N, N) of one image, receivers in rows"
        )
    if not np.isfinite(weight).all():
        raise TokensError("the mask holds values that are not finite; look at the features")
    top = int(weight.sum(1).argmax()) if root is None else root
    if not 0 <= top < len(weight):
        raise TokensError(f"root is {root}, but there are tokens 0 to {len(weight) - 1}")
    parents = _arborescence(weight, top)
    share = np.where(parents < 0, 0.0, weight[parents, np.arange(len(weight))])
    return DependencyTree(parents, share)


def _arborescence(weight: Floats, root: int) -> Ints:
    """Chu, Liu and Edmonds: best parent of each token, circles contracted until none is left."""
    count = len(weight)
    free = weight.copy()
    np.fill_diagonal(free, -np.inf)
    parents: Ints = free.argmax(0).astype(np.int64)
    parents[root] = -1
    circles = _circles(parents)
    if not circles:
        return parents
    label = np.full(count, -1, dtype=np.int64)
    for number, circle in enumerate(circles):
        label[circle] = number
        # to enter a circle somewhere, the edge there before is given up
        free[:, circle] -= weight[parents[circle], circle]
    alone = np.flatnonzero(label < 0)
    label[alone] = len(circles) + np.arange(len(alone))
    groups = [*circles, *(alone[i : i + 1] for i in range(len(alone)))]
    # best edge from group to group, and between which tokens it is
    start = np.stack([group[free[group].argmax(0)] for group in groups])  # (G, N) senders' parents
    best = np.take_along_axis(free, start, 0)  # (G, N)
    end = np.stack([group[best[:, group].argmax(1)] for group in groups], 1)  # (G, G)
    above = _arborescence(np.take_along_axis(best, end, 1), int(label[root]))
    for child, parent in enumerate(above):
        if parent >= 0:
            token = end[parent, child]
            parents[token] = start[parent, token]
    return parents


def _circles(parents: Ints) -> list[Ints]:
    """The circles of a graph in which each token has at most one parent."""
    seen = np.full(len(parents), -1, dtype=np.int64)  # by which walk
    found = []
    for begin in range(len(parents)):
        token = begin
        while token >= 0 and seen[token] < 0:
            seen[token] = begin
            token = int(parents[token])
        if token >= 0 and seen[token] == begin:
            circle, after = [token], int(parents[token])
            while after != token:
                circle.append(after)
                after = int(parents[after])
            found.append(np.array(circle, dtype=np.int64))
    return found


def draw_tree(image: Pixels, tree: DependencyTree, grid: tuple[int, int], level: int = 1) -> Pixels:
    """Draw a tree on its picture: a line from every patch to its parent, in the colour of its part.

    Args:
        image: (H, W, 3) as the model saw it, not normalised.
        tree: over the patches.
        grid: (h, w) of the patches.
        level: of the parts, see :meth:`DependencyTree.parts`.

    Returns:
        (H, W, 3), a new picture; the root is a white square.

    Raises:
        DataError: the picture is not uint8 (H, W, 3), or smaller than the grid.
        TokensError: the tree has not one token a patch.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(
            f"got a picture of shape {image.shape} and type {image.dtype}; expected uint8 (H, W, 3)"
        )
    sides = np.array(image.shape[:2]) / np.array(grid)  # pixels of a patch
    if (sides < 1).any():
        raise DataError(
            f"the picture has {image.shape[0]}×{image.shape[1]} pixels, but the grid "
            f"{grid[0]}×{grid[1]} patches; a patch needs at least one pixel"
        )
    if len(tree.parents) != grid[0] * grid[1]:
        raise TokensError(
            f"the tree has {len(tree.parents)} tokens, but the grid {grid} {grid[0] * grid[1]} "
            "patches; leave the prefix out of the mask"
        )
    drawn = image.copy()
    tops, place = np.unique(tree.parts(level), return_inverse=True)
    hue = _hues(len(tops))[place]  # (N, 3)
    centre = (np.stack(np.divmod(np.arange(len(hue)), grid[1]), 1) + 0.5) * sides
    for child, parent in enumerate(tree.parents):
        if parent >= 0:
            length = int(np.abs(centre[child] - centre[parent]).max()) + 1
            steps = np.linspace(0, 1, length + 1)[:, None]
            points = (centre[child] + steps * (centre[parent] - centre[child])).astype(np.int64)
            drawn[points[:, 0], points[:, 1]] = hue[child]
    (top, left), half = centre[tree.root].astype(np.int64), max(1, int(sides.min() / 6))
    drawn[max(0, top - half) : top + half + 1, max(0, left - half) : left + half + 1] = 255
    return drawn


def _hues(count: int) -> NDArray[np.uint8]:
    """(count, 3) light colours; neighbours in number are far apart in hue."""
    turn = np.arange(count) * 0.618034 % 1.0
    ramp = np.abs((turn[:, None] * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1
    return np.asarray(255 * (0.4 + 0.6 * np.clip(ramp, 0, 1)), dtype=np.uint8)
