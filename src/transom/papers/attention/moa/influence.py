"""How much each attention value matters for the loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def influence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    eps: float | None = None,
) -> Tensor:
    """First-order change of the loss when one attention value is removed and its row renormalised.

        E_ij = -A_ij (G_ij - Σ_n G_in A_in) / (1 - A_ij + eps),   G = grad vᵀ

    Where a query sees one key only, as the first one of a causal matrix does, nothing is left to
    renormalise and E = -G A.

    Args:
        q: (..., N, d).
        k, v: (..., M, d).
        grad: (..., N, d), gradient of the loss with respect to the output of the attention.
        scale: of the logits; 1/sqrt(d) when None.
        causal: whether query i sees keys up to i only.
        eps: keeps the quotient finite; the machine epsilon of the dtype when None.

    Returns:
        (..., N, M); 0 where nothing is seen.
    """
    eps = torch.finfo(q.dtype).eps if eps is None else eps
    logits = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(hidden, -torch.inf)
    a = logits.softmax(-1)
    g = grad @ v.mT
    effect = -a * (g - (g * a).sum(-1, keepdim=True)) / (eps + 1 - a)
    if causal:
        effect[..., 0, :] = -(g * a)[..., 0, :]
    return effect


def block_sums(effect: Tensor, block: int) -> Tensor:
    """Sum of |effect| in each block of block x block values; a last, partial block counts as one.

    Args:
        effect: (..., N, M), 0 where nothing is seen.
        block: side of a block, in tokens.

    Returns:
        (..., ceil(N / block), ceil(M / block)).
    """
    rows, columns = (-n % block for n in effect.shape[-2:])
    x = F.pad(effect.abs(), (0, columns, 0, rows))
    x = x.unflatten(-2, (-1, block)).unflatten(-1, (-1, block))
    return x.sum((-1, -3))
