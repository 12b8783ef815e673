"""Attention strength by distance."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from transom.errors import TokensError

Grid = tuple[int, int]


class Strength(NamedTuple):
    """Spatial profile of heads; leading dimensions as those of the attention without images.

    mass: (H, R) attention on patches at Chebyshev distance 0 ... R - 1.
    density: (H, R) the same for one patch at that distance, over queries that have one.
    prefix: (H,) attention of patches on class and register tokens.
    around: (H, R) attention of the class token on rings around its strongest patch; zeros
        without class token.
    entropy: (H,) of the rows of patches, in nats.
    distance: (H,) sum over k of k · mass_k, in patches.
    """

    mass: Tensor
    density: Tensor
    prefix: Tensor
    around: Tensor
    entropy: Tensor
    distance: Tensor


def rings(grid: Grid, device: torch.device | None = None) -> Tensor:
    """Chebyshev distances (n, n) between the patches of a grid."""
    h, w = grid
    row = torch.arange(h, device=device).repeat_interleave(w)
    column = torch.arange(w, device=device).repeat(h)
    down, right = (row[:, None] - row).abs(), (column[:, None] - column).abs()
    return torch.maximum(down, right)


def strength(attention: Tensor, grid: Grid, prefix: int = 1) -> Strength:
    """How strongly patches attend at each distance. Prefix tokens are in no ring.

    Args:
        attention: (B, H, N, N), rows sum to 1; N = prefix + h · w.
        grid: (h, w) of the patches.
        prefix: class and register tokens in front; the first one counts as class token.

    Returns:
        Means over images and queries.

    Raises:
        TokensError: the attention is not over this grid.
    """
    n = grid[0] * grid[1]
    if attention.dim() != 4 or attention.shape[-2:] != (prefix + n, prefix + n):
        raise TokensError(
            f"got attention of shape {tuple(attention.shape)} for {prefix} prefix tokens and the "
            f"grid {grid}; expected (B, H, {prefix + n}, {prefix + n})"
        )
    attention = attention if attention.dtype == torch.float64 else attention.float()
    where = rings(grid, attention.device)
    count = max(grid)
    member = torch.nn.functional.one_hot(where, count).to(attention.dtype)  # (n, n, R)
    patches = attention[:, :, prefix:, prefix:]
    mass = torch.einsum("bhij,ijk->bhik", patches, member)
    size = member.sum(1)  # (n, R), 0 where no patch is so far away
    queries = (size > 0).to(attention.dtype).sum(0)
    density = (mass / size.clamp_min(1)).mean(0).sum(1) / queries
    rows = attention[:, :, prefix:]
    entropy = -torch.special.xlogy(rows, rows).sum(-1).mean((0, 2))
    mean = mass.mean((0, 2))
    distances = torch.arange(count, device=mean.device, dtype=mean.dtype)
    around = torch.zeros_like(mean)
    if prefix:
        row = attention[:, :, 0, prefix:]  # (B, H, n)
        near = member[row.argmax(-1)]  # (B, H, n, R)
        around = torch.einsum("bhj,bhjk->bhk", row, near).mean(0)
    return Strength(
        mean,
        density,
        rows[..., :prefix].sum(-1).mean((0, 2)),
        around,
        entropy,
        mean @ distances,
    )
