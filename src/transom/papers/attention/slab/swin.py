"""Swin transformer with PRepBN, and with linear attention in its first stages (SLAB-Swin).

Linear stages see their whole map; softmax stages look through windows of 7 x 7 (at 224 pixels),
every second block shifted, as the official code builds them for the published configs: the third
stage does not see its 14 x 14 map at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, PatchEmbed, to_2tuple, trunc_normal_
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.networks import narrow, rising
from transom.papers.attention.slab.attention import SimplifiedLinearAttention
from transom.papers.attention.slab.norm import progressive
from transom.papers.attention.slab.pyramid import Make, Pyramid, Size


def windows(x: Tensor, size: Size) -> Tensor:
    """A map (B, h, w, C) as windows (B·n, size, C)."""
    x = x.unflatten(2, (-1, size[1])).unflatten(1, (-1, size[0]))  # (B, i, a, j, b, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def unwindowed(x: Tensor, size: Size, grid: Size) -> Tensor:
    """Windows (B·n, size, C) as the map (B, h, w, C) they were cut from."""
    rows, columns = grid[0] // size[0], grid[1] // size[1]
    x = x.unflatten(1, size).unflatten(0, (-1, rows, columns))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def shift_mask(grid: Size, size: Size, shift: Size) -> Tensor | None:
    """(n, N, N): -100 where two tokens of a shifted window were no neighbours; None unshifted."""
    if shift == (0, 0):
        return None
    region = torch.zeros(1, *grid, 1)
    for axis in (0, 1):
        if shift[axis]:
            length = grid[axis]
            border = torch.zeros(length)
            border[length - size[axis] : length - shift[axis]] = 1
            border[length - shift[axis] :] = 2
            region += 3**axis * border.view(1, *((-1, 1) if axis == 0 else (1, -1)), 1)
    label = windows(region, size).squeeze(-1)
    return (label[:, None] != label[:, :, None]) * -100.0


def relative_index(size: Size) -> Tensor:
    """(N, N): row of the bias table for each pair of tokens of a window."""
    places = torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij")).flatten(1)
    dy, dx = places[:, :, None] - places[:, None]
    return (dy + size[0] - 1) * (2 * size[1] - 1) + dx + size[1] - 1


class WindowAttention(nn.Module):
    """Softmax attention in a window, with a learned bias per relative position."""

    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        window_size: Size,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        """Build the attention.

        Args:
            dim: channels C.
            window_size: (h, w) of a window.
            num_heads: H.
            qkv_bias: whether queries, keys and values have a bias.
            attn_drop: dropout on the weights.
            proj_drop: dropout behind the output projection.
        """
        super().__init__()
        self.window_size = window_size
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        rows = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_index(window_size))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mixed tokens.

        Args:
            x: (B·n, N, C), windows of one image side by side.
            mask: (n, N, N) added to the logits of each window.

        Returns:
            (B·n, N, C).
        """
        heads, count = self.num_heads, x.shape[1]
        q, k, v = self.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias = bias.view(1, count, count, heads).permute(0, 3, 1, 2)  # (1, H, N, N)
        bias = bias.to(q.dtype)
        drop = self.attn_drop if self.training else 0.0
        if mask is None:
            y = F.scaled_dot_product_attention(q, k, v, bias, drop)
        else:
            # the windows of an image count as heads, so that one mask serves the whole batch
            n = mask.shape[0]
            both = (bias + mask[:, None].to(bias.dtype)).flatten(0, 1)[None]
            q, k, v = (t.unflatten(0, (-1, n)).flatten(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, both, drop)
            y = y.unflatten(1, (n, heads)).flatten(0, 1)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))

    def set_window(self, window_size: Size) -> None:
        """Work in another window from now on; the bias table is interpolated."""
        if window_size == self.window_size:
            return
        old, new = ((2 * h - 1, 2 * w - 1) for h, w in (self.window_size, window_size))
        table = self.relative_position_bias_table.data
        maps = table.mT.unflatten(-1, old)[None].float()
        maps = F.interpolate(maps, new, mode="bicubic", align_corners=False)
        table = maps[0].flatten(1).mT.to(table.dtype)
        self.relative_position_bias_table = nn.Parameter(table)
        self.relative_position_index = relative_index(window_size).to(table.device)
        self.window_size = window_size


