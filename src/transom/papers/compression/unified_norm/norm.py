"""The layer of Unified Normalization, with its own backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from transom.ops import token_norm

RATIO_STARTS = 1000
"""Step up to which r is 1 at least."""
RATIO_LIMIT = 5.0


class _Smoothed(torch.autograd.Function):
    """y = γ z + β with the backward pass above; moves the buffers of the layer in it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        deviation: Tensor,
        ratio: Tensor,
        step: Tensor,
        skip: Tensor,
        layer: UnifiedNormLayer,
    ) -> Tensor:
        z = x / deviation
        ctx.save_for_backward(z, weight, deviation, ratio, step, skip)
        ctx.layer = layer
        return weight * z + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        z, weight, deviation, ratio, step, skip = ctx.saved_tensors
        layer: UnifiedNormLayer = ctx.layer
        tokens = tuple(range(z.dim() - 1))
        over_weight = (grad * (ratio * z)).sum(tokens)
        over_bias = grad.sum(tokens)
        g = grad * weight * ratio
        share = layer.smooth_gradient((g * z).mean(tokens), step, skip)
        return (g - share * z) / deviation, over_weight, over_bias, *(None,) * 5


class UnifiedNormLayer(nn.Module):
    """The norm. Parameters and buffers carry the official names.

    Attributes:
        weight, bias: γ and β, (C,).
        running_var: ρ (C,), a second moment in spite of its name.
        ema_gz: ψ (C,).
        iters: (1,) int64, steps so far. Set it to 0 to fine-tune: see :meth:`restart`.
        buffer_x2: (P_f, C), the last q; buffer_gz: (P_b, C), the last mean(g · z).
        skip_counter: (1,) int64, steps with an outlier.
    """

    def __init__(
        self,
        channels: int,
        window_size: int | tuple[int, int] = 4,
        warmup_iters: int = 4000,
        outlier_filtration: bool = True,
        eps: float = 1e-5,
        momentum: float = 0.9,
    ) -> None:
        """Build the norm.

        Args:
            channels: C.
            window_size: P_f and P_b, or one number for both.
            warmup_iters: steps without smoothing.
            outlier_filtration: whether windows are tested for outliers.
            eps: ε.
            momentum: α.
        """
        super().__init__()
        forward, backward = (window_size,) * 2 if isinstance(window_size, int) else window_size
        self.window = (forward, backward)
        self.warmup_iters = warmup_iters
        self.outlier_filtration = outlier_filtration
        self.eps = eps
        self.momentum = momentum
        self._last: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.running_var: Tensor
        self.ema_gz: Tensor
        self.iters: Tensor
        self.buffer_x2: Tensor
        self.buffer_gz: Tensor
        self.skip_counter: Tensor
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("ema_gz", torch.zeros(channels))
        self.register_buffer("iters", torch.zeros(1, dtype=torch.long))
        self.register_buffer("buffer_x2", torch.zeros(forward, channels))
        self.register_buffer("buffer_gz", torch.zeros(backward, channels))
        self.register_buffer("skip_counter", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """Normed tokens.

        Args:
            x: (..., C), such as (B, N, C) or (N, B, C).
            pad_mask: (...) bool, True for padding, which then does not count in q.

        Returns:
            Of the same shape.
        """
        if not self.training:
            scale, shift = self.as_affine()
            return x * scale + shift
        if self._last is None or not token_norm.recomputing():
            self._last = self.smooth(x.detach(), pad_mask)
        deviation, ratio, step, skip = self._last
        y: Tensor = _Smoothed.apply(x, self.weight, self.bias, deviation, ratio, step, skip, self)
        return y

    @torch.no_grad()
    def smooth(
        self, x: Tensor, pad_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Take one batch into the statistics.

        Args:
            x: (..., C).
            pad_mask: (...) bool, True for padding.

        Returns:
            √(σ² + ε) (C,), r (C,), the number of this step (1,) and whether it is skipped (1,).
        """
        self.iters += 1
        step = self.iters.clone()
        window = self.window[0]
        q = self._second_moment(x, pad_mask)
        spread = window * self.buffer_x2.sqrt().var()
        row = self._row(step, window)
        self.buffer_x2.copy_(torch.where(row, q, self.buffer_x2))
        geometric = self.buffer_x2.log().mean(0).exp()
        skip = torch.full_like(step, window == 1, dtype=torch.bool)
        early = (step <= window) | (step < self.warmup_iters)
        if self.outlier_filtration:
            outlies = (self.buffer_x2.mean(0) - geometric > spread).any()
            outlies = (step >= self.warmup_iters) & outlies
            skip = skip | outlies
            self.buffer_x2.copy_(torch.where(row & outlies, self.running_var, self.buffer_x2))
            self.skip_counter += outlies
        moment = torch.where(early | skip, q, geometric)
        deviation = (moment + self.eps).sqrt()
        ratio = deviation / (self.running_var + self.eps).sqrt()
        ratio = ratio.clamp(1 / RATIO_LIMIT, RATIO_LIMIT)
        plain = (step <= max(RATIO_STARTS, self.warmup_iters)) | skip
        ratio = torch.where(plain, torch.ones_like(ratio), ratio)
        self.running_var.mul_(self.momentum).add_(moment, alpha=1 - self.momentum)
        return deviation, ratio, step, skip

    @torch.no_grad()
    def smooth_gradient(self, newest: Tensor, step: Tensor, skip: Tensor) -> Tensor:
        """Take the backward pass of one batch into the statistics.

        Args:
            newest: (C,), mean over batch and tokens of g · z.
            step: (1,), its number.
            skip: (1,) bool, whether it is skipped.

        Returns:
            (C,), what takes the place of that mean in the gradient of x.
        """
        window = self.window[1]
        kept = torch.where(skip, self.ema_gz, newest)
        self.buffer_gz.copy_(torch.where(self._row(step, window), kept, self.buffer_gz))
        early = (step <= window) | (step < self.warmup_iters)
        share = torch.where(early | skip, newest, self.buffer_gz.mean(0))
        self.ema_gz.mul_(self.momentum).add_(share, alpha=1 - self.momentum)
        return torch.where(skip, share, self.ema_gz)

    def _second_moment(self, x: Tensor, pad_mask: Tensor | None) -> Tensor:
        squares = x.square().flatten(0, -2)
        if pad_mask is None:
            return squares.mean(0)
        kept = (~pad_mask).flatten()[:, None].to(squares.dtype)
        return (squares * kept).sum(0) / kept.sum()

    @staticmethod
    def _row(step: Tensor, window: int) -> Tensor:
        """(window, 1) bool, True for the row this step writes."""
        return (torch.arange(window, device=step.device) == step % window)[:, None]

    def as_affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift (C,) at inference."""
        return self.weight / (self.running_var + self.eps).sqrt(), self.bias

    def restart(self) -> None:
        """Begin the warm-up anew, as the paper does before fine-tuning a trained network."""
        self.iters.zero_()
