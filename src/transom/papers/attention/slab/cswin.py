"""CSWin transformer with PRepBN, and with linear attention in its first stages (SLAB-CSWin)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, to_2tuple
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.networks import narrow, rising
from transom.papers.attention.slab.attention import (
    depthwise,
    linear_attention,
    local,
    resized_table,
)
from transom.papers.attention.slab.norm import progressive
from transom.papers.attention.slab.pyramid import Make, Pyramid, Size
from transom.papers.attention.slab.swin import unwindowed, windows


class StripeAttention(nn.Module):
    """Attention in stripes of a map, plus a convolution of the values within each stripe.

    Attributes:
        axis: 0 for stripes that stand (the whole height), 1 for lying ones, None for the map.
        stripe: (h, w) of a stripe.
        get_v: 3 x 3 depth-wise convolution of the values.
        scale: zeros, in linear attention only: in the official checkpoints, and used by nothing.
    """

    def __init__(
        self,
        dim: int,
        grid: Size,
        axis: int | None,
        width: int,
        num_heads: int,
        linear: bool,
        attn_drop: float = 0.0,
        kernel_size: int = 5,
    ) -> None:
        """Build the attention.

        Args:
            dim: channels C.
            grid: (h, w) of the map.
            axis: see above.
            width: of a stripe.
            num_heads: H.
            linear: whether attention is linear; else it is softmax.
            attn_drop: dropout on softmax weights.
            kernel_size: of the depth-wise convolution in linear attention.
        """
        super().__init__()
        self.axis = axis
        self.num_heads = num_heads
        self.linear = linear
        self.attn_drop = attn_drop
        self.get_v = depthwise(dim, 3)
        self.stripe = self._stripe(grid, width)
        if linear:
            self.dwc = depthwise(dim // num_heads, kernel_size)
            self.scale = nn.Parameter(torch.zeros(1, 1, dim), requires_grad=False)
            count = self.stripe[0] * self.stripe[1]
            self.positional_encoding = nn.Parameter(torch.zeros(1, count, dim))

    def _stripe(self, grid: Size, width: int) -> Size:
        size = {None: grid, 0: (grid[0], width), 1: (width, grid[1])}[self.axis]
        if grid[0] % size[0] or grid[1] % size[1]:
            raise SettingsError(
                f"a {grid[0]} x {grid[1]} map does not divide into stripes of {size[0]} x {size[1]}"
            )
        self.grid = grid
        return size

    def set_grid(self, grid: Size, width: int) -> None:
        """Work on another map from now on; the position table is interpolated."""
        old = self.stripe
        self.stripe = self._stripe(grid, width)
        if self.linear:
            table = resized_table(self.positional_encoding.data, old, self.stripe)
            self.positional_encoding = nn.Parameter(table)

    def forward(self, qkv: Tensor) -> Tensor:
        """Mixed values.

        Args:
            qkv: (3, B, h·w, C).

        Returns:
            (B, h·w, C).
        """
        q, k, v = (windows(t.unflatten(1, self.grid), self.stripe) for t in qkv)  # (B·n, M, C)
        near = self.get_v(v.mT.unflatten(-1, self.stripe)).flatten(2).mT
        if self.linear:
            q, k = q.relu(), (k + self.positional_encoding).relu()
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        if self.linear:
            y = linear_attention(q, k, v).to(v.dtype)
            y = y + local(v, self.stripe, self.dwc).to(v.dtype)
        else:
            drop = self.attn_drop if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, None, drop)
        y = y.transpose(1, 2).flatten(2) + near.to(y.dtype)
        return unwindowed(y, self.stripe, self.grid).flatten(1, 2)


class CSWinBlock(nn.Module):
    """Pre-norm block: half of the channels in standing stripes, half in lying ones, or the map.

    Attributes:
        whole: whether one attention sees the whole map.
    """

    def __init__(
        self,
        dim: int,
        grid: Size,
        width: int,
        num_heads: int,
        linear: bool,
        norm_layer: Make,
        whole: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        drop_path: float = 0.0,
        **attention: Any,
    ) -> None:
        """Build the block; see :class:`StripeAttention`."""
        super().__init__()
        self.whole = whole or grid == (width, width)
        self.norm1 = norm_layer(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        axes: list[int | None] = [None] if self.whole else [0, 1]
        parts = len(axes)
        self.attns = nn.ModuleList(
            StripeAttention(
                dim // parts, grid, axis, width, num_heads // parts, linear, **attention
            )
            for axis in axes
        )
        self.proj = nn.Linear(dim, dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.norm2 = norm_layer(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, h·w, C) to tokens of the same shape."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, -1)).permute(2, 0, 1, 3)
        halves = qkv.chunk(len(self.attns), -1)
        y = torch.cat([attend(half) for attend, half in zip(self.attns, halves, strict=True)], -1)
        x = x + self.drop_path(self.proj(y))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConvEmbed(nn.Sequential):
    """Overlapping patches of 7 pixels, 4 apart; its parts keep the official numbers, 0 and 2."""

    def __init__(self, in_chans: int, dim: int, norm_layer: Make) -> None:
        flat = nn.Flatten(2)
        super().__init__(nn.Conv2d(in_chans, dim, 7, 4, 2), flat, norm_layer(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to tokens (B, N, C)."""
        conv, flat, norm = self
        return norm(flat(conv(x)).mT)


