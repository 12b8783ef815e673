"""The dense twin: every logit is made, and those outside the neighbourhood are masked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transom.ops.neighborhood.rule import Axis, mask


def dense_mask(axes: Sequence[Axis], device: torch.device | None = None) -> Tensor:
    """(N, N) bool over the row-major tokens of a grid: the product of its axes."""
    whole = torch.ones(1, 1, dtype=torch.bool, device=device)
    for axis in axes:
        one = mask(axis, device)
        pair = whole[:, None, :, None] & one[None, :, None, :]
        whole = pair.flatten(2).flatten(0, 1)
    return whole


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axes: Sequence[Axis],
    scale: float,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ scale) v over the neighbourhood and the extra keys.

    Args:
        q, k, v: (B, *S, H, d), heads of k and v may be fewer.
        axes: the windows; S are their lengths.
        scale: of the logits.
        extra_k, extra_v: (B, E, H, d) that every query sees as well.

    Returns:
        (B, *S, H, d) and the log of the sum of the exponentials (B, *S, H).
    """
    last = len(axes)
    flat = [t.flatten(1, last) for t in (q, k, v)]
    seen = dense_mask(axes, q.device)
    if extra_k is not None and extra_v is not None:
        flat[1] = torch.cat([extra_k, flat[1]], 1)
        flat[2] = torch.cat([extra_v, flat[2]], 1)
        seen = torch.cat([seen.new_ones(len(seen), extra_k.shape[1]), seen], 1)
    share = q.shape[-2] // k.shape[-2]
    query, key, value = (t.transpose(1, 2) for t in flat)
    key, value = (t.repeat_interleave(share, 1) for t in (key, value))
    logits = ((query @ key.mT) * scale).masked_fill(~seen, float("-inf"))
    out = (logits.softmax(-1) @ value).transpose(1, 2)
    lse = logits.logsumexp(-1).transpose(1, 2)
    return out.unflatten(1, q.shape[1:-2]), lse.unflatten(1, q.shape[1:-2])