class SwinBlock(nn.Module):
    """Pre-norm block over the windows of a map.

    Attributes:
        grid: (h, w) of the map.
        shift: how far the windows are moved.
        attn_mask: (n, N, N) or None; saved under this name, as in the official code.
    """

    attn_mask: Tensor | None

    def __init__(
        self,
        dim: int,
        grid: Size,
        num_heads: int,
        window_size: Size,
        shifted: bool = False,
        linear: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        kernel_size: int = 5,
        norm_layer: Make = nn.LayerNorm,
    ) -> None:
        """Build the block.

        Args:
            dim: channels C.
            grid: (h, w) of the map.
            num_heads: H.
            window_size: (h, w) of a window; the map where that is smaller.
            shifted: whether windows are moved by half their size.
            linear: whether attention is linear.
            mlp_ratio: width of the ffn in units of C.
            qkv_bias: whether queries, keys and values have a bias.
            proj_drop: dropout behind linear maps.
            attn_drop: dropout on softmax weights.
            drop_path: stochastic depth.
            kernel_size: of the convolution in linear attention.
            norm_layer: makes a norm of C channels.
        """
        super().__init__()
        self.shifted = shifted
        self.norm1 = norm_layer(dim)
        size = self._place(grid, window_size)
        self.attn: SimplifiedLinearAttention | WindowAttention
        if linear:
            self.attn = SimplifiedLinearAttention(
                dim, size, num_heads, qkv_bias, proj_drop, kernel_size
            )
        else:
            self.attn = WindowAttention(dim, size, num_heads, qkv_bias, attn_drop, proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.register_buffer("attn_mask", shift_mask(grid, size, self.shift))

    def _place(self, grid: Size, window_size: Size) -> Size:
        """Take over a map; gives the windows that are really used."""
        size = min(grid[0], window_size[0]), min(grid[1], window_size[1])
        if grid[0] % size[0] or grid[1] % size[1]:
            raise SettingsError(
                f"a {grid[0]} x {grid[1]} map does not divide into windows of {size[0]} x {size[1]}"
                "; give windows that divide it, or an image size that is a multiple of 32 pixels"
            )
        self.grid = grid
        half = (size[0] // 2, size[1] // 2)
        cut = (size[0] < grid[0], size[1] < grid[1])
        self.shift = (half[0] * cut[0], half[1] * cut[1]) if self.shifted else (0, 0)
        return size

    def set_grid(self, grid: Size, window_size: Size) -> None:
        """Work on another map from now on; tables are interpolated."""
        size = self._place(grid, window_size)
        self.attn.set_window(size)
        mask = shift_mask(grid, size, self.shift)
        self.attn_mask = None if mask is None else mask.to(self.attn.proj.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, h·w, C) to tokens of the same shape."""
        h = self.norm1(x).unflatten(1, self.grid)
        moved = self.shift != (0, 0)
        if moved:
            h = h.roll((-self.shift[0], -self.shift[1]), (1, 2))
        size = self.attn.window_size
        y = unwindowed(self.attn(windows(h, size), self.attn_mask), size, self.grid)
        if moved:
            y = y.roll(self.shift, (1, 2))
        x = x + self.drop_path(y.flatten(1, 2))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Four neighbours side by side, normed, to one token of twice the width."""

    def __init__(self, dim: int, norm_layer: Make) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(4 * dim)

    def forward(self, x: Tensor, grid: Size) -> Tensor:
        """Tokens (B, h·w, C) of a map to (B, h/2·w/2, 2 C)."""
        x = x.unflatten(1, (grid[0] // 2, 2, grid[1] // 2, 2))
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)  # column by column, as published
        return self.reduction(self.norm(x))


class SwinStage(nn.Module):
    """Blocks over one map, then the merging that leads to the next one."""

    def __init__(self, blocks: list[SwinBlock], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class SlabSwin(Pyramid):
    """Swin transformer whose norms fold away and whose attention is linear where asked."""

    matcher: ClassVar[dict[str, Any]] = {
        "stem": r"^patch_embed",
        "blocks": [
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.downsample", (0,)),
            (r"^norm", (99999,)),
        ],
    }

    def __init__(
        self,
        img_size: int | Size = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        attn_type: str = "LLSS",
        linear_window: int | None = None,
        softmax_window: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        kernel_size: int = 5,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_layer: Make | None = None,
        total_step: int = 60_000,
    ) -> None:
        """Build the network.

        Args:
            img_size: pixels, one number or (H, W), a multiple of 32.
            patch_size: pixels of a patch.
            in_chans: channels of an image.
            num_classes: 0 for no head.
            global_pool: "avg", or "" for maps.
            embed_dim: channels of the first stage; doubled by each following one.
            depths: blocks of each stage.
            num_heads: of each stage.
            attn_type: a letter a stage: L for linear, S for softmax attention.
            linear_window: side of the windows in linear stages; the whole map for None.
            softmax_window: side of the windows in softmax stages; the map at 1/32 for None, which
                is 7 at 224 pixels and 12 at 384.
            mlp_ratio: width of the ffn in units of the channels.
            qkv_bias: whether queries, keys and values have a bias.
            kernel_size: of the convolution in linear attention.
            drop_rate: dropout in front of the head.
            proj_drop_rate: dropout behind linear maps.
            attn_drop_rate: dropout on softmax weights.
            drop_path_rate: stochastic depth of the last block.
            norm_layer: makes a norm of so many channels; PRepBN for None.
            total_step: training steps in which PRepBN becomes RepBN.

        Raises:
            SettingsError: the settings contradict each other.
        """
        count = len(depths)
        widths = [embed_dim * 2**i for i in range(count)]
        names = [f"layers.{i}" for i in range(count)]
        super().__init__(
            widths, names, num_classes, global_pool, drop_rate, attn_type, num_heads=num_heads
        )
        norm = norm_layer or partial(progressive, ln_eps=1e-5, total_step=total_step)
        self.attn_type = attn_type
        self.given = (linear_window, softmax_window)
        self.patch_embed = PatchEmbed(
            img_size, patch_size, in_chans, embed_dim, norm_layer=_without_device(norm)
        )
        self._measure()
        rates = rising(drop_path_rate, sum(depths))
        layers = []
        for i, width in enumerate(widths):
            blocks = [
                SwinBlock(
                    width,
                    self.grids[i],
                    num_heads[i],
                    self._window(i),
                    shifted=j % 2 == 1,
                    linear=attn_type[i] == "L",
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=rates[sum(depths[:i]) + j],
                    kernel_size=kernel_size,
                    norm_layer=norm,
                )
                for j in range(depths[i])
            ]
            layers.append(SwinStage(blocks, PatchMerging(width, norm) if i < count - 1 else None))
        self.layers = nn.ModuleList(layers)
        self.norm = norm(widths[-1])
        self.reset_classifier(num_classes)
        self.apply(narrow)

    def _measure(self) -> None:
        """Maps of the stages at the current size of the images."""
        h, w = self.patch_embed.grid_size
        count = len(self.attn_type)
        last = 2 ** (count - 1)
        if h % last or w % last:
            raise SettingsError(
                f"the patches make a {h} x {w} map, which cannot be halved {count - 1} times; give "
                f"an image size that is a multiple of {last * self.patch_embed.patch_size[0]}"
            )
        self.grids = [(h // 2**i, w // 2**i) for i in range(count)]

    def _window(self, i: int) -> Size:
        linear, softmax = self.given
        if self.attn_type[i] == "L":
            return self.grids[i] if linear is None else to_2tuple(linear)
        return self.grids[-1] if softmax is None else to_2tuple(softmax)

    def resize(self, size: Size) -> None:
        self.patch_embed.set_input_size(img_size=size)
        self._measure()
        for i in range(len(self.feature_info)):
            for block in self.stage(i):
                block.set_grid(self.grids[i], self._window(i))

    def stage(self, i: int) -> Any:
        return super().stage(i).blocks

    def enter(self, x: Tensor, i: int) -> Tensor:
        if not i:
            return self.patch_embed(x)
        before: Any = self.layers[i - 1]
        y: Tensor = before.downsample(x, self.grids[i - 1])
        return y

    def cut(self, count: int) -> None:
        self.layers = self.layers[:count]
        last: Any = self.layers[-1]
        last.downsample = None


def _without_device(norm: Make) -> Callable[..., nn.Module]:
    """Parts of timm hand a device and a dtype to the norms they make."""

    def make(dim: int, **place: Any) -> nn.Module:
        return norm(dim).to(**{name: value for name, value in place.items() if value is not None})

    return make
