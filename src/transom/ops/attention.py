"""Attention with a bias per key, without leaving the fused kernels.

Proportional attention adds log(size) to the column of each key. On CPUs an additive (B, 1, 1, N)
mask keeps scaled_dot_product_attention on its fused kernel at no cost. Flash kernels on CUDA take
no mask; there the same bias can be folded into two extra channels of q and k.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def key_bias(size: Tensor | None, valid: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Bias of each key: log(size) of proportional attention (ToMe, eq. 1), and padding.

    Args:
        size: (B, N, 1) original tokens each key stands for; None when that does not count.
        valid: (B, N) bool, False for padding; None when there is none.
        dtype: of the queries the bias will meet.

    Returns:
        (B, 1, 1, N), or None when there is nothing to add.
    """
    if size is None and valid is None:
        return None
    if size is None:
        assert valid is not None
        bias = torch.zeros_like(valid, dtype=dtype)[:, None, None]
    else:
        bias = size.log().to(dtype).mT[:, None]
    if valid is not None:
        bias = bias.masked_fill(~valid[:, None, None], torch.finfo(dtype).min)
    return bias


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Fused softmax(q kᵀ scale + bias) v with the bias as an additive mask.

    Args:
        q, k, v: (B, H, N, d).
        bias: broadcastable to (B, H, N, N); None for none.
        dropout: probability on the attention weights.
        scale: of the logits; 1/sqrt(d) when None.

    Returns:
        (B, H, N, d).
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)


def probabilities(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """The attention matrix softmax(q kᵀ scale + bias), for those who want to see it.

    Args:
        q: (B, H, N, d).
        k: (B, H, M, d).
        bias: broadcastable to (B, H, N, M), or None.
        scale: of the logits.

    Returns:
        (B, H, N, M).
    """
    logits = (q @ k.mT) * scale
    return (logits if bias is None else logits + bias).softmax(-1)


def attend_folded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """The same as :func:`attend` for a bias per key, in a form flash kernels accept.

    The bias becomes two extra channels of k (a coarse part and its rounding rest, so that half
    precision loses nothing) against constant channels of q, padded to a multiple of eight.

    Args:
        q, k, v: (B, H, N, d).
        bias: (B, 1, 1, N).
        dropout: probability on the attention weights.
        scale: of the logits; 1/sqrt(d) when None.

    Returns:
        (B, H, N, d).
    """
    width = q.shape[-1]
    scale = width**-0.5 if scale is None else scale
    pad = 8 - width % 8
    pad = pad if pad >= 2 else pad + 8
    column = bias[:, :, 0, :, None].float() / scale  # (B, 1, N, 1)
    coarse = column.to(q.dtype)
    rest = (column - coarse.float()).to(q.dtype)
    fold = F.pad(torch.cat([coarse, rest], -1), (0, pad - 2)).expand(-1, k.shape[1], -1, -1)
    ones = F.pad(q.new_ones(2), (0, pad - 2)).expand(*q.shape[:-1], pad)
    out = F.scaled_dot_product_attention(
        torch.cat([q, ones], -1),
        torch.cat([k, fold], -1),
        F.pad(v, (0, pad)),
        dropout_p=dropout,
        scale=scale,
    )
    return out[..., :width]


def row(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    scale: float,
    query: int = 0,
    share: Tensor | None = None,
) -> Tensor:
    """Attention probabilities of one query, averaged over heads, from q·Kᵀ of that query only.

    Args:
        q, k: (B, H, N, d).
        bias: broadcastable to (B, H, N, N), or None.
        scale: of the logits.
        query: position of the query.
        share: (H,) weight of each head instead of the average.

    Returns:
        (B, N).
    """
    logits = (q[:, :, query : query + 1] @ k.mT) * scale
    if bias is not None:
        logits = logits + (bias if bias.shape[-2] == 1 else bias[:, :, query : query + 1])
    probs = logits.softmax(-1)[:, :, 0]  # (B, H, N)
    return probs.mean(1) if share is None else (probs * share[:, None]).sum(1)
