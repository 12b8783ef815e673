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

    def forward(self, x: Tensor) -> Tensor:
        """Mix the positions of maps (B, C, h, w)."""
        attended, rest = x.split((self.partial_dim, x.shape[1] - self.partial_dim), 1)
        qkv = self.qkv(self.pre_norm(attended)).flatten(2)
        # split first: torch misreads some strides of the gradient of a batch norm
        parts = qkv.split((self.qk_dim, self.qk_dim, self.partial_dim), 1)
        q, k, v = (part.mT[:, None] for part in parts)
        y = attention.attend(q, k, v, scale=self.qk_dim**-0.5)  # (B, 1, h w, p)
        out: Tensor = self.proj(torch.cat([y[:, 0].mT.unflatten(2, x.shape[2:]), rest], 1))
        return out

    def tokens(self, h: Tensor, bias: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        """Mix tokens (B, N, C), which is the same as mixing positions.

        Args:
            h: the tokens.
            bias: (B, 1, 1, N), added to the logits of each key; None for none.
            valid: (B, N) bool, False for padding, which takes no part in any statistics; None
                when there is none. Padded keys have to be excluded by the bias.

        Returns:
            (B, N, C).
        """
        attended, rest = h.split((self.partial_dim, h.shape[2] - self.partial_dim), -1)
        qkv = _rows(self.qkv, self._normed(attended, valid), valid)[:, None]
        q, k, v = qkv.split((self.qk_dim, self.qk_dim, self.partial_dim), -1)
        y = attention.attend(q, k, v, bias, scale=self.qk_dim**-0.5)  # (B, 1, N, p)
        return _rows(self.proj, torch.cat([y[:, 0], rest], -1), valid)

    def _normed(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Group norm of tokens with one group: statistics over all channels and valid tokens."""
        if valid is None:
            y: Tensor = self.pre_norm(x.mT).mT
            return y
        norm, counts = self.pre_norm, valid[..., None].float()
        total = counts.sum((1, 2), keepdim=True) * x.shape[2]
        values = x.float()
        values = values - (values * counts).sum((1, 2), keepdim=True) / total
        var = (values.square() * counts).sum((1, 2), keepdim=True) / total
        return (values * (var + norm.eps).rsqrt() * norm.weight + norm.bias).to(x.dtype)


def _rows(layer: nn.Module, x: Tensor, valid: Tensor | None) -> Tensor:
    """A layer without neighbours on tokens x (B, N, C); padding enters no batch statistics.

    Each token is a map of one position: no other strides than these can be misread.
    """
    if valid is None or not layer.training:
        y: Tensor = layer(x.flatten(0, 1)[:, :, None, None])
        return y[:, :, 0, 0].unflatten(0, x.shape[:2])
    made = layer(x[valid][:, :, None, None])[:, :, 0, 0]
    return made.new_zeros(*x.shape[:2], made.shape[1]).index_put((valid,), made)
