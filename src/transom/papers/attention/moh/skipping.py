"""Attention with a gate on every head that leaves out what is not chosen."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from transom.ops import attention
from transom.papers.attention.moh.routing import Gates

Path = Literal["auto", "dense", "skip"]
MOVING = 40


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
    if path == "dense" or gates.mask is None or (path == "auto" and not _counts(q)):
        return reference(q, k, v, gates, bias, scale)
    most = int(gates.mask.sum(1).max())
    if path == "auto" and not pays(k.shape[2], _part(q, gates, most)):
        return reference(q, k, v, gates, bias, scale)
    batch, heads, count, _ = q.shape
    shared, width = heads - gates.mask.shape[-1], v.shape[-1]
    chosen = gates.mask.transpose(1, 2)  # (B, E, N)
    # the queries of each head that chose it; where they are fewer, others fill up the group
    picked = chosen.to(q.dtype).topk(most, -1, sorted=False).indices  # (B, E, n)
    rest = slice(shared, heads)
    own = None
    if bias is not None:
        own = _heads(bias, rest)
        if own.shape[2] > 1:
            own = own.expand(*picked.shape[:2], -1, -1)
            own = own.gather(2, picked[..., None].expand(-1, -1, -1, own.shape[-1]))
    # tokens outside, heads inside: rows of width d, as they come from and go to the projections
    start = torch.arange(batch, device=q.device)[:, None, None] * count
    head = torch.arange(shared, heads, device=q.device)[:, None]
    rows = ((start + picked) * heads + head).flatten()
    query = q.transpose(1, 2).flatten(0, 2).index_select(0, rows)
    query = query.view(*picked.shape, q.shape[-1])
    y = attention.attend(query, k[:, rest], v[:, rest], own, scale=scale)
    # what only fills up a group has a gate of zero
    y = y * gates.gate.flatten().index_select(0, rows).view(*picked.shape, 1)
    out = y.new_zeros(batch * count * heads, width).index_copy(0, rows, y.flatten(0, 2))
    out = out.view(batch, count, heads, width).transpose(1, 2)
    if shared:
        own = None if bias is None else _heads(bias, slice(0, shared))
        y = attention.attend(q[:, :shared], k[:, :shared], v[:, :shared], own, scale=scale)
        out[:, :shared] = y * gates.gate[..., :shared].transpose(1, 2)[..., None]
    return out


def _heads(bias: Tensor, which: slice) -> Tensor:
    return bias if bias.shape[1] == 1 else bias[:, which]


def _counts(q: Tensor) -> bool:
    """Whether the size of groups may be looked at: on a CPU, outside of graphs of a fixed shape."""
    return q.device.type == "cpu" and not torch.compiler.is_compiling()


def _part(q: Tensor, gates: Gates, most: int) -> float:
    """Part of the (query, head) pairs that is computed when groups are as large as the largest."""
    assert gates.mask is not None
    routed = gates.mask.shape[-1]
    return (q.shape[1] - routed + routed * most / q.shape[2]) / q.shape[1]


def pays(keys: int, part: float) -> bool:
    """Whether leaving heads out is expected to be faster than computing them, on a CPU.

    Moving queries into groups costs as much as attending to some forty keys (measured on one
    thread, float32, widths 32 to 64).

    Args:
        keys: number of them.
        part: of the (query, head) pairs that is left.
    """
    return part + MOVING / max(keys, 1) < 0.95
