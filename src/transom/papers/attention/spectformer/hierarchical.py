"""The hierarchical SpectFormer: two spectral stages, two attention stages, class attention."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, to_2tuple
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.networks import Staged, classifier, fan_out, narrow, one_a_stage, rising
from transom.papers.attention.spectformer.gate import Grid, SpectralGate
from transom.papers.attention.spectformer.isotropic import norm_layer


class Attention(nn.Module):
    """Softmax attention with separate maps to queries and to keys and values."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise SettingsError(f"{num_heads} heads do not divide a width of {dim}")
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """Attend from `queries` (B, M, D), by default x itself, to x (B, N, D)."""
        q, k, v = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for t in (self.q(x if queries is None else queries), *self.kv(x).chunk(2, -1))
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class DepthwiseConv(nn.Module):
    """3x3 convolution of each channel of a map (B, h, w, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvFfn(nn.Module):
    """fc1, depthwise convolution, GELU, fc2; without the convolution where there is no grid."""

    def __init__(self, dim: int, hidden: int, *, conv: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden) if conv else nn.Identity()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.dwconv(self.fc1(x))))


class Block(nn.Module):
    """x + mixer(norm1(x)), x + ffn(norm2(x)) on a map (B, h, w, D)."""

    def __init__(
        self, dim: int, mixer: SpectralGate | Attention, mlp_ratio: float, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = mixer
        self.norm2 = norm_layer(dim)
        self.mlp = ConvFfn(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        if isinstance(self.attn, SpectralGate):
            y = self.attn(h)
        else:
            y = self.attn(h.flatten(1, 2)).unflatten(1, h.shape[1:3])
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ClassBlock(nn.Module):
    """Attention from the first token only, to all tokens (B, 1 + N, D); the others stay."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = norm_layer(dim)
        self.mlp = ConvFfn(dim, int(dim * mlp_ratio), conv=False)

    def forward(self, x: Tensor) -> Tensor:
        h, first = self.norm1(x), x[:, :1]
        first = first + self.attn(h, h[:, :1])
        first = first + self.mlp(self.norm2(first))
        return torch.cat([first, x[:, 1:]], 1)


