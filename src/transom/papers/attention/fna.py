"""FNA: neighborhood attention, a sliding window that is shifted inwards at the borders.

Every query of a grid sees a full window of K keys an axis and nothing else,

    y_i = sum over j in N(i) of softmax_j(q_i · k_j / sqrt(d)) v_j,      |N(i)| = product of K

with N(i) centred on i, or as near to that as the border allows. Dilation, stride, causality and
the window itself are set axis by axis; a set of extra keys (class and register tokens) joins the
softmax of every query. The mathematics is :mod:`transom.ops.neighborhood`; this room has the
modules of the paper's package and the method for hosts.

On a host each patch sees its window and all prefix tokens, and each prefix token sees everything,
as before. The host's own projections stay, so there is nothing to train, and nothing is lost where
a window covers the grid.

x: (B, *grid, D), one to three axes; q, k, v: (B, *grid, H, d).

Source: Hassani, Hwu and Shi, Faster Neighborhood Attention: Reducing the O(n²) Cost of Self
Attention at the Threadblock Level, NeurIPS 2024; official code SHI-Labs/NATTEN@8c8729f (MIT; this
file is our own).

Checked against golden cases of the official package in 1-D, 2-D and 3-D: outputs, log-sum-exp and
gradients. The call of the package natten was checked with its own CPU backend (0.21.7), the flex
path on a CPU. Not checked: both on a GPU, so the CUDA kernels that the paper is about.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.errors import SettingsError, TokensError
from transom.hosts.base import Host
from transom.ops import attention, neighborhood
from transom.ops.neighborhood.rule import Bools, Ints, per_axis
from transom.registry import Method, Offer
from transom.slots import Fill
from transom.tokens import Record


class NeighborhoodAttention(nn.Module):
    """Neighborhood attention with its projections; parameters are named as in the package.

    Args:
        embed_dim: width D of the tokens.
        num_heads: heads H.
        kernel_size: keys that a query sees; one value, or one an axis.
        stride: neighbouring queries that share a window.
        dilation: distance between the keys of a window.
        is_causal: whether keys behind the query are hidden.
        qkv_bias: whether the input projection has a bias.
        qk_scale: of the logits; 1/sqrt(d) when None.
        proj_drop: dropout behind the output projection.
    """

    rank: ClassVar[int]

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: Ints,
        stride: Ints = 1,
        dilation: Ints = 1,
        is_causal: Bools = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise SettingsError(
                f"embed_dim {embed_dim} is no multiple of num_heads {num_heads}; expected one"
            )
        self.num_heads = num_heads
        self.kernel_size = per_axis("kernel_size", kernel_size, self.rank)
        self.stride = per_axis("stride", stride, self.rank)
        self.dilation = per_axis("dilation", dilation, self.rank)
        self.is_causal = per_axis("is_causal", is_causal, self.rank)
        self.scale = qk_scale if qk_scale is not None else (embed_dim // num_heads) ** -0.5
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, *grid, D) mixed inside their windows."""
        if x.dim() != self.rank + 2:
            raise TokensError(
                f"{type(self).__name__} got x of shape {tuple(x.shape)}; expected a batch, "
                f"{self.rank} axes of a grid, and channels"
            )
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        y = neighborhood.attend(
            q, k, v, self.kernel_size, self.stride, self.dilation, self.is_causal, scale=self.scale
        )
        return self.proj_drop(self.proj(y.flatten(-2)))

    def extra_repr(self) -> str:
        return (
            f"heads={self.num_heads}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"dilation={self.dilation}, is_causal={self.is_causal}"
        )


class NeighborhoodAttention1D(NeighborhoodAttention):
    """Over sequences (B, L, D)."""

    rank = 1


class NeighborhoodAttention2D(NeighborhoodAttention):
    """Over maps (B, H, W, D)."""

    rank = 2


class NeighborhoodAttention3D(NeighborhoodAttention):
    """Over videos or volumes (B, T, H, W, D)."""

    rank = 3


OFFERS = (
    Offer("operator", "neighborhood_attention", neighborhood.attend),
    Offer("operator", "neighborhood_attention_1d", NeighborhoodAttention1D),
    Offer("operator", "neighborhood_attention_2d", NeighborhoodAttention2D),
    Offer("operator", "neighborhood_attention_3d", NeighborhoodAttention3D),
)


