"""Attention with a gate on every head that leaves out what is not chosen."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from transom.ops import attention
from transom.papers.attention.moh.routing import Gates

Path = Literal["auto", "dense", "skip"]
FEWEST, MOVING, ROWS = 64, 40, 0.3
SHARED = 110.0  # moving with several threads, in keys
LEAST = 8_000_000  # multiplications


def reference(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, bias: Tensor | None, scale: float
) -> Tensor:
    """Every head for every query, times its gate; twin of :func:`attend`."""
    y = attention.attend(q, k, v, bias, scale=scale)
    return y * gates.gate.transpose(1, 2)[..., None]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    bias: Tensor | None,
    scale: float,
    *,
    path: Path = "auto",
) -> Tensor:
    """Attention times the gates.

    Args:
        q: (B, H, N, d).
        k, v: (B, H, M, d).
        gates: of the queries.
        bias: broadcastable to (B, H, N, M), added to the logits; None for none.
        scale: of the logits.
        path: "dense" computes every head of every token, "skip" those that are chosen, "auto"
            what is expected to be faster on a CPU. On other devices, where it is not measured,
            and in compiled or exported graphs, whose shapes are fixed, "auto" is dense.

    Returns:
        (B, H, N, d).
    """
    if path == "dense" or gates.mask is None or (path == "auto" and not _counts(q, k)):
        return reference(q, k, v, gates, bias, scale)
    rows = bias is not None and bias.shape[2] > 1
    # looking at the choice costs a little, so not where nothing could be gained
    if path == "auto" and not pays(k.shape[2], _part(q, gates, 1), rows):
        return reference(q, k, v, gates, bias, scale)
    most = int(gates.mask.sum(1).max())
    if path == "auto" and not pays(k.shape[2], _part(q, gates, most), rows):
        return reference(q, k, v, gates, bias, scale)
    batch, heads, count, _ = q.shape
    shared, width = heads - gates.mask.shape[-1], v.shape[-1]
    chosen = gates.mask.transpose(1, 2)  # (B, E, N)
    # the queries of each head that chose it; where they are fewer, others fill up the group
    picked = chosen.to(q.dtype).topk(most, -1, sorted=False).indices  # (B, E, n)
    rest = slice(shared, heads)
    own = None if bias is None else _picked(_heads(bias, rest), picked)
    # tokens outside, heads inside: rows of width d, as they come from and go to the projections
    start = torch.arange(batch, device=q.device)[:, None, None] * count
    head = torch.arange(shared, heads, device=q.device)[:, None]
    places = ((start + picked) * heads + head).flatten()
    query = q.transpose(1, 2).flatten(0, 2).index_select(0, places)
    query = query.view(*picked.shape, q.shape[-1])
    y = attention.attend(query, k[:, rest], v[:, rest], own, scale=scale)
    # what only fills up a group has a gate of zero
    y = y * gates.gate.flatten().index_select(0, places).view(*picked.shape, 1)
    out = y.new_zeros(batch * count * heads, width).index_copy(0, places, y.flatten(0, 2))
    out = out.view(batch, count, heads, width).transpose(1, 2)
    if shared:
        own = None if bias is None else _heads(bias, slice(0, shared))
        y = attention.attend(q[:, :shared], k[:, :shared], v[:, :shared], own, scale=scale)
        out[:, :shared] = y * gates.gate[..., :shared].transpose(1, 2)[..., None]
    return out


def _heads(bias: Tensor, which: slice) -> Tensor:
    return bias if bias.shape[1] == 1 else bias[:, which]


def _picked(bias: Tensor, picked: Tensor) -> Tensor:
    """Rows of a bias (1 or B, 1 or E, 1 or N, M) for the queries picked (B, E, n)."""
    batch, heads, count, keys = bias.shape
    if count == 1:
        return bias
    row = picked
    if heads > 1:
        row = row + torch.arange(heads, device=bias.device)[:, None] * count
    if batch > 1:
        row = row + torch.arange(batch, device=bias.device)[:, None, None] * heads * count
    # whole rows at once, which is faster than a gather
    return bias.reshape(-1, keys).index_select(0, row.flatten()).view(*picked.shape, keys)


def _counts(q: Tensor, k: Tensor) -> bool:
    """Whether the size of groups may be looked at, and whether it could matter.

    On a CPU, outside of graphs of a fixed shape, and not for attention of a few tenths of a
    millisecond, of which moving takes as much as it saves (196 keys, 4 heads of 32).
    """
    if q.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return k.shape[2] >= FEWEST and q.numel() * k.shape[2] >= LEAST


def _part(q: Tensor, gates: Gates, most: int) -> float:
    """Part of the (query, head) pairs that is computed when groups are as large as the largest."""
    assert gates.mask is not None
    routed = gates.mask.shape[-1]
    return (q.shape[1] - routed + routed * most / q.shape[2]) / q.shape[1]


def pays(keys: int, part: float, rows: bool = False) -> bool:
    """Whether leaving heads out is expected to be faster than computing them, on a CPU.

    Moving queries into groups costs as much as attending to some forty keys; a bias of its own for
    each query has to be moved, too, which costs as much as another ROWS of the attention that is
    left (measured on one thread, float32, widths 32 and 64). With more threads attention gets
    faster and moving does not: on two, groups lose at 196 keys and win at 784.

    Args:
        keys: number of them.
        part: of the (query, head) pairs that is left.
        rows: whether there is such a bias.
    """
    moving = MOVING if torch.get_num_threads() == 1 else SHARED
    return part * (1 + ROWS * rows) + moving / max(keys, 1) < 0.95
