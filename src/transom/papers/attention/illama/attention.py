"""Causal attention for patches: rotary positions, the soft mask, and its two forms."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Form = Literal["after", "before"]


def rotary(count: int, width: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles n · base^(-2i/d), (N, d/2) each, float32 or better.

    Args:
        count: positions N, from 0.
        width: of a head, d, even.
        base: of the angles.
        like: gives device and, if that is float64, precision.
    """
    wide = like.dtype if like.dtype == torch.float64 else torch.float32
    i = torch.arange(0, width, 2, device=like.device, dtype=wide)
    n = torch.arange(count, device=like.device, dtype=wide)
    angle = n[:, None] * base ** (-i / width)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn neighbouring channels (2i, 2i+1) of x (B, H, N, d) by the angles of the table."""
    cos, sin = table
    a, b = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def soft_mask(count: int, rate: float, like: Tensor) -> Tensor:
    """Rate · 1 + (1 - rate) · L, (N, N), L lower-triangular ones."""
    ones = torch.ones(count, count, device=like.device, dtype=like.dtype)
    return ones.tril() * (1 - rate) + rate


def soft_causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: float,
    *,
    form: Form = "after",
    scale: float | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention between bidirectional (rate 1) and causal (rate 0).

        after:   (softmax(q kᵀ scale + bias) ⊙ M) v     M = rate + (1 - rate) L
        before:  softmax(q kᵀ scale + bias + log M) v

    `after` is what the paper trains and releases. Its rows do not sum to one, and their
    denominator holds later tokens, so that a change of a later patch changes earlier outputs; it
    needs the (N, N) matrix. `before` gives every row to what may be seen; at rate 0 it is causal
    attention, and the fused causal kernel computes it. At rate 1 both are fused attention.

    Args:
        q, k, v: (B, H, N, d).
        rate: of the soft mask, 0 to 1.
        form: where the mask meets the softmax.
        scale: of the logits; 1/sqrt(d) when None.
        bias: added to the logits, broadcastable to (B, H, N, N); None for none.
        dropout: probability on the attention weights.

    Returns:
        (B, H, N, d).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if rate == 1:
        return F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=scale)
    if form == "before":
        if rate == 0 and bias is None:
            return F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, scale=scale
            )
        closed = math.log(rate) if rate > 0 else -math.inf
        later = q.new_full((q.shape[-2], k.shape[-2]), closed).triu(1)
        later = later if bias is None else later + bias
        return F.scaled_dot_product_attention(q, k, v, later, dropout, scale=scale)
    logits = (q @ k.mT) * scale
    probs = (logits if bias is None else logits + bias).softmax(-1)
    # the mask comes behind the softmax, dropout behind the mask
    probs = F.dropout(probs * soft_mask(q.shape[-2], rate, probs), dropout)
    return probs @ v
