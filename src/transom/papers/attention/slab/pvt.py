"""Pyramid vision transformer with PRepBN, and with linear attention on reduced maps (SLAB-PVT)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, PatchEmbed, to_2tuple, trunc_normal_
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


class ReducedAttention(nn.Module):
    """Attention whose keys and values come from a map that a strided convolution made smaller.

    With linear attention the values are stretched back to N tokens along the flattened axis, as
    published, before the depth-wise convolution sees them as a map.

    Attributes:
        grid: (h, w) of the map.
        ratio: how much smaller the map of the keys is, per side.
        linear: whether attention is linear; else it is softmax.
    """

    def __init__(
        self,
        dim: int,
        grid: Size,
        num_heads: int,
        ratio: int,
        linear: bool,
        norm_layer: Make,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        kernel_size: int = 5,
    ) -> None:
        """Build the attention.

        Args:
            dim: channels C.
            grid: (h, w) of the map, a multiple of the ratio.
            num_heads: H.
            ratio: of the sides of the two maps; 1 for none.
            linear: whether attention is linear.
            norm_layer: makes a norm of C channels.
            qkv_bias: whether queries, keys and values have a bias.
            attn_drop: dropout on softmax weights.
            proj_drop: dropout behind the output projection.
            kernel_size: of the depth-wise convolution.
        """
        super().__init__()
        self.num_heads = num_heads
        self.ratio = ratio
        self.linear = linear
        self.attn_drop = attn_drop
        self.grid = grid
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        if ratio > 1:
            self.sr = nn.Conv2d(dim, dim, ratio, ratio)
            self.norm = norm_layer(dim)
        if linear:
            self.dwc = depthwise(dim // num_heads, kernel_size)
            keys = (grid[0] // ratio) * (grid[1] // ratio)
            self.positional_encoding = nn.Parameter(torch.zeros(1, keys, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, h·w, C) to tokens of the same shape."""
        source = x
        if self.ratio > 1:
            source = self.norm(self.sr(x.mT.unflatten(-1, self.grid)).flatten(2).mT)
        q, (k, v) = self.q(x), self.kv(source).chunk(2, -1)
        if self.linear:
            q, k = q.relu(), (k + self.positional_encoding).relu()
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        if self.linear:
            y = linear_attention(q, k, v).to(x.dtype) + self._local(v, x.shape[1]).to(x.dtype)
        else:
            drop = self.attn_drop if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, None, drop)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))

    def _local(self, v: Tensor, count: int) -> Tensor:
        if self.ratio > 1:
            stretched = F.interpolate(v.flatten(0, 1).mT, count, mode="linear")
            v = stretched.mT.unflatten(0, v.shape[:2])
        return local(v, self.grid, self.dwc)

    def set_grid(self, grid: Size) -> None:
        """Work on another map from now on; the position table is interpolated."""
        if self.linear:
            old, new = (tuple(side // self.ratio for side in g) for g in (self.grid, grid))
            table = resized_table(self.positional_encoding.data, old, new)  # type: ignore[arg-type]
            self.positional_encoding = nn.Parameter(table)
        self.grid = grid


class PVTBlock(nn.Module):
    """Pre-norm block of a stage."""

    def __init__(
        self,
        dim: int,
        grid: Size,
        num_heads: int,
        ratio: int,
        linear: bool,
        norm_layer: Make,
        mlp_ratio: float,
        drop_path: float,
        **attention: Any,
    ) -> None:
        """Build the block; see :class:`ReducedAttention`."""
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = ReducedAttention(dim, grid, num_heads, ratio, linear, norm_layer, **attention)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=attention.get("proj_drop", 0.0))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) to tokens of the same shape."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SlabPVT(Pyramid):
    """Pyramid vision transformer whose norms fold away, with the mean of its last map as output."""

    matcher: ClassVar[dict[str, Any]] = {
        "stem": r"^patch_embed1|^pos_embed1",
        "blocks": [
            (r"^block(\d+)\.(\d+)", None),
            (r"^(?:patch|pos)_embed(\d+)", (0,)),
        ],
    }

    def __init__(
        self,
        img_size: int | Size = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        attn_type: str = "LLLL",
        qkv_bias: bool = True,
        kernel_size: int = 5,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Make | None = None,
        total_step: int = 300_000,
    ) -> None:
        """Build the network.

        Args:
            img_size: pixels, one number or (H, W), a multiple of 32.
            patch_size: pixels of a patch of the first stage.
            in_chans: channels of an image.
            num_classes: 0 for no head.
            global_pool: "avg", or "" for maps.
            embed_dims: channels of each stage.
            depths: blocks of each stage.
            num_heads: of each stage.
            mlp_ratios: width of the ffn in units of the channels, of each stage.
            sr_ratios: how much smaller the map of the keys is in each stage.
            attn_type: a letter a stage: L for linear, S for softmax attention.
            qkv_bias: whether queries, keys and values have a bias.
            kernel_size: of the convolution in linear attention.
            drop_rate: dropout in front of the head.
            proj_drop_rate: dropout behind linear maps and positions.
            attn_drop_rate: dropout on softmax weights.
            drop_path_rate: stochastic depth of the last block.
            norm_layer: makes a norm of so many channels; PRepBN for None.
            total_step: training steps in which PRepBN becomes RepBN.

        Raises:
            SettingsError: the settings contradict each other.
        """
        count = len(embed_dims)
        names = [f"block{i + 1}" for i in range(count)]
        super().__init__(
            embed_dims,
            names,
            num_classes,
            global_pool,
            drop_rate,
            attn_type,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            sr_ratios=sr_ratios,
        )
        norm = norm_layer or partial(progressive, ln_eps=1e-6, total_step=total_step)
        self.patch_size = patch_size
        self.sr_ratios = tuple(sr_ratios)
        self.pos_drop = nn.Dropout(proj_drop_rate)
        self._measure(to_2tuple(img_size))
        rates = rising(drop_path_rate, sum(depths))
        for i, dim in enumerate(embed_dims):
            patch, below = (2, embed_dims[i - 1]) if i else (patch_size, in_chans)
            h, w = self.grids[i]
            embed = PatchEmbed((h * patch, w * patch), patch, below, dim, strict_img_size=False)
            embed.norm = norm(dim)
            table = nn.Parameter(torch.zeros(1, h * w, dim))
            trunc_normal_(table, std=0.02)
            blocks = [
                PVTBlock(
                    dim,
                    self.grids[i],
                    num_heads[i],
                    sr_ratios[i],
                    attn_type[i] == "L",
                    norm,
                    mlp_ratios[i],
                    rates[sum(depths[:i]) + j],
                    qkv_bias=qkv_bias,
                    attn_drop=attn_drop_rate,
                    proj_drop=proj_drop_rate,
                    kernel_size=kernel_size,
                )
                for j in range(depths[i])
            ]
            self.add_module(f"patch_embed{i + 1}", embed)
            self.register_parameter(f"pos_embed{i + 1}", table)
            self.add_module(f"block{i + 1}", nn.ModuleList(blocks))
        self.reset_classifier(num_classes)
        self.apply(narrow)

    def _measure(self, size: Size) -> None:
        """Maps of the stages at a size of the images."""
        last = self.patch_size * 2 ** (len(self.sr_ratios) - 1)
        h, w = (side // self.patch_size for side in size)
        grids = [(h // 2**i, w // 2**i) for i in range(len(self.sr_ratios))]
        reduced = all(
            not g[0] % ratio and not g[1] % ratio
            for g, ratio in zip(grids, self.sr_ratios, strict=True)
        )
        if size[0] % last or size[1] % last or not reduced:
            raise SettingsError(
                f"img_size is {size}; expected multiples of {last} whose maps {grids} divide by "
                f"{self.sr_ratios}"
            )
        self.img_size = size
        self.grids = grids

    def resize(self, size: Size) -> None:
        before = self.grids
        self._measure(size)
        for i in range(len(self.feature_info)):
            name, new = f"pos_embed{i + 1}", self.grids[i]
            table = resized_table(self.get_parameter(name).data, before[i], new)
            self.register_parameter(name, nn.Parameter(table))
            for block in self.stage(i):
                block.attn.set_grid(new)

    def enter(self, x: Tensor, i: int) -> Tensor:
        own: Any = self
        if i:
            x = x.mT.unflatten(2, self.grids[i - 1])
        x = getattr(own, f"patch_embed{i + 1}")(x)
        y: Tensor = self.pos_drop(x + getattr(own, f"pos_embed{i + 1}"))
        return y

    def cut(self, count: int) -> None:
        for i in range(count, len(self.feature_info)):
            for part in ("patch_embed", "pos_embed", "block"):
                delattr(self, f"{part}{i + 1}")
