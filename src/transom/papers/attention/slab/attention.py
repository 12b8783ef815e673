"""Simplified linear attention (SLAB, sec. 3.3): ReLU features and a depth-wise convolution."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.errors import TokensError

EPS = 1e-6


def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = EPS) -> Tensor:
    """Attention whose weights are products of non-negative features.

    ``out_i = q_i (Σ_j k_jᵀ v_j) / (q_i · Σ_j k_j + eps)``. The sums are made first where that
    costs less (N large beside d), the products q kᵀ otherwise; the value is the same. float32 or
    better inside, whatever autocast says.

    Args:
        q: (..., N, d) non-negative features of the queries.
        k: (..., M, d) non-negative features of the keys.
        v: (..., M, e).
        eps: keeps a query without any feature at 0.

    Returns:
        (..., N, e) in the dtype of the sums.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    kind = v.device.type
    known = torch.amp.is_autocast_available(kind)  # not on the meta device
    with torch.autocast(kind, enabled=False) if known else contextlib.nullcontext():
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        total = q @ k.sum(-2).unsqueeze(-1) + eps  # (..., N, 1)
        n, m, d, e = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
        if n * m * (d + e) > d * e * (n + m):
            return q @ (k.mT @ v) / total
        return (q @ k.mT) @ v / total


def local(v: Tensor, grid: tuple[int, int], conv: nn.Conv2d) -> Tensor:
    """What the depth-wise convolution of the values adds; all heads share its filters.

    Args:
        v: (B, H, N, d) values of the tokens of a map.
        grid: (h, w) with h·w = N.
        conv: depth-wise over d channels.

    Returns:
        (B, H, N, d).
    """
    maps = v.flatten(0, 1).mT.unflatten(-1, grid).to(conv.weight.dtype)
    return conv(maps).flatten(2).mT.unflatten(0, v.shape[:2])


def depthwise(channels: int, kernel_size: int) -> nn.Conv2d:
    """The convolution of the values; keeps the size of the map."""
    return nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)


def resized_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A position table (1, h·w, C) for another grid, bicubic; unchanged for the same one."""
    if old == new:
        return table
    maps = table.mT.unflatten(-1, old).float()
    maps = F.interpolate(maps, new, mode="bicubic", align_corners=False, antialias=True)
    return maps.flatten(2).mT.to(table.dtype)


class SimplifiedLinearAttention(nn.Module):
    """ReLU(q), ReLU(k + P) and v in linear attention, plus a depth-wise convolution of v.

    Attributes:
        window_size: (h, w) of the map it works on.
        positional_encoding: (1, h·w, C), the table P.
        dwc: over the d channels of a head, shared by all heads.
    """

    def __init__(
        self,
        dim: int,
        window_size: tuple[int, int],
        num_heads: int,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        kernel_size: int = 5,
        eps: float = EPS,
    ) -> None:
        """Build the attention.

        Args:
            dim: channels C.
            window_size: (h, w) of the map.
            num_heads: H.
            qkv_bias: whether queries, keys and values have a bias.
            proj_drop: dropout behind the output projection.
            kernel_size: of the depth-wise convolution, odd.
            eps: in the normaliser.
        """
        super().__init__()
        self.window_size = window_size
        self.num_heads = num_heads
        self.eps = eps
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dwc = depthwise(dim // num_heads, kernel_size)
        table = torch.zeros(1, window_size[0] * window_size[1], dim)
        self.positional_encoding = nn.Parameter(table)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mixed tokens.

        Args:
            x: (B, h·w, C).
            mask: not looked at, as in the official code: a map is never shifted here.

        Returns:
            (B, h·w, C).

        Raises:
            TokensError: x does not have h·w tokens.
        """
        h, w = self.window_size
        if x.shape[1] != h * w:
            raise TokensError(
                f"linear attention for a {h} x {w} map got {x.shape[1]} tokens; build the model "
                "with the img_size of its images, or call its set_input_size"
            )
        q, k, v = self.qkv(x).chunk(3, -1)
        k = k + self.positional_encoding
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = linear_attention(q.relu(), k.relu(), v, self.eps).to(x.dtype)
        y = y + local(v, self.window_size, self.dwc).to(x.dtype)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))

    def set_window(self, window_size: tuple[int, int]) -> None:
        """Work on another map from now on; the position table is interpolated."""
        table = resized_table(self.positional_encoding.data, self.window_size, window_size)
        self.positional_encoding = nn.Parameter(table)
        self.window_size = window_size