class Stem(nn.Module):
    """Images (B, 3, H, W) to a map (B, H/4, W/4, D)."""

    def __init__(self, in_chans: int, hidden: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, side, stride in ((in_chans, 7, 2), (hidden, 3, 1), (hidden, 3, 1)):
            layers += [
                nn.Conv2d(width, hidden, side, stride, side // 2, bias=False),
                nn.BatchNorm2d(hidden),
                nn.ReLU(inplace=True),
            ]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(hidden, dim, 3, 2, 1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(self.conv(x)).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """A map (B, h, w, C) to one of half the height and width (B, h/2, w/2, D)."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out, 3, 2, 1)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class HierarchicalSpectFormer(Staged):
    """Four stages at strides 4, 8, 16 and 32, and a block of class attention.

    Attributes:
        num_features: width of the last stage.
        feature_info: of every stage, for `features_only`.
    """

    pools: ClassVar[tuple[str, ...]] = ("token", "")

    aux_head: nn.Module | None

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["token", ""] = "token",
        stem_hidden_dim: int = 32,
        embed_dims: tuple[int, ...] = (64, 128, 320, 448),
        num_heads: tuple[int, ...] = (2, 4, 10, 14),
        mlp_ratios: tuple[float, ...] = (8, 8, 4, 4),
        depths: tuple[int, ...] = (3, 4, 6, 3),
        spectral_stages: int = 2,
        token_label: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        """Build the model with random weights.

        Args:
            img_size: height and width, in pixels, that the filters are made for.
            in_chans: channels of an image.
            num_classes: outputs; 0 gives the features of the first token.
            global_pool: "token", the one that attends to the others, or "" for all.
            stem_hidden_dim: channels inside the stem.
            embed_dims: width of each stage.
            num_heads: of each stage; unused by spectral ones.
            mlp_ratios: hidden width of the ffn divided by the width, for each stage.
            depths: blocks of each stage.
            spectral_stages: how many stages, from the first on, are spectral.
            token_label: whether a second head reads the other tokens.
            drop_rate: dropout before the head.
            drop_path_rate: of the last block; grows linearly from 0.

        Raises:
            SettingsError: a sequence does not have one entry a stage.
        """
        one_a_stage(
            4, embed_dims=embed_dims, num_heads=num_heads, mlp_ratios=mlp_ratios, depths=depths
        )
        info = [
            {"num_chs": dim, "reduction": 4 * 2**k, "module": f"norm{k + 1}"}
            for k, dim in enumerate(embed_dims)
        ]
        super().__init__(num_classes, global_pool, info)
        self.token_label = token_label
        self.patch_embed1 = Stem(in_chans, stem_hidden_dim, embed_dims[0])
        rates = iter(rising(drop_path_rate, sum(depths)))
        for k, (dim, grid) in enumerate(zip(embed_dims, _grids(img_size), strict=True)):
            if k:
                setattr(self, f"patch_embed{k + 1}", Downsample(embed_dims[k - 1], dim))
            blocks = nn.ModuleList(
                Block(
                    dim,
                    SpectralGate(dim, grid)
                    if k < spectral_stages
                    else Attention(dim, num_heads[k]),
                    mlp_ratios[k],
                    next(rates),
                )
                for _ in range(depths[k])
            )
            setattr(self, f"block{k + 1}", blocks)
            setattr(self, f"norm{k + 1}", norm_layer(dim))
        self.post_network = nn.ModuleList(
            [ClassBlock(embed_dims[-1], num_heads[-1], mlp_ratios[-1])]
        )
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)
        self.apply(narrow)
        self.apply(fan_out)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into stages (coarse) or blocks."""
        last = (r"^norm4|^post_network", (99999,))
        if coarse:
            stages = (r"^(?:patch_embed|block|norm)([1-4])", None)
            return {"stem": r"^patch_embed1", "blocks": [last, stages]}
        within = [
            (r"^patch_embed([2-4])", (-1,)),
            (r"^block(\d)\.(\d+)", None),
            (r"^norm([1-3])", (99999,)),
        ]
        return {"stem": r"^patch_embed1", "blocks": [*within, last]}

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make the filters those of another image size, in pixels."""
        for k, grid in enumerate(_grids(img_size)[: len(self.feature_info)]):
            for block in getattr(self, f"block{k + 1}"):
                if isinstance(block.attn, SpectralGate):
                    block.attn.resize(grid)

    def heads(self) -> dict[str, nn.Module | None]:
        aux = classifier(self.num_features, self.num_classes) if self.token_label else None
        return {**super().heads(), "aux_head": aux}

    def trunk(
        self, x: Tensor, count: int, take: Collection[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        found = []
        own: Any = self
        for k in range(1, count + 1):
            x = getattr(own, f"patch_embed{k}")(x)
            for block in getattr(own, f"block{k}"):
                x = self.run(block, x)
            if k < 4:  # the norm of the last stage stands behind class attention
                x = getattr(own, f"norm{k}")(x)
            if k - 1 in take:
                found.append(x)
        return x, found

    def final(self, x: Any) -> Any:
        """Tokens (B, 1 + N, D) behind class attention, from the map of the last stage."""
        x = x.flatten(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], 1)
        for block in self.post_network:
            x = block(x)
        return self.norm4(x)

    def normed(self, x: Any, unit: int) -> Any:
        return self.norm4(x) if unit == 3 else x

    def cut(self, count: int) -> None:
        for k in range(count, len(self.feature_info)):
            for part in ("patch_embed", "block", "norm"):
                delattr(self, f"{part}{k + 1}")

    def drop_norm(self) -> None:
        if len(self.feature_info) == 4:
            self.norm4 = nn.Identity()

    def drop_head(self) -> None:
        """Class attention is a part of the head."""
        self.post_network = nn.ModuleList()
        self.token_label = False
        super().drop_head()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K) from tokens, or the features of the first token (B, D)."""
        if self.global_pool == "":
            return self.head_drop(x) if pre_logits else self.head(self.head_drop(x))
        first = self.head_drop(x[:, 0])
        if pre_logits or self.num_classes == 0:
            return first
        logits = self.head(first)
        if self.aux_head is None:
            return logits
        return logits + 0.5 * self.aux_head(x[:, 1:]).amax(1)


def _grids(img_size: int | tuple[int, int]) -> list[Grid]:
    """(h, w) of each stage."""
    h, w = to_2tuple(img_size)
    return [(math.ceil(h / s), math.ceil(w / s)) for s in (4, 8, 16, 32)]
