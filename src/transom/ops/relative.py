"""Relative positions: logits per offset between query and key, brought into place without a gather.

A learned table has 2P rows, row P + o for the offset o = (place of the key) - (place of the
query). Scores of every query against every offset are one matrix product; the score of a pair is
then found by reading the same memory with rows one shorter (the shift of Transformer-XL), because
one query further the same key is one offset less.
"""

from __future__ import annotations

import torch
from torch import Tensor


def window(table: Tensor, queries: int, keys: int, first: int | None = None) -> Tensor:
    """The rows of a table that L neighbouring queries can need for T keys.

    Args:
        table: (2P, ...), row P for a query and a key at one place.
        queries: L.
        keys: T, at the places 0 … T - 1.
        first: f, the place of the first query; T - L when None, so that they are the last.

    Returns:
        (T + L, ...), the offsets from -(f + L) to T - f - 1. Offsets outside the table get its
        first or last row.
    """
    first = keys - queries if first is None else first
    origin = len(table) // 2
    low, high = origin - first - queries, origin + keys - first
    if low >= 0 and high <= len(table):
        return table[low:high]
    places = torch.arange(low, high, device=table.device)
    return table.index_select(0, places.clamp(0, len(table) - 1))


def align(scores: Tensor, keys: int) -> Tensor:
    """Scores per offset as scores per key.

    Args:
        scores: (..., L, T + L), of each query for the offsets of :func:`window`.
        keys: T.

    Returns:
        (..., L, T), in which [i, j] is scores[i, L + j - i].
    """
    queries, width = scores.shape[-2:]
    flat = scores.flatten(-2)[..., queries:]
    return flat.unflatten(-1, (queries, width - 1))[..., :keys]


def logits(
    q: Tensor, table: Tensor, keys: int, bias: Tensor | None = None, first: int | None = None
) -> Tensor:
    """What relative positions add to the logits of a sequence: q_i · R[row] + β[row].

    Args:
        q: (..., H, L, d).
        table: (2P, H, d), R.
        keys: T, at the places 0 … T - 1.
        bias: (2P, H), β.
        first: place of the first query; T - L when None, so that they are the last.

    Returns:
        (..., H, L, T), not scaled.
    """
    count = q.shape[-2]
    rows = window(table, count, keys, first).permute(1, 2, 0)  # (H, d, T + L)
    if bias is not None:
        # as one more channel: another pass over all scores would cost as much as the product
        rows = torch.cat([rows, window(bias, count, keys, first).T[:, None].to(rows.dtype)], 1)
        q = torch.cat([q, q.new_ones(*q.shape[:-1], 1)], -1)
    return align(q @ rows, keys)  # (..., H, L, T + L) before


def grid_logits(
    q: Tensor,
    rows: Tensor,
    columns: Tensor,
    grid: tuple[int, int],
    biases: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The same on a grid: the sum of what the offsets in rows and in columns add.

    Args:
        q: (..., H, h·w, d), row by row.
        rows, columns: (2P, H, d) tables of either direction.
        grid: (h, w).
        biases: (2P, H) for either direction.

    Returns:
        (..., H, h·w, h·w), not scaled.
    """
    h, w = grid
    lines = q.unflatten(-2, grid).movedim(-4, -2)  # (..., h, w, H, d)
    down, across = biases if biases is not None else (None, None)
    # (..., w, H, h, d) and (..., h, H, w, d): the other direction is one more batch
    vertical = logits(lines.movedim(-4, -2), rows, h, down)  # (..., w, H, h, h')
    horizontal = logits(lines.movedim(-3, -2), columns, w, across)  # (..., h, H, w, w')
    vertical = vertical.movedim(-4, -2)  # (..., H, h, w, h')
    horizontal = horizontal.movedim(-4, -3)  # (..., H, h, w, w')
    both = vertical[..., :, None] + horizontal[..., None, :]  # (..., H, h, w, h', w')
    return both.flatten(-2).flatten(-3, -2)
