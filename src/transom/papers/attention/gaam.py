"""GAAM: weigh features by how probable they are under a few Gaussians of their own statistics.

A gate, not a token mixer. Along one axis a of x (any rank), with learned offsets δ_1…δ_K and
scales c_1…c_K of a head,

    μ = mean of x over a,   s² = unbiased variance over a + eps
    z_k = (x - μ - δ_k) / s,   g_k = exp(-z_k² / 2c_k²) / sqrt(2π c_k²)
    w = Π_k g_k,   w ← w / max(Σ_a w, eps),   y = x ∘ w

so w sums to one along a. Several heads cut a into consecutive chunks, each with statistics of its
own; a stack of such layers adds its input, x ← layer(x) + x. 2·K·H parameters a layer.

Source: Ioannides et al., Gaussian Adaptive Attention is All You Need, 2024; official code
gioannides/Gaussian-Adaptive-Attention@145d1bc (Apache-2.0; this file is our own).

The paper calls w a mixture, its code multiplies. A product of K Gaussians is one Gaussian: with
Λ = Σ 1/c_k² and δ̄ = Σ (δ_k/c_k²) / Λ the weights are softmax(-Λ (x - μ - δ̄)² / 2s²), up to the
clamp by eps. K > 1 therefore adds parameters and no shape, and `weights` below needs one pass
whatever K is. `combine="mixture"` is what the text says, a sum over k; it is ours, not the
official code's. So are `rescale` (y shrinks with the length of a; this multiplies by it) and
`valid`, which leaves padding out of the statistics. The official `padding_value` does not: such
elements count as zeros in mean and variance, keep their own value in z and in the sum, and are
returned unchanged, so that a padded batch gets other weights than an unpadded one. The multi-head
module of the official code ignores the eps it is given and always takes 1e-8; so does ours.

As a method it gates the values (or keys) of every attention of a host. Checked against goldens of
the official operator, the closed form against the written-out product. The results of the paper
were not reproduced: its experiments are not released.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from transom.errors import FitError, SettingsError
from transom.hosts.base import Host
from transom.ops import attention
from transom.registry import Method, Offer
from transom.slots import Fill
from transom.tokens import Record

Combine = Literal["product", "mixture"]
EPS = 1e-8


def statistics(
    x: Tensor, axis: int, eps: float = EPS, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance + eps along an axis, which is kept with length one.

    Args:
        x: any shape.
        axis: to sum over.
        eps: added to the variance.
        valid: broadcastable to x, False for what does not count.

    Returns:
        mean and variance.
    """
    if valid is None:
        # in two passes, which on CPUs take a third of the time of var_mean
        mean = x.mean(axis, keepdim=True)
        square = (x - mean).square().sum(axis, keepdim=True)
        return mean, square / (x.shape[axis] - 1) + eps
    seen = valid.expand_as(x)
    count = seen.sum(axis, keepdim=True)
    mean = x.masked_fill(~seen, 0).sum(axis, keepdim=True) / count.clamp(min=1)
    square = (x - mean).masked_fill(~seen, 0).square().sum(axis, keepdim=True)
    return mean, square / (count - 1).clamp(min=1) + eps


