"""What positions contribute: size tables of a stage, and the bias that grows from them."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.ops.neighborhood import unfused

Grid = tuple[int, int]


class Geometry(NamedTuple):
    """Tables of a grid of queries over a grid of pooled keys.

    Attributes:
        coords: (M, 2) float32, distinct relative coordinates on the logarithmic scale.
        pair: (N·P,) int64, which of them belongs to a query and a pooled key.
        inside: (h, w, L) bool, which places of the local window lie on the grid; None where
            there is no window.
        pooled: (h', w') of the pooled keys.
    """

    coords: Tensor
    pair: Tensor
    inside: Tensor | None
    pooled: Grid


def _axis(length: int, pooled: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """Relative coordinates of one axis in rising order, and which one each pair has (L, P).

    A pooled key stands at the mean of the positions that adaptive average pooling puts into it,
    which is a multiple of one half: twice the coordinates are integers.
    """
    keys = [j * length // pooled + -(-(j + 1) * length // pooled) - 1 for j in range(pooled)]
    low, high = -keys[-1], 2 * (length - 1) - keys[0]
    # keys of equal distance leave out every other integer
    step = 1 + all((key - keys[0]) % 2 == 0 for key in keys)
    values = torch.arange(low, high + 1, step, device=device)
    key = torch.arange(pooled, device=device)
    ends = key * length // pooled - (-(key + 1) * length).div(pooled, rounding_mode="floor") - 1
    query = 2 * torch.arange(length, device=device)[:, None]
    return values, (query - ends - low) // step


def geometry(
    grid: Grid,
    pooled: Grid,
    pretrained: Grid,
    window: int | None,
    device: torch.device | None = None,
) -> Geometry:
    """Tables for one size.

    Args:
        grid: (h, w) of the queries.
        pooled: (h', w') of the pooled keys; the grid itself for global attention.
        pretrained: (h, w) at the size the weights were trained at, which fixes the scale of the
            coordinates.
        window: positions of the local window along both axes; None for none.
        device: of the tables.

    Raises:
        SettingsError: there is no pooled key.
    """
    if min(pooled) < 1:
        raise SettingsError(
            f"a grid of {grid[0]} x {grid[1]} pooled to {pooled[0]} x {pooled[1]} leaves no keys; "
            "expected a larger image, a smaller sr_ratio, or a fixed_pool_size"
        )
    lines, places = [], []
    for length, count, trained in zip(grid, pooled, pretrained, strict=True):
        values, place = _axis(length, count, device)
        scaled = values / 2 * (8 / max(trained - 1, 1))
        lines.append(scaled.sign() * (scaled.abs() + 1).log2() / math.log2(8))
        places.append(place)
    coords = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).flatten(0, 1)
    rows, columns = places
    pairs = rows[:, None, :, None] * len(lines[1]) + columns[None, :, None, :]
    seen = None if window is None else unfused.inside(grid, window, device)
    return Geometry(coords, pairs.flatten(), seen, pooled)


class Tables(nn.Module):
    """Tables of one size as buffers outside the state dict; those of other sizes are made anew.

    Buffers keep single precision when the model is cast to half: neighbouring coordinates are
    closer than what that can tell apart.

    Args:
        grid: (h, w) that the tables are made for.
        sr_ratio: positions that are pooled into one key along each axis.
        window: positions of the local window; None for global attention.
        fixed_pool_size: side of the pooled grid instead of a ratio.
        pretrained: (h, w) the weights were trained at.
    """

    coords: Tensor
    pair: Tensor
    inside: Tensor | None

    def __init__(
        self,
        grid: Grid,
        sr_ratio: int,
        window: int | None,
        fixed_pool_size: int | None,
        pretrained: Grid,
    ) -> None:
        super().__init__()
        self.sr_ratio = sr_ratio
        self.window = window
        self.fixed_pool_size = fixed_pool_size
        self.pretrained = pretrained
        for name in ("coords", "pair", "inside"):
            self.register_buffer(name, None, persistent=False)
        self.resize(grid)

    def resize(self, grid: Grid, device: torch.device | None = None) -> None:
        """Keep the tables of another size from now on."""
        self.grid = grid
        made = self._make(grid, device)
        self.coords, self.pair, self.inside, self.pooled = made

    def _make(self, grid: Grid, device: torch.device | None) -> Geometry:
        side = self.fixed_pool_size
        pooled = (grid[0] // self.sr_ratio, grid[1] // self.sr_ratio)
        if side is not None and self.window is not None:
            pooled = (side, side)
        return geometry(grid, pooled, self.pretrained, self.window, device)

    def forward(self, grid: Grid, device: torch.device) -> Geometry:
        """Tables for a call with this grid."""
        if grid == self.grid:
            return Geometry(self.coords, self.pair, self.inside, self.pooled)
        return self._make(grid, device)

    def _apply(self, fn: object, recurse: bool = True) -> Tables:
        before = self.coords
        super()._apply(fn, recurse)
        if self.coords.dtype in (torch.float16, torch.bfloat16):
            self.coords = before.to(self.coords.device)
        return self


class PositionBias(nn.Module):
    """What an attention has for its position bias: fc2(ReLU(fc1(coords))), one value a head.

    Parameters are named as in the official code, inside the attention itself.
    """

    cpb_fc1: nn.Linear
    cpb_fc2: nn.Linear

    def bias(self, coords: Tensor, pair: Tensor, queries: int) -> Tensor:
        """(H, N, P) for the tables of a :class:`Geometry`."""
        hidden = F.relu(self.cpb_fc1(coords.to(self.cpb_fc1.weight.dtype)), inplace=True)
        table = self.cpb_fc2(hidden).mT  # (H, M)
        return table.index_select(1, pair).unflatten(1, (queries, -1))


def stage_sizes(image: Grid, patch: int, stages: int) -> list[Grid]:
    """(h, w) of the map of each stage: convolutions with padding round up."""
    side = [[-(-n // patch)] for n in image]
    for line, _ in itertools.product(side, range(stages - 1)):
        line.append(-(-line[-1] // 2))
    return [(h, w) for h, w in zip(*side, strict=True)]
