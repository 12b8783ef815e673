"""iLLaMA as a timm model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath, PatchEmbed, trunc_normal_
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.networks import Isotropic, image_grid, narrow, patch_grid, rising
from transom.papers.attention.illama.attention import Form, rotary, rotate, soft_causal

Grid = tuple[int, int]
Table = tuple[Tensor, Tensor]


class RmsNorm(nn.Module):
    """x / sqrt(mean x² + eps), in float32 or better, times a weight in the dtype of x."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        scale = (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (wide * scale).to(x.dtype) * self.weight


class SwiGLU(nn.Module):
    """W₂(silu(W₁ x) ⊙ W₃ x) without biases."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)
        self.fc3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


def hidden_width(dim: int, ratio: float = 4.0, multiple: int = 256) -> int:
    """Two thirds of ratio · dim, up to the next multiple."""
    return -(-int(2 * int(dim * ratio) / 3) // multiple) * multiple


class Attention(nn.Module):
    """Rotary attention under a soft causal mask."""

    def __init__(
        self,
        dim: int,
        heads: int,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        form: Form = "after",
    ) -> None:
        super().__init__()
        self.heads, self.dropout, self.form = heads, dropout, form
        self.qkv = nn.Linear(dim, 3 * dim, qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, table: Table, rate: float) -> Tensor:
        """Tokens x (B, N, D) -> the same; `table` of :func:`rotary`, `rate` of the soft mask."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, table), rotate(k, table)
        dropout = self.dropout if self.training else 0.0
        y = soft_causal(q, k, v, rate, form=self.form, dropout=dropout)
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm block of a decoder."""

    def __init__(
        self, dim: int, attention: Attention, hidden: int, eps: float, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = RmsNorm(dim, eps)
        self.attn = attention
        self.norm2 = RmsNorm(dim, eps)
        self.mlp = SwiGLU(dim, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, table: Table, rate: float) -> Tensor:
        """Tokens x (B, N, D) -> the same; see :class:`Attention`."""
        x = x + self.drop_path(self.attn(self.norm1(x), table, rate))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def resized(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Positions (1, h w + 1, D) for another grid: bicubic; the class entry stays last."""
    if tuple(old) == tuple(new):
        return table
    patches = table[:, :-1].mT.unflatten(2, old)
    patches = F.interpolate(patches.float(), new, mode="bicubic", align_corners=False)
    return torch.cat([patches.to(table.dtype).flatten(2).mT, table[:, -1:]], 1)


class ILLaMA(Isotropic):
    """A vision transformer made of the parts of a LLaMA, its class token at the end.

    Args:
        img_size: height and width the position table is made for, pixels.
        patch_size: pixels.
        in_chans: channels of the image.
        num_classes: outputs; 0 for features.
        global_pool: "token" for the class token, "avg" for the mean of the patches, "" for all.
        embed_dim: D.
        depth: blocks.
        num_heads: of each attention.
        mlp_ratio, multiple_of: see :func:`hidden_width`.
        qkv_bias: whether queries, keys and values have one.
        rms_eps: of the norms.
        rope_base: of the rotary angles.
        soft_mask_rate: 1 bidirectional, 0 causal; also an attribute, not part of the state dict.
        form: "after" masks behind the softmax, as released; "before" is strictly causal.
        drop_rate: dropout before the head.
        pos_drop_rate: dropout behind the position embedding.
        attn_drop_rate: on attention weights.
        drop_path_rate: of the last block; linear from 0 at the first.

    Raises:
        SettingsError: a size does not fit another.
    """

    pools: ClassVar[tuple[str, ...]] = ("token", "avg", "")

    def __init__(
        self,
        img_size: int | Grid = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        multiple_of: int = 256,
        qkv_bias: bool = True,
        rms_eps: float = 1e-6,
        rope_base: float = 10000.0,
        soft_mask_rate: float = 0.0,
        form: Form = "after",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        if embed_dim % num_heads or embed_dim // num_heads % 2:
            raise SettingsError(
                f"embed_dim is {embed_dim} and num_heads {num_heads}; expected heads of one even "
                "width, as rotary positions turn pairs of channels"
            )
        if form not in ("after", "before"):
            raise SettingsError(f"form is {form!r}; expected 'after' or 'before' the softmax")
        info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"}
            for i in range(depth)
        ]
        super().__init__(num_classes, global_pool, info)
        self.patch_size = patch_size
        self.head_width, self.rope_base = embed_dim // num_heads, rope_base
        self.soft_mask_rate = soft_mask_rate
        self.grid = patch_grid(img_size, self.patch_size)

        self.patch_embed = PatchEmbed(None, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        count = self.grid[0] * self.grid[1] + 1
        self.pos_embed = nn.Parameter(torch.zeros(1, count, embed_dim))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        hidden = hidden_width(embed_dim, mlp_ratio, multiple_of)
        rates = rising(drop_path_rate, depth)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                Attention(embed_dim, num_heads, qkv_bias, attn_drop_rate, form),
                hidden,
                rms_eps,
                rate,
            )
            for rate in rates
        )
        self.norm: nn.Module = RmsNorm(embed_dim, rms_eps)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal of 0.02 for linear layers, class token and positions; biases zero."""
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        self.apply(narrow)

    def set_input_size(self, img_size: int | Grid) -> None:
        """Interpolate the position table to another image size, for good.

        Args:
            img_size: height and width, pixels.

        Raises:
            SettingsError: it is no multiple of the patch.
        """
        grid = patch_grid(img_size, self.patch_size)
        self.pos_embed = nn.Parameter(resized(self.pos_embed.data, self.grid, grid))
        self.grid = grid

    def set_dropout(self, rate: float) -> None:
        """Another rate for all dropout that is no drop path, for a schedule."""
        self.pos_drop.p = self.head_drop.p = rate
        for module in self.modules():
            if isinstance(module, Attention):
                module.dropout = rate

    def set_drop_path(self, rate: float) -> None:
        """Another rate for the drop path of the last block, linear from 0, for a schedule."""
        paths = [module for module in self.modules() if isinstance(module, DropPath)]
        for i, path in enumerate(paths):
            path.drop_prob = rate * i / max(len(paths) - 1, 1)

    def trunk(self, x: Tensor, count: int, take: Collection[int] = ()) -> tuple[Any, list[Any]]:
        grid = image_grid(x, self.patch_size)
        x = self.patch_embed(x)
        x = torch.cat([x, self.cls_token.expand(x.shape[0], -1, -1)], 1)
        x = self.pos_drop(x + resized(self.pos_embed, self.grid, grid))
        table = rotary(x.shape[1], self.head_width, self.rope_base, x)
        found = []
        for i, block in enumerate(self.blocks[:count]):
            x = self.run(block, x, table, self.soft_mask_rate)
            if i in take:
                found.append((x, grid))
        return (x, grid), found

    def shown(self, x: Any, format: str) -> Tensor:
        return super().shown((x[0][:, :-1], x[1]), format)

    def prefix(self, x: Any) -> Tensor:
        """The class token, which stands last."""
        tokens: Tensor = x[0]
        return tokens[:, -1:]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Normed tokens -> logits; `pre_logits` stops before the head."""
        if self.global_pool == "token":
            x = x[:, -1]
        elif self.global_pool == "avg":
            x = x[:, :-1].mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)