def weights(
    x: Tensor,
    offsets: Tensor,
    scales: Tensor,
    axis: int,
    *,
    combine: Combine = "product",
    eps: float = EPS,
    padding_value: float | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Weights w of one head, in one pass over x for the product and K for the mixture.

    Computed from logarithms in at least float32, so that nothing underflows on the way.

    Args:
        x: any shape.
        offsets: (K,) δ, in units of x.
        scales: (K,) c, of which only the square counts.
        axis: along which the weights sum to one.
        combine: the official product of the Gaussians, or their sum.
        eps: added to the variance, and the least sum that weights are divided by.
        padding_value: elements of this value count as zero in mean and variance.
        valid: broadcastable to x; where False, an element counts nowhere and gets weight 0.

    Returns:
        As x.
    """
    kind = x.dtype
    full = torch.promote_types(kind, torch.float32)
    x, offsets, scales = x.to(full), offsets.to(full), scales.to(full)
    seen = x if padding_value is None else x.masked_fill(x == padding_value, 0)
    mean, variance = statistics(seen, axis, eps, valid)
    centred, precision = x - mean, scales.square().reciprocal()
    constant = 0.5 * (2 * math.pi * scales.square()).log()
    if combine == "product":
        total = precision.sum()
        centre = (offsets * precision).sum() / total
        # what is left when K parabolas are added up to the one around their common centre
        rest = ((offsets - centre).square() * precision).sum()
        log = -0.5 * (total * (centred - centre).square() + rest) / variance - constant.sum()
    else:
        parts = [
            -0.5 * (centred - o).square() * p / variance - c
            for o, p, c in zip(offsets, precision, constant, strict=True)
        ]
        log = torch.stack(parts).logsumexp(0)
    if valid is not None:
        # finite, so that a chunk of nothing but padding has weights of 0 and gradients
        log = log.masked_fill(~valid.expand_as(log), torch.finfo(full).min / 2)
    w = log.softmax(axis)
    # where the sum is below eps, weights are divided by that instead: the largest of them is
    # exp(its logarithm - that of the sum)
    total = log.amax(axis, keepdim=True) - w.amax(axis, keepdim=True).log()
    return (w * (total - math.log(eps)).clamp(max=0).exp()).to(kind)


def reference(
    x: Tensor,
    offsets: Tensor,
    scales: Tensor,
    axis: int,
    *,
    combine: Combine = "product",
    eps: float = EPS,
    padding_value: float | None = None,
) -> Tensor:
    """Twin of :func:`weights`: the equations at the top, Gaussian by Gaussian."""
    seen = x if padding_value is None else x.masked_fill(x == padding_value, 0)
    mean, variance = seen.mean(axis, keepdim=True), seen.var(axis, keepdim=True) + eps
    gaussians = [
        torch.exp(-(((x - mean - d) / variance.sqrt()) ** 2) / (2 * c**2))
        / (2 * math.pi * c**2).sqrt()
        for d, c in zip(offsets, scales, strict=True)
    ]
    stacked = torch.stack(gaussians)
    w = stacked.prod(0) if combine == "product" else stacked.sum(0)
    return w / w.sum(axis, keepdim=True).clamp(min=eps)


class GaussianHead(nn.Module):
    """One head: gates x along one axis.

    Attributes:
        mean_offsets: (K,) δ, zero at the start.
        c: (K,), the exponential of a normal variable at the start.
    """

    def __init__(
        self,
        norm_axis: int,
        num_gaussians: int,
        padding_value: float | None = None,
        eps: float = EPS,
        *,
        combine: Combine = "product",
        rescale: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if num_gaussians < 1:
            raise SettingsError(f"num_gaussians is {num_gaussians}; expected at least 1")
        self.norm_axis = norm_axis
        self.padding_value = padding_value
        self.eps = eps
        self.combine: Combine = combine
        self.rescale = rescale
        self.mean_offsets = nn.Parameter(torch.zeros(num_gaussians))
        self.c = nn.Parameter(torch.randn(num_gaussians, generator=generator).exp())

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gate x.

        Args:
            x: any shape.
            valid: broadcastable to x, False for what counts nowhere.

        Returns:
            y as x, and the weights, detached.
        """
        axis, padding = self.norm_axis, self.padding_value
        if x.shape[axis] < 2:
            raise SettingsError(
                f"a Gaussian head got x of shape {tuple(x.shape)}, which has length "
                f"{x.shape[axis]} along axis {axis}; a variance needs at least 2"
            )
        w = weights(
            x,
            self.mean_offsets,
            self.c,
            axis,
            combine=self.combine,
            eps=self.eps,
            padding_value=padding,
            valid=valid,
        )
        y = x * w * x.shape[axis] if self.rescale else x * w
        if padding is not None:
            y = torch.where(x == padding, x, y)
        return y, w.detach()


class MultiHeadGaussian(nn.Module):
    """The axis in H consecutive chunks, the last one with the remainder, each with its head."""

    def __init__(
        self,
        norm_axis: int,
        num_heads: int,
        num_gaussians: int,
        padding_value: float | None = None,
        *,
        combine: Combine = "product",
        rescale: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1:
            raise SettingsError(f"num_heads is {num_heads}; expected at least 1")
        self.norm_axis = norm_axis
        self.attention_heads = nn.ModuleList(
            GaussianHead(
                norm_axis,
                num_gaussians,
                padding_value,
                combine=combine,
                rescale=rescale,
                generator=generator,
            )
            for _ in range(num_heads)
        )

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gate x; see :meth:`GaussianHead.forward`."""
        axis, heads = self.norm_axis, len(self.attention_heads)
        size = x.shape[axis]
        if size < heads:
            raise SettingsError(
                f"{heads} heads cannot share axis {axis} of length {size}; expected at most {size}"
            )
        step = size // heads
        cuts = [step * i for i in range(1, heads)]
        chunks = x.tensor_split(cuts, axis)
        masks: Sequence[Tensor | None] = [None] * heads
        if valid is not None:
            masks = valid.expand_as(x).tensor_split(cuts, axis)
        pairs = [h(c, m) for h, c, m in zip(self.attention_heads, chunks, masks, strict=True)]
        return torch.cat([y for y, _ in pairs], axis), torch.cat([w for _, w in pairs], axis)


class GaussianBlock(nn.Module):
    """A stack of multi-head layers with residuals, x ← layer(x) + x.

    Args:
        norm_axes: axis of each layer.
        num_heads: of each layer.
        num_gaussians: K of each layer.
        padding_value: of every layer.
        combine: of every layer.
    """

    def __init__(
        self,
        norm_axes: Sequence[int],
        num_heads: Sequence[int],
        num_gaussians: Sequence[int],
        padding_value: float | None = None,
        *,
        combine: Combine = "product",
    ) -> None:
        super().__init__()
        if not len(norm_axes) == len(num_heads) == len(num_gaussians):
            raise SettingsError(
                f"got {len(norm_axes)} axes, {len(num_heads)} numbers of heads and "
                f"{len(num_gaussians)} numbers of Gaussians; expected one of each a layer"
            )
        self.layers = nn.ModuleList(
            MultiHeadGaussian(axis, heads, k, padding_value, combine=combine)
            for axis, heads, k in zip(norm_axes, num_heads, num_gaussians, strict=True)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Gate x (any shape) layer by layer.

        Returns:
            y as x, and the detached weights by name, "layer_0" and on.
        """
        seen = {}
        for i, layer in enumerate(self.layers):
            gated, seen[f"layer_{i}"] = layer(x)
            x = gated + x
        return x, seen


def importance(weights: Tensor) -> Tensor:
    """Importance factor: weights (B, ...) averaged over the samples, from 0 for the least to 1."""
    mean = weights.mean(0)
    low, high = mean.min(), mean.max()
    return (mean - low) / (high - low).clamp(min=torch.finfo(mean.dtype).tiny)


class GatedAttention(nn.Module):
    """Attention operator: the host's own attention over gated values, keys or both.

    Attributes:
        key_gate, value_gate: of the keys and the values; None where they pass as they are.
    """

    def __init__(self, method: GAAM, generator: torch.Generator) -> None:
        super().__init__()
        self.tokens = method.axis == "tokens"

        def gate(name: str) -> MultiHeadGaussian | None:
            if method.gates not in (name, "both"):
                return None
            return MultiHeadGaussian(
                -2 if self.tokens else -1,
                method.heads,
                method.gaussians,
                combine=method.combine,
                rescale=method.rescale,
                generator=generator,
            )

        self.key_gate = gate("keys")
        self.value_gate = gate("values")

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None,
        scale: float,
        record: Record | None,
    ) -> Tensor:
        """Heads (B, H, N, d) from q, k, v (B, H, N, d)."""
        valid = None if record is None else record.valid
        k, v = self._gated(self.key_gate, k, valid), self._gated(self.value_gate, v, valid)
        return attention.attend(q, k, v, bias, scale=scale)

    def _gated(self, gate: MultiHeadGaussian | None, x: Tensor, valid: Tensor | None) -> Tensor:
        if gate is None:
            return x
        joined = x.transpose(1, 2).flatten(2)  # (B, N, D): channels of all heads side by side
        y = (
            joined
            + gate(joined, valid[..., None] if self.tokens and valid is not None else None)[0]
        )
        return y.unflatten(-1, (x.shape[1], -1)).transpose(1, 2)


@dataclass(frozen=True)
class GAAM(Method):
    """Gaussian adaptive gates on the values or keys of each attention, x ← gate(x) + x.

    Attributes:
        gates: what is gated.
        axis: along which the weights sum to one.
        heads: chunks of that axis; of tokens, they are cut over the padded length.
        gaussians: K of each head.
        combine: the official product of the Gaussians, or their sum (a true mixture; ours).
        rescale: multiply by the length of a chunk, so that the gate is about one on average and
            not about one over the length (ours).
        seed: of the scales at the start.
    """

    gates: Literal["values", "keys", "both"] = "values"
    axis: Literal["channels", "tokens"] = "channels"
    heads: int = 4
    gaussians: int = 5
    combine: Combine = "product"
    rescale: bool = False
    seed: int = 0
    needs_training = True

    def __post_init__(self) -> None:
        for name in ("heads", "gaussians"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; expected at least 1")

    def fit(self, host: Host) -> list[Fill]:
        if self.axis == "channels" and host.width < 2 * self.heads:
            raise FitError(
                f"gaam cuts the {host.width} channels of this {host.family} into {self.heads} "
                f"chunks, but a variance needs two in each; use at most {host.width // 2} heads"
            )
        rng = torch.Generator().manual_seed(self.seed)
        return [Fill(attention=GatedAttention(self, rng)) for _ in range(host.depth)]

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        return [{}, {"rescale": True}, {"gates": "both", "combine": "mixture", "rescale": True}]


OFFERS = (
    Offer("operator", "gaussian-head", GaussianHead),
    Offer("operator", "multi-head-gaussian", MultiHeadGaussian),
    Offer("operator", "gaussian-block", GaussianBlock),
    Offer("lens", "importance", importance),
)
