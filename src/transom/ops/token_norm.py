"""Batch statistics of tokens, and norms that are a scale and a shift per channel once trained.

A norm whose output is ``y = scale · x + shift`` at inference folds into the linear map behind it
(exactly) or into the linear map or convolution that produced its input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def recomputing() -> bool:
    """Whether this forward pass happens inside a backward pass: gradient checkpointing.

    A layer that keeps statistics has to repeat there what it did in the first pass, and must not
    count the batch again.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


def batch_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    valid: Tensor | None = None,
) -> Tensor:
    """Batch norm with statistics over everything but the channels.

    Args:
        x: (..., C); usually (B, N, C), so that batch and tokens are counted alike.
        mean, var: (C,) running statistics; moved in place while training.
        weight, bias: (C,).
        training: whether the statistics are those of this batch.
        momentum: part of the new statistics that enters the running ones.
        eps: added to the variance.
        valid: (...) bool, False for tokens that are left out of the statistics and come back as
            zeros; only looked at while training.

    Returns:
        (..., C).
    """
    flat = x.reshape(-1, x.shape[-1])
    if valid is None or not training:
        return F.batch_norm(flat, mean, var, weight, bias, training, momentum, eps).view(x.shape)
    kept = valid.reshape(-1)
    normed = F.batch_norm(flat[kept], mean, var, weight, bias, True, momentum, eps)
    return torch.zeros_like(flat).index_put((kept,), normed.to(flat.dtype)).view(x.shape)


def batch_norm_affine(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) of a batch norm at inference.

    Args:
        mean, var: (C,) running statistics.
        weight, bias: (C,); None for ones and zeros.
        eps: added to the variance.
    """
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = weight * scale
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def into_next(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a map that does ``scale · x + shift`` first.

    Args:
        weight: (O, C) of a linear map or (O, C, ...) of a convolution without padding, whose
            windows therefore see every channel of every position.
        bias: (O,) or None.
        scale, shift: (C,).

    Returns:
        Weight of the same shape, and bias (O,).
    """
    over = (-1, *[1] * (weight.dim() - 2))
    moved = (weight * shift.view(over)).flatten(1).sum(1)
    return weight * scale.view(over), moved if bias is None else moved + bias


def into_previous(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a map that does ``scale · y + shift`` to its own output.

    Args:
        weight: (C, ...) of a linear map or of any convolution, padded and grouped ones included.
        bias: (C,) or None.
        scale, shift: (C,).

    Returns:
        Weight of the same shape, and bias (C,).
    """
    scaled = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    return scaled, shift if bias is None else shift + scale * bias
