"""Logits and weighted sums of windows that are cut at the borders, as numbers to work with.

Where a method needs the logits of a window themselves (more keys join the softmax, weights are
changed behind it), these two make and use them: (B, h, w, H, K·K), the window in row-major order.
Unlike in the fused operator, a window is centred everywhere and part of it may lie outside the
grid; :func:`inside` tells which. Keys and values there count as zero.

The window is never copied out: one offset at a time is a shifted view of the padded map, in the
backward pass as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def inside(grid: tuple[int, int], size: int, device: torch.device | None = None) -> Tensor:
    """(h, w, size·size) bool: does this place of the window lie on the grid?"""
    shifts = torch.arange(size, device=device) - size // 2
    axes = [torch.arange(n, device=device)[:, None] + shifts for n in grid]
    rows, columns = ((a >= 0) & (a < n) for a, n in zip(axes, grid, strict=True))
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2)


def _padded(x: Tensor, size: int) -> Tensor:
    reach = size // 2
    return F.pad(x, (0, 0, 0, 0, reach, size - 1 - reach, reach, size - 1 - reach))


def _shifted(padded: Tensor, grid: tuple[int, int], size: int) -> Iterator[Tensor]:
    """The map as each place of the window sees it; views."""
    h, w = grid
    for row in range(size):
        for column in range(size):
            yield padded[:, row : row + h, column : column + w]


def _dots(x: Tensor, y: Tensor, size: int) -> Tensor:
    """X at each position times y at each place of its window, summed over channels."""
    grid = (x.shape[1], x.shape[2])
    return torch.stack(
        [torch.linalg.vecdot(x, s) for s in _shifted(_padded(y, size), grid, size)], -1
    )


def _gathered(weight: Tensor, y: Tensor, size: int) -> Tensor:
    """Sum over the window of weight times y."""
    grid = (y.shape[1], y.shape[2])
    out = torch.zeros((), dtype=y.dtype, device=y.device)
    for one, s in zip(weight.unbind(-1), _shifted(_padded(y, size), grid, size), strict=True):
        out = torch.addcmul(out, one[..., None], s)
    return out


def _spread(weight: Tensor, x: Tensor, size: int) -> Tensor:
    """The transpose of :func:`_gathered`: each position gives weight times x to its window."""
    grid = (x.shape[1], x.shape[2])
    target = torch.zeros_like(_padded(x, size))
    for one, place in zip(weight.unbind(-1), _shifted(target, grid, size), strict=True):
        place.addcmul_(one[..., None], x)
    reach = size // 2
    return target[:, reach : reach + grid[0], reach : reach + grid[1]]


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(q, k)
        ctx.size = size
        return _dots(q, k, size)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        q, k = ctx.saved_tensors
        return _gathered(d, k, ctx.size), _spread(d, q, ctx.size), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, v: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(weight, v)
        ctx.size = size
        return _gathered(weight, v, size)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        weight, v = ctx.saved_tensors
        return _dots(d, v, ctx.size), _spread(weight, d, ctx.size), None


def window_logits(q: Tensor, k: Tensor, size: int) -> Tensor:
    """q·k for every place of a centred window, without scale.

    Args:
        q, k: (B, h, w, H, d).
        size: positions of the window along both axes.

    Returns:
        (B, h, w, H, size·size); zero outside the grid.
    """
    dtype = torch.promote_types(q.dtype, k.dtype)  # under autocast norms are wider than products
    q, k = q.to(dtype), k.to(dtype)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _Logits.apply(q, k, size)
    return _dots(q, k, size)


def window_sum(weight: Tensor, v: Tensor, size: int) -> Tensor:
    """Weighted sum over a centred window.

    Args:
        weight: (B, h, w, H, size·size); without effect outside the grid.
        v: (B, h, w, H, d).
        size: positions of the window along both axes.

    Returns:
        (B, h, w, H, d).
    """
    dtype = torch.promote_types(weight.dtype, v.dtype)
    weight, v = weight.to(dtype), v.to(dtype)
    if torch.is_grad_enabled() and (weight.requires_grad or v.requires_grad):
        return _Sum.apply(weight, v, size)
    return _gathered(weight, v, size)
