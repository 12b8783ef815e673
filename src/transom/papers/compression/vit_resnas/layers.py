"""The layers of a multi-stage network, each with the masks that make it elastic."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.papers.compression.vit_resnas.definition import BlockDef
from transom.papers.compression.vit_resnas.masks import MaskedLayerNorm, leading

Grid = tuple[int, int]


class Kept(NamedTuple):
    """Leading channels that stay at the masking points of one layer, (B,) each; None for all.

    Attributes:
        dim: width behind a patch embedding or a reduction.
        heads: channels of the merged heads, before the output projection.
        hidden: units of the ffn, behind the activation.
        stays: (B,) bool, whether the block is there at all.
    """

    dim: Tensor | None = None
    heads: Tensor | None = None
    hidden: Tensor | None = None
    stays: Tensor | None = None


def masked(x: Tensor, kept: Tensor | None) -> Tensor:
    """Tokens x (B, N, C) with all but the first kept (B,) channels zeroed."""
    return x if kept is None else x * leading(kept, x.shape[-1])


class ConvNorm(nn.Module):
    """3 x 3 convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class PatchEmbed(nn.Module):
    """Patches by one linear map."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class ConvEmbed(nn.Module):
    """Patches by three convolutions at half resolution and one of stride patch / 2."""

    def __init__(self, channels: int, dim: int, patch: int, mid: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, mid, 2)
        self.conv2 = ConvNorm(mid, mid)
        self.conv3 = ConvNorm(mid, mid)
        self.conv_proj = nn.Conv2d(mid, dim, patch // 2, patch // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.conv_proj(x + self.conv3(self.conv2(x)))


class Attention(nn.Module):
    """Multi-head attention whose heads need not add up to the width."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(masked(y, kept))


class Mlp(nn.Module):
    """Two linear maps and a GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        return self.fc2(masked(F.gelu(self.fc1(x)), kept))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, given: BlockDef, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = MaskedLayerNorm(given.dim)
        self.attn = Attention(given.dim, given.heads, given.head_dim)
        self.norm2 = MaskedLayerNorm(given.dim)
        self.mlp = Mlp(given.dim, given.hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, mask: Tensor | None = None, kept: Kept | None = None) -> Tensor:
        """Tokens x (B, N, D) -> the same.

        Args:
            x: tokens, zero outside the mask.
            mask: (B, 1, D) bool, channels of the stage that stay; None for all.
            kept: what else stays; None for all.
        """
        kept = kept or Kept()
        gate = mask
        if kept.stays is not None:
            stays = kept.stays[:, None, None]
            gate = stays if mask is None else stays & mask
        y = self.drop_path(self.attn(self.norm1(x, mask), kept.heads))
        x = x + (y if gate is None else y * gate)
        y = self.drop_path(self.mlp(self.norm2(x, mask), kept.hidden))
        return x + (y if gate is None else y * gate)


class Absent(nn.Module):
    """The place of a block (or a norm) that is left out; it keeps the numbers of the others."""

    def forward(self, x: Tensor, mask: Tensor | None = None, kept: Kept | None = None) -> Tensor:
        return x


class SpatialReduction(nn.Module):
    """Residual spatial reduction: tokens ÷ p², channels up to D_out (sec. 3.2).

        n = LN(x);  patches: conv (n) of stride p + position;  class tokens: W n
        y = [class, patches] + zero-padded [x_class, p x p mean of x_patches]

    With p even, a grid that p does not divide is rounded up (the paper's are divisible by its
    p = 2): the last means are over fewer patches.

    Args:
        grid: (h, w) of the patches that arrive.
        dim, out: D_in and D_out >= D_in.
        prefix: class tokens in front.
        patch: p; the kernel has one more.

    Raises:
        SettingsError: out is below dim, or an odd patch does not divide the grid.
    """

    def __init__(self, grid: Grid, dim: int, out: int, prefix: int = 1, patch: int = 2) -> None:
        super().__init__()
        if out < dim or (patch % 2 and (grid[0] % patch or grid[1] % patch)):
            raise SettingsError(
                f"reduction of {grid} by {patch} from {dim} to {out} channels; expected no fewer "
                "channels than before, and a grid that an odd patch divides"
            )
        self.prefix, self.patch = prefix, patch
        self.extra = out - dim
        self.grid = reduced(grid, patch)
        self.norm = MaskedLayerNorm(dim)
        self.patch_reduce = nn.Conv2d(dim, out, patch + 1, patch, patch // 2)
        self.token_transform = nn.Linear(dim, out)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], out))

    def forward(self, x: Tensor, grid: Grid, mask: Tensor | None = None) -> Tensor:
        """Tokens x (B, P + h w, D_in) -> (B, P + h w / p², D_out).

        Args:
            x: tokens, zero outside the mask.
            grid: (h, w) of the patches.
            mask: (B, 1, D_in) bool, channels that stay; None for all.
        """
        prefix, patches = x[:, : self.prefix], as_map(x[:, self.prefix :], grid)
        n = self.norm(x, mask)
        y = self.patch_reduce(as_map(n[:, self.prefix :], grid)).flatten(2).mT
        y = y + resized(self.pos_embed, self.grid, reduced(grid, self.patch))
        y = torch.cat([self.token_transform(n[:, : self.prefix]), y], 1)
        mean = F.avg_pool2d(patches, self.patch, ceil_mode=True, count_include_pad=False)
        mean = mean.flatten(2).mT
        return y + F.pad(torch.cat([prefix, mean], 1), (0, self.extra))


def reduced(grid: Grid, patch: int = 2) -> Grid:
    """The grid behind a reduction."""
    return -(-grid[0] // patch), -(-grid[1] // patch)


def as_map(x: Tensor, grid: Grid) -> Tensor:
    """Patches (B, h w, D) as (B, D, h, w)."""
    return x.mT.unflatten(2, grid)


def resized(table: Tensor, old: Grid, new: Grid, prefix: int = 0) -> Tensor:
    """A position table for another grid: bicubic, the entries of the prefix as they are.

    Args:
        table: (1, prefix + h w, D).
        old, new: grids (h, w).
        prefix: entries in front that belong to no patch.
    """
    if tuple(old) == tuple(new):
        return table
    front, patches = table[:, :prefix], as_map(table[:, prefix:], old)
    patches = F.interpolate(patches.float(), new, mode="bicubic", align_corners=False)
    return torch.cat([front, patches.to(table.dtype).flatten(2).mT], 1)