@dataclass(frozen=True)
class Near:
    """Attention operator: patches see their neighborhood and the prefix, the prefix sees all.

    Attributes:
        kernel_size, stride, dilation, is_causal: of the window, one an axis; a window that would
            leave the grid is made as large as the grid allows.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    is_causal: tuple[bool, bool]

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None,
        scale: float,
        record: Record | None,
    ) -> Tensor:
        assert record is not None
        (first, query), (front_k, key), (front_v, value) = (
            record.as_map(t.transpose(1, 2)) for t in (q, k, v)
        )
        window = self.window(query.shape[1:3])
        if window is None:
            return attention.attend(q, k, v, bias, scale=scale)
        if bias is not None:
            # what the host adds to each pair is N² numbers already
            hidden = ~self._dense(query.shape[1:3], first.shape[1], window, q.device)
            far = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
            bias = bias + far.masked_fill(hidden, torch.finfo(q.dtype).min)
            return attention.attend(q, k, v, bias, scale=scale)
        prefix = first.shape[1]
        patches = neighborhood.attend(
            query,
            key,
            value,
            *window,
            scale=scale,
            extra_k=front_k if prefix else None,
            extra_v=front_v if prefix else None,
        )
        patches = patches.flatten(1, 2).transpose(1, 2)
        if not prefix:
            return patches
        lead = attention.attend(q[:, :, :prefix], k, v, scale=scale)
        return torch.cat([lead, patches], 2)

    def window(
        self, grid: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]] | None:
        """Kernel, stride, dilation and causality on this grid; None if everything is seen."""
        if min(grid) < 2:
            return None
        dilation = tuple(min(d, length // 2) for d, length in zip(self.dilation, grid, strict=True))
        kernel = tuple(
            min(size, length // d)
            for size, length, d in zip(self.kernel_size, grid, dilation, strict=True)
        )
        stride = tuple(map(min, self.stride, kernel))
        if not any(self.is_causal) and neighborhood.full(grid, kernel, dilation):
            return None
        return kernel, stride, dilation, self.is_causal

    def _dense(
        self,
        grid: tuple[int, ...],
        prefix: int,
        window: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]],
        device: torch.device,
    ) -> Tensor:
        """(N, N) bool: does a token see another one?"""
        patches = neighborhood.dense_mask(neighborhood.axes(grid, *window), device)
        return F.pad(patches, (prefix, 0, prefix, 0), value=True)


@dataclass(frozen=True)
class FNA(Method):
    """Neighborhood attention between the projections of a host.

    Attributes:
        kernel_size: patches that a patch sees along each axis (rows, columns), at least 2; cut to
            the grid where it is larger.
        stride: neighbouring patches that share a window, at most kernel_size.
        dilation: distance between the patches of a window.
        is_causal: whether patches below (right of) a patch are hidden.
    """

    kernel_size: int | tuple[int, int] = 7
    stride: int | tuple[int, int] = 1
    dilation: int | tuple[int, int] = 1
    is_causal: bool | tuple[bool, bool] = False
    needs_grid: ClassVar[bool] = True

    def __post_init__(self) -> None:
        near = self._near()
        for kernel, stride, dilation in zip(
            near.kernel_size, near.stride, near.dilation, strict=True
        ):
            if kernel < 2 or dilation < 1 or not 1 <= stride <= kernel:
                raise SettingsError(
                    f"kernel_size {kernel}, stride {stride} and dilation {dilation} make no "
                    "window; expected kernel_size >= 2, 1 <= stride <= kernel_size, dilation >= 1"
                )

    def _near(self) -> Near:
        def pair(value: int | tuple[int, int]) -> tuple[int, int]:
            return value if isinstance(value, tuple) else (value, value)

        down, right = pair(self.is_causal)
        return Near(
            pair(self.kernel_size),
            pair(self.stride),
            pair(self.dilation),
            (bool(down), bool(right)),
        )

    def fit(self, host: Host) -> list[Fill]:
        return [Fill(attention=self._near())] * host.depth

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, int]]:
        side = max(math.isqrt(patches), 2)
        sizes = (side * 3 // 4, side // 2, side // 4)
        return [{"kernel_size": max(size, 2)} for size in sizes]

    @classmethod
    def neutral(cls) -> dict[str, int]:
        return {"kernel_size": 1 << 20}
