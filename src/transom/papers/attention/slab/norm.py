"""RepBN and the norm that slides from LayerNorm to it (SLAB, sec. 3.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.ops import token_norm


class RepBN(nn.Module):
    """Batch norm over batch and tokens, with a learned share of the input: BN(x) + α x.

    Attributes:
        alpha: (1,), the share α.
        bn: its weight, bias and running statistics (C,).
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        alpha: float = 1.0,
        scale: float = 1.0,
    ) -> None:
        """Build the norm.

        Args:
            dim: channels C.
            eps: added to the variance.
            momentum: part of the new statistics that enters the running ones.
            alpha: initial share of the input (0 in the paper's language model).
            scale: initial weight of the batch norm (0 there as well).
        """
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), alpha))
        self.bn = nn.BatchNorm1d(dim, eps, momentum)
        nn.init.constant_(self.bn.weight, scale)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Normed tokens.

        Args:
            x: (B, N, C), or (..., C).
            valid: (B, N) bool, False for padding, which then counts in no statistics and leaves
                as (1 + α) x while training; in evaluation it goes through the same map as the rest.

        Returns:
            Of the same shape.
        """
        if not self.training:
            scale, shift = self.as_affine()
            return x * scale + shift
        bn: Any = self.bn
        again = token_norm.recomputing()
        if not again:
            bn.num_batches_tracked.add_(1)
        y = token_norm.batch_norm(
            x,
            bn.running_mean,
            bn.running_var,
            bn.weight,
            bn.bias,
            training=True,
            momentum=0.0 if again else bn.momentum,
            eps=bn.eps,
            valid=valid,
        )
        if valid is not None:
            y = torch.where(valid[..., None], y, x)
        return y + self.alpha * x

    def as_affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift (C,) at inference: γ/√(σ²+eps) + α and β - γμ/√(σ²+eps)."""
        bn: Any = self.bn
        scale, shift = token_norm.batch_norm_affine(
            bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps
        )
        return scale + self.alpha, shift


class PRepBN(nn.Module):
    """A norm that is a LayerNorm when training begins and a RepBN when it ends.

    While training, y = λ·norm1(x) + (1-λ)·norm2(x) with λ = r0·iter/total_step, after which `iter`
    goes down by one until it is 0; for the first `warm` steps only norm1 is run. In evaluation
    y = norm2(x), whatever λ is: an evaluation before λ is 0 says nothing. The second forward pass
    of gradient checkpointing repeats the first and moves nothing, unlike in the official code.

    Attributes:
        norm1: the norm to leave behind, usually a LayerNorm.
        norm2: the :class:`RepBN` to arrive at.
        warm, iter, total_step: counters, int64 scalars; they are saved.
        r0: λ at the first step.
        every: forward passes for one move of the counters (gradient accumulation).
    """

    def __init__(
        self,
        norm1: nn.Module,
        norm2: RepBN,
        *,
        warm: int = 0,
        total_step: int = 300_000,
        r0: float = 1.0,
        every: int = 1,
    ) -> None:
        """Build the norm.

        Args:
            norm1: the norm to leave behind.
            norm2: the one to arrive at, of the same width.
            warm: training steps with norm1 alone.
            total_step: training steps in which λ goes down to 0.
            r0: λ at the first of them.
            every: forward passes a step.

        Raises:
            SettingsError: a number is out of range.
        """
        super().__init__()
        check_schedule(warm, total_step, r0, every)
        self.register_buffer("warm", torch.tensor(warm))
        self.register_buffer("iter", torch.tensor(total_step))
        self.register_buffer("total_step", torch.tensor(total_step))
        self.r0 = r0
        self.every = every
        self.norm1 = norm1
        self.norm2 = norm2
        self._passes = 0
        self._share: Tensor | None = None
        self._warms = warm > 0

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Normed tokens.

        Args:
            x: (B, N, C), or (..., C).
            valid: (B, N) bool, False for padding; see :class:`RepBN`.

        Returns:
            Of the same shape.
        """
        if not self.training:
            return self.norm2(x)
        share = self._share if token_norm.recomputing() else self._step(x.dtype)
        self._share = share
        if share is None:
            return self.norm1(x)
        share = share.to(x.dtype)
        return share * self.norm1(x) + (1 - share) * self.norm2(x, valid)

    @torch.no_grad()
    def _step(self, dtype: torch.dtype) -> Tensor | None:
        """λ of this pass, or None while norm1 is alone; moves the counters."""
        counters: Any = self
        moves = self._moves()
        if self._warms and bool(counters.warm > 0):
            if moves:
                counters.warm.sub_(1)
            return None
        exact = torch.promote_types(dtype, torch.float32)
        share: Tensor = self.r0 * counters.iter.to(exact) / counters.total_step
        if moves:
            counters.iter.sub_(1).clamp_(min=0)
        return share

    def _moves(self) -> bool:
        """Whether this pass is the last one of a step."""
        if self.every == 1:
            return True
        self._passes = (self._passes + 1) % self.every
        return self._passes == 0

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        counters: Any = self
        self._warms = bool(counters.warm > 0)

    def as_affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift (C,) at inference."""
        return self.norm2.as_affine()


def check_schedule(warm: int, total_step: int, r0: float, every: int) -> None:
    """Refuse a schedule that makes no sense.

    Raises:
        SettingsError: a number is out of range.
    """
    if warm < 0:
        raise SettingsError(f"warm is {warm}; expected a number of steps, 0 or more")
    if total_step < 1:
        raise SettingsError(f"total_step is {total_step}; expected a number of steps, 1 or more")
    if not 0 <= r0 <= 1:
        raise SettingsError(f"r0 is {r0}; expected the first share of the old norm, from 0 to 1")
    if every < 1:
        raise SettingsError(f"every is {every}; expected forward passes a step, 1 or more")


def progressive(
    dim: int, *, ln_eps: float = 1e-6, total_step: int = 300_000, warm: int = 0, r0: float = 1.0
) -> PRepBN:
    """LayerNorm to RepBN over `dim` channels, as the backbones of the paper use it."""
    norm1 = nn.LayerNorm(dim, eps=ln_eps)
    return PRepBN(norm1, RepBN(dim), warm=warm, total_step=total_step, r0=r0)
