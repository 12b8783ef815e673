"""Convolutions with batch norm that fold, and attention with one head on a part of the channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.ops import attention, token_norm


class ConvBN(nn.Sequential):
    """Convolution without bias, then batch norm: (B, C, h, w) to (B, out, h', w').

    The weight of the batch norm begins with `scale`.
    """

    c: nn.Conv2d
    bn: nn.BatchNorm2d

    def __init__(
        self,
        dim: int,
        out: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        side = kernel_size // 2
        self.c = nn.Conv2d(dim, out, kernel_size, stride, side, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out)
        nn.init.constant_(self.bn.weight, scale)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """One convolution with bias that does the same as this does at inference."""
        weight, bias = token_norm.into_previous(self.c.weight, self.c.bias, *affine(self.bn))
        settings: Any = {
            name: getattr(self.c, name)
            for name in (
                "in_channels",
                "out_channels",
                "kernel_size",
                "stride",
                "padding",
                "groups",
            )
        }
        fused = nn.Conv2d(**settings, device=weight.device, dtype=weight.dtype)
        fused.weight.copy_(weight)
        assert fused.bias is not None
        fused.bias.copy_(bias)
        return fused.train(self.training)


def affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) of a batch norm at inference."""
    assert norm.running_mean is not None and norm.running_var is not None
    return token_norm.batch_norm_affine(
        norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
    )


class SHSA(nn.Module):
    """Single-head self-attention: the first channels attend, the others pass by.

    Attributes:
        partial_dim: p, channels that are normed, attended and replaced.
        qk_dim: e, width of queries and keys.
    """

    def __init__(self, dim: int, qk_dim: int, partial_dim: int) -> None:
        super().__init__()
        if not 0 < partial_dim <= dim:
            raise SettingsError(
                f"partial_dim is {partial_dim!r}; expected at least 1 and at most the width {dim}"
            )
        self.partial_dim = partial_dim
        self.qk_dim = qk_dim
        self.pre_norm = nn.GroupNorm(1, partial_dim)
        self.qkv = ConvBN(partial_dim, 2 * qk_dim + partial_dim)
        self.proj = nn.Sequential(nn.ReLU(), ConvBN(dim, dim, scale=0.0))

    def forward(self, x: Tensor, bias: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        """Mix positions.

        Args:
            x: (B, C, h, w).
            bias: (B, 1, 1, h w), added to the logits of each key; None for none.
            valid: (B, h w) bool, False for padding, which takes no part in any statistics; None
                when there is none. Padded keys have to be excluded by the bias.

        Returns:
            (B, C, h, w).
        """
        attended, rest = x.split((self.partial_dim, x.shape[1] - self.partial_dim), 1)
        qkv = _pointwise(self.qkv, self._normed(attended, valid), valid)
        # split first: torch misreads strides of the gradient of a batch norm for a batch of one
        parts = qkv.flatten(2).split((self.qk_dim, self.qk_dim, self.partial_dim), 1)
        q, k, v = (part.mT[:, None] for part in parts)
        y = attention.attend(q, k, v, bias, scale=self.qk_dim**-0.5)  # (B, 1, h w, p)
        y = y[:, 0].mT.unflatten(2, x.shape[2:])
        return _pointwise(self.proj, torch.cat([y, rest], 1), valid)

    def _normed(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Group norm with one group: statistics over all channels and (valid) positions."""
        if valid is None:
            y: Tensor = self.pre_norm(x)
            return y
        norm, values = self.pre_norm, x.flatten(2).float()
        counts = valid[:, None].to(values.dtype)  # (B, 1, N)
        total = counts.sum(2, keepdim=True) * x.shape[1]
        mean = (values * counts).sum((1, 2), keepdim=True) / total
        values = values - mean
        var = (values.square() * counts).sum((1, 2), keepdim=True) / total
        values = values * (var + norm.eps).rsqrt()
        values = values * norm.weight[:, None] + norm.bias[:, None]
        return values.to(x.dtype).view_as(x)


def _pointwise(layer: nn.Module, x: Tensor, valid: Tensor | None) -> Tensor:
    """A layer without neighbours on x (B, C, h, w), so that padding enters no batch statistics."""
    if valid is None or not layer.training:
        y: Tensor = layer(x)
        return y
    rows = x.flatten(2).mT  # (B, N, C)
    made = layer(rows[valid][:, :, None, None])[:, :, 0, 0]
    out = made.new_zeros(*rows.shape[:2], made.shape[1]).index_put((valid,), made)
    return out.mT.unflatten(2, x.shape[2:])