class MergeBlock(nn.Module):
    """A strided convolution between two stages, and a norm."""

    def __init__(self, dim: int, norm_layer: Make) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, 2 * dim, 3, 2, 1)
        self.norm = norm_layer(2 * dim)

    def forward(self, x: Tensor, grid: Size) -> Tensor:
        """Tokens (B, h·w, C) of a map to (B, h/2·w/2, 2 C)."""
        return self.norm(self.conv(x.mT.unflatten(-1, grid)).flatten(2).mT)


class SlabCSWin(Pyramid):
    """CSWin transformer whose norms fold away and whose attention is linear where asked."""

    matcher: ClassVar[dict[str, Any]] = {
        "stem": r"^stage1_conv_embed",
        "blocks": [
            (r"^stage(\d+)\.(\d+)", None),
            (r"^merge(\d+)", (0,)),
            (r"^norm", (99999,)),
        ],
    }

    def __init__(
        self,
        img_size: int | Size = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        split_size: Sequence[int] | None = None,
        num_heads: Sequence[int] = (2, 4, 8, 16),
        attn_type: str = "LLSS",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        kernel_size: int = 5,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_layer: Make | None = None,
        total_step: int = 120_000,
    ) -> None:
        """Build the network.

        Args:
            img_size: pixels, one number or (H, W), a multiple of 32.
            in_chans: channels of an image.
            num_classes: 0 for no head.
            global_pool: "avg", or "" for maps.
            embed_dim: channels of the first stage; doubled by each following one.
            depths: blocks of each stage.
            split_size: width of the stripes of each stage; (1, 2, s, s) for None, with s the
                smaller side of the last map, 7 at 224 pixels.
            num_heads: of each stage.
            attn_type: a letter a stage: L for linear, S for softmax attention.
            mlp_ratio: width of the ffn in units of the channels.
            qkv_bias: whether queries, keys and values have a bias.
            kernel_size: of the convolution in linear attention.
            drop_rate: dropout in front of the head.
            proj_drop_rate: dropout in the ffn.
            attn_drop_rate: dropout on softmax weights.
            drop_path_rate: stochastic depth of the last block.
            norm_layer: makes a norm of so many channels; PRepBN for None.
            total_step: training steps in which PRepBN becomes RepBN.

        Raises:
            SettingsError: the settings contradict each other.
        """
        count = len(depths)
        widths = [embed_dim * 2**i for i in range(count)]
        names = [f"stage{i + 1}" for i in range(count)]
        super().__init__(
            widths, names, num_classes, global_pool, drop_rate, attn_type, num_heads=num_heads
        )
        norm = norm_layer or partial(progressive, ln_eps=1e-5, total_step=total_step)
        self.split_size = None if split_size is None else tuple(split_size)
        self._measure(to_2tuple(img_size), count)
        self.stage1_conv_embed = ConvEmbed(in_chans, embed_dim, norm)
        rates = rising(drop_path_rate, sum(depths))
        for i, dim in enumerate(widths):
            blocks = [
                CSWinBlock(
                    dim,
                    self.grids[i],
                    self.widths[i],
                    num_heads[i],
                    attn_type[i] == "L",
                    norm,
                    whole=i == count - 1,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    drop=proj_drop_rate,
                    drop_path=rates[sum(depths[:i]) + j],
                    attn_drop=attn_drop_rate,
                    kernel_size=kernel_size,
                )
                for j in range(depths[i])
            ]
            self.add_module(f"stage{i + 1}", nn.ModuleList(blocks))
            if i < count - 1:
                self.add_module(f"merge{i + 1}", MergeBlock(dim, norm))
        self.norm = norm(widths[-1])
        self.reset_classifier(num_classes)
        self.apply(narrow)

    def _measure(self, size: Size, count: int) -> None:
        """Maps and stripes of the stages at a size of the images."""
        last = 4 * 2 ** (count - 1)
        if size[0] % last or size[1] % last:
            raise SettingsError(f"img_size is {size}; expected multiples of {last} pixels")
        self.img_size = size
        self.grids = [(size[0] // (4 * 2**i), size[1] // (4 * 2**i)) for i in range(count)]
        side = min(self.grids[-1])
        self.widths = self.split_size or (1, 2, side, side)

    def resize(self, size: Size) -> None:
        self._measure(size, len(self.grids))
        for i in range(len(self.feature_info)):
            for block in self.stage(i):
                for attend in block.attns:
                    attend.set_grid(self.grids[i], self.widths[i])

    def enter(self, x: Tensor, i: int) -> Tensor:
        own: Any = self
        if i:
            y: Tensor = getattr(own, f"merge{i}")(x, self.grids[i - 1])
            return y
        return self.stage1_conv_embed(x)

    def cut(self, count: int) -> None:
        for i in range(count, len(self.feature_info)):
            delattr(self, f"merge{i}")
            delattr(self, f"stage{i + 1}")
