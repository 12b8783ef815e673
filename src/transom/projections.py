"""What an attention projects with, as plain weights: to initialise another one from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Affine = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Projections:
    """What a host's attention projects with: weight (out, in) and bias (out,) of each, detached.

    Attributes:
        heads: number of them.
        q, k, v, out: to queries, keys, values, and back to the stream.
    """

    heads: int
    q: Affine
    k: Affine
    v: Affine
    out: Affine


def affine(linear: nn.Module) -> Affine:
    """Weight and bias of a linear layer, detached."""
    layer: Any = linear
    return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()


def fused(weight: Tensor, bias: Tensor | None) -> tuple[Affine, Affine, Affine]:
    """A fused projection (3 D, D) as three."""
    biases = (None, None, None) if bias is None else bias.detach().chunk(3)
    q, k, v = zip(weight.detach().chunk(3), biases, strict=True)
    return q, k, v
