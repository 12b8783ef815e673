"""Plain, short, slow twins of the fast paths in `ops`; tests hold the two against each other."""

from __future__ import annotations

import torch
from torch import Tensor

from transom.ops.matching import Matching


def take(x: Tensor, index: Tensor) -> Tensor:
    """Twin of :func:`transom.ops.rows.take`."""
    return torch.stack([item[rows] for item, rows in zip(x, index, strict=True)])


def membership(matching: Matching, count: int) -> Tensor:
    """0/1 matrix (B, M, N): does old token n belong to new token m?"""
    target = matching.target(count)
    kept = matching.keep.shape[1]
    return (target[:, None] == torch.arange(kept, device=target.device)[None, :, None]).float()


def merge(x: Tensor, matching: Matching, size: Tensor | None = None) -> Tensor:
    """Twin of :func:`transom.ops.merging.merge` with mode "mean": one matrix product."""
    weight = membership(matching, x.shape[1]).to(x.dtype)
    if size is not None:
        weight = weight * size.mT
    return (weight @ x) / weight.sum(-1, keepdim=True)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Twin of :func:`transom.ops.attention.attend`: softmax(q kᵀ scale + bias) v."""
    logits = (q @ k.mT) * scale
    if bias is not None:
        logits = logits + bias
    return logits.softmax(-1) @ v
