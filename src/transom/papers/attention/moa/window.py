"""Attention over a prompt in which every head has its own window of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from transom.ops import attention


def window_mask(places: Tensor, local: Sequence[int], sinks: Sequence[int], block: int) -> Tensor:
    """Which keys a query sees.

    Args:
        places: (..., N) int64 of the tokens in their text.
        local: blocks behind and including that of a query, of each head.
        sinks: blocks at the start, of each head.
        block: side of a block in tokens.

    Returns:
        (..., H, N, N) bool: causal, and in a block that is sink or near.
    """
    places = places[..., None, :]
    number = places.div(block, rounding_mode="floor")
    row, column = number[..., :, None], number[..., None, :]
    near = torch.tensor(local, device=places.device)[:, None, None]
    first = torch.tensor(sinks, device=places.device)[:, None, None]
    kept = (column < first) | (column > row - near)
    return kept & (places[..., :, None] >= places[..., None, :])


def windowed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    local: Sequence[int],
    sinks: Sequence[int],
    block: int,
    *,
    scale: float | None = None,
    chunk: int = 4,
) -> Tensor:
    """softmax(q kᵀ scale) v over these windows, in O(N · window) time and memory.

    Neighbouring heads with equal windows go together, and a few blocks of queries at a time: they
    meet the sink and their band, nothing else.

    Args:
        q: (B, H, N, d).
        k, v: (B, H, N, d).
        local, sinks: in blocks, of each head.
        block: side of a block in tokens.
        scale: of the logits; 1/sqrt(d) when None.
        chunk: blocks of queries at a time.

    Returns:
        (B, H, N, d).
    """
    count, first = q.shape[2], 0
    places = torch.arange(count, device=q.device)
    parts = []
    for (near, sink), same in groupby(zip(local, sinks, strict=True)):
        heads = slice(first, first + len(list(same)))
        first = heads.stop
        rows = []
        for start in range(0, count, chunk * block):
            end = min(start + chunk * block, count)
            low = max(0, start - (near - 1) * block)
            head = min(sink * block, low)
            keys = torch.cat([places[:head], places[low:end]])
            kept = _kept(places[start:end], keys, near, sink, block)
            pair = [x[:, heads, low:end] for x in (k, v)]
            if head:
                fronts = (x[:, heads, :head] for x in (k, v))
                pair = [torch.cat(both, 2) for both in zip(fronts, pair, strict=True)]
            rows.append(
                attention.attend(q[:, heads, start:end], pair[0], pair[1], kept, scale=scale)
            )
        parts.append(torch.cat(rows, 2))
    return torch.cat(parts, 1)


def _kept(queries: Tensor, keys: Tensor, near: int, sink: int, block: int) -> Tensor:
    row, column = queries[:, None] // block, keys[None] // block
    return ((column < sink) | (column > row - near)) & (queries[:, None] >= keys)
