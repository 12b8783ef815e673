"""Attention with a gate on every head that leaves out what is not chosen."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from transom.ops import attention
from transom.papers.attention.moh.routing import Gates

Path = Literal["auto", "dense", "skip"]


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
            the faster of both.

    Returns:
        (B, H, N, d).
    """
    if path == "auto":
        path = "skip" if pays(q, k, gates) else "dense"
    if path == "dense" or gates.mask is None:
        return reference(q, k, v, gates, bias, scale)
    gate = gates.gate.transpose(1, 2)[..., None]  # (B, H, N, 1)
    shared = q.shape[1] - gates.mask.shape[-1]
    parts = []
    if shared:
        own = None if bias is None else _heads(bias, slice(0, shared))
        y = attention.attend(q[:, :shared], k[:, :shared], v[:, :shared], own, scale=scale)
        parts.append(y * gate[:, :shared])
    chosen = gates.mask.transpose(1, 2)  # (B, E, N)
    count = int(chosen.sum(-1).max())
    # the queries of each head that chose it come first, in their order
    order = chosen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    order = order[..., :count, None]
    rest = slice(shared, q.shape[1])
    own = None
    if bias is not None:
        own = _heads(bias, rest)
        if own.shape[2] > 1:
            own = own.expand(*order.shape[:2], -1, -1)
            own = own.gather(2, order.expand(-1, -1, -1, own.shape[-1]))
    picked = order.expand(-1, -1, -1, q.shape[-1])
    y = attention.attend(q[:, rest].gather(2, picked), k[:, rest], v[:, rest], own, scale=scale)
    # what only fills up a group has a gate of zero
    y = y * gate[:, rest].gather(2, order)
    out = torch.zeros(*chosen.shape, v.shape[-1], dtype=y.dtype, device=y.device)
    parts.append(out.scatter(2, order.expand(-1, -1, -1, v.shape[-1]), y))
    return torch.cat(parts, 1)


def _heads(bias: Tensor, which: slice) -> Tensor:
    return bias if bias.shape[1] == 1 else bias[:, which]


def pays(q: Tensor, k: Tensor, gates: Gates) -> bool:
    """Whether leaving heads out is expected to be faster than computing them."""
    return False
