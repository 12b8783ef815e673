"""Move whole token rows: the two primitives every token reduction is made of.

``take`` copies rows, ``add_`` accumulates rows. Both work on the flattened (B*N, D) view, where
they are row copies instead of element-wise gathers (an order of magnitude faster on CPUs), and
each has a short twin in :mod:`transom.ops.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _flat(index: Tensor, rows: int) -> Tensor:
    """(B, K) positions within each batch item -> (B*K,) positions in the flattened batch."""
    if index.shape[0] == 1:
        return index.reshape(-1)
    start = torch.arange(index.shape[0], device=index.device) * rows
    return (index + start[:, None]).reshape(-1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of `x` at `index`.

    Args:
        x: (B, N, D).
        index: (B, K) int64 positions along N.

    Returns:
        (B, K, D), a fresh tensor.
    """
    batch, rows, width = x.shape
    flat = x.reshape(batch * rows, width).index_select(0, _flat(index, rows))
    return flat.view(batch, index.shape[1], width)


def add_(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Add `values` to the rows of `x` at `index`, in place; repeated positions accumulate.

    Args:
        x: (B, N, D), contiguous; nothing else may still need its old values.
        index: (B, K) int64 positions along N.
        values: (B, K, D).

    Returns:
        `x`.
    """
    batch, rows, width = x.shape
    place, flat = _flat(index, rows), x.view(batch * rows, width)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # scatter_add_ sorts its rows first, in many parallel steps that cost more than the work
        flat.index_put_((place,), values.reshape(-1, width), accumulate=True)
    else:
        flat.scatter_add_(0, place[:, None].expand(-1, width), values.reshape(-1, width))
    return x
