"""How far activations lie out: infinity norm and kurtosis."""

from __future__ import annotations

import torch
from torch import Tensor


def infinity_norm(x: Tensor) -> Tensor:
    """Largest magnitude of each sample (B,) of x (B, …)."""
    return x.flatten(1).abs().amax(1)


def kurtosis(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Fourth moment of each sample (B,) of x (B, …) over the fourth power of its deviation.

    3 for a normal distribution; the deviation is the unbiased one, as in the official code.
    """
    flat = x.flatten(1)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    away = flat - flat.mean(1, keepdim=True)
    return away.pow(4).mean(1) / (flat.std(1).pow(4) + eps)
