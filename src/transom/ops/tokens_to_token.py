"""The tokens-to-token module of T2T-ViT, shared by the papers that build on it.

Overlapping pieces of the image become tokens, and pieces of their map tokens again, twice (Yuan et
al., Tokens-to-Token ViT, ICCV 2021, sec. 3.1). Tokens (B, N, dim) of the pieces go through a light
layer into a narrow width d in between, whose residual path is that of the values:

    y = v + proj(attention(q, k, v))        y <- y + MLP(LN y)

with softmax attention, or with positive random features phi in O(N) (Performer).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.errors import SettingsError, TokensError

Kind = Literal["performer", "transformer"]

Split = tuple[int, int, int]

SPLITS: dict[int, tuple[Split, Split, Split]] = {
    16: ((7, 4, 2), (3, 2, 1), (3, 2, 1)),
    8: ((3, 2, 1), (3, 2, 1), (3, 2, 1)),
    4: ((3, 1, 1), (3, 2, 1), (3, 2, 1)),
}
"""Kernel, stride and padding of the three soft splits, in pixels and then in tokens, by the size of
the patches they stand for. The first is the paper's."""


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """One number for both sides, or both."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def sinusoids(count: int, width: int) -> Tensor:
    """Position table (1, N, D): sines at even channels, cosines at odd ones."""
    place = torch.arange(count, dtype=torch.float64)[:, None]
    rate = 10000.0 ** (-2 * (torch.arange(width) // 2) / width).double()
    angle = place * rate
    even = torch.arange(width) % 2 == 0
    return torch.where(even, angle.sin(), angle.cos()).float()[None]


class TokenPerformer(nn.Module):
    """Attention with positive random features in a narrow width, then an ffn.

    ``φ(u) = exp(W u - |u|²/2) / √m`` for queries and keys; the values are the residual.

    Attributes:
        w: (m, d), orthogonal rows times √m, never trained.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        norm_layer: Any = nn.LayerNorm,
        kernel_ratio: float = 0.5,
        drop: float = 0.1,
    ) -> None:
        """Build the module.

        Args:
            dim: channels of the tokens that come in.
            width: channels d inside and of those that leave.
            norm_layer: makes a norm of so many channels.
            kernel_ratio: number of random features in units of d.
            drop: dropout behind attention and ffn.
        """
        super().__init__()
        self.kqv = nn.Linear(dim, 3 * width)
        self.dp = nn.Dropout(drop)
        self.proj = nn.Linear(width, width)
        self.norm1 = norm_layer(dim)
        self.norm2 = norm_layer(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.Dropout(drop)
        )
        features = int(width * kernel_ratio)
        rows = nn.init.orthogonal_(torch.empty(features, width)) * math.sqrt(features)
        self.w = nn.Parameter(rows, requires_grad=False)

    def features(self, x: Tensor) -> Tensor:
        """(B, N, d) to (B, N, m), in single precision at least."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        length = x.square().sum(-1, keepdim=True) / 2
        return (x @ self.w.to(x.dtype).mT - length).exp() / math.sqrt(len(self.w))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, dim) to (B, N, d)."""
        k, q, v = self.kqv(self.norm1(x)).chunk(3, -1)
        q, k = self.features(q), self.features(k)
        total = q @ k.sum(1).unsqueeze(-1) + 1e-8
        y = q @ (k.mT @ v.to(k.dtype)) / total
        v = v + self.dp(self.proj(y.to(v.dtype)))
        return v + self.mlp(self.norm2(v))


class TokenTransformer(nn.Module):
    """Softmax attention with one head in a narrow width, then an ffn.

    The logits are scaled by the width that comes in, as in the official code.
    """

    def __init__(self, dim: int, width: int, norm_layer: Any = nn.LayerNorm) -> None:
        """Build the module.

        Args:
            dim: channels of the tokens that come in.
            width: channels d inside and of those that leave.
            norm_layer: makes a norm of so many channels.
        """
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(dim, 3 * width, bias=False), "proj": nn.Linear(width, width)}
        )
        self.norm2 = norm_layer(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, width), "fc2": nn.Linear(width, width)})
        self.scale = dim**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, dim) to (B, N, d)."""
        q, k, v = self.attn["qkv"](self.norm1(x)).chunk(3, -1)
        one = (q[:, None], k[:, None], v[:, None])  # a single head
        y = F.scaled_dot_product_attention(one[0], one[1], one[2], scale=self.scale)[:, 0]
        y = v + self.attn["proj"](y)
        return y + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(y))))


class TokensToToken(nn.Module):
    """Overlapping pieces of the image become tokens, and pieces of their map tokens again, twice.

    Attributes:
        img_size, patch_size, grid_size: (h, w) in pixels, pixels and tokens.
        num_patches: N.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        token_dim: int = 64,
        norm_layer: Any = nn.LayerNorm,
        kind: Kind = "performer",
        splits: Sequence[Sequence[int]] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **other: Any,
    ) -> None:
        """Build the module. Arguments are those of a patch embedding of timm, and four more.

        Args:
            token_dim: width of the two attentions.
            norm_layer: makes a norm of so many channels.
            kind: of the layers between the splits.
            splits: kernel, stride and padding of three splits; those of SPLITS when None.
            **other: what timm says beside; only its defaults are taken.

        Raises:
            SettingsError: no splits are known for such patches, or images of changing size are
                asked for.
        """
        super().__init__()
        if other.get("dynamic_img_pad") or "output_fmt" in other:
            raise SettingsError(
                "T2T-ViT has images of one size; build it with img_size or call its "
                "set_input_size instead of dynamic_img_size"
            )
        if splits is None and patch_size not in SPLITS:
            raise SettingsError(
                f"patch_size is {patch_size}; soft splits are known for {sorted(SPLITS)} pixels, "
                "others have to be given"
            )
        splits = SPLITS[patch_size] if splits is None else splits
        self.strides = tuple(s for _, s, _ in splits)
        side = math.prod(self.strides)
        self.patch_size = (side, side)
        self.set_input_size(pair(img_size))
        self.soft_splits = nn.ModuleList(nn.Unfold(k, stride=s, padding=p) for k, s, p in splits)
        areas = [k * k for k, _, _ in splits]
        layer: Any = {"performer": TokenPerformer, "transformer": TokenTransformer}[kind]
        self.attention1 = layer(in_chans * areas[0], token_dim, norm_layer)
        self.attention2 = layer(token_dim * areas[1], token_dim, norm_layer)
        self.project = nn.Linear(token_dim * areas[2], embed_dim)
        self.to(device=device, dtype=dtype)

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: int | None = None
    ) -> None:
        """Take images of another size from now on."""
        side = self.patch_size[0]
        if patch_size not in (None, side, (side, side)):
            raise SettingsError(f"patch_size is {patch_size}; the soft splits make {side} pixels")
        if img_size is None:
            return
        if img_size[0] % side or img_size[1] % side:
            raise SettingsError(f"img_size is {img_size}; expected multiples of {side} pixels")
        self.img_size = img_size
        self.grid_size = self.dynamic_feat_size(img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels of a token's side."""
        return self.patch_size[0] if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the map of an image."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to tokens (B, N, D)."""
        if tuple(x.shape[-2:]) != self.img_size:
            raise TokensError(
                f"got images of {tuple(x.shape[-2:])} pixels, but the model is built for "
                f"{self.img_size}; build it with that img_size or call set_input_size"
            )
        return self.tokens(x)

    def tokens(self, x: Tensor) -> Tensor:
        """The same for images of any size that the patches divide."""
        h, w = x.shape[-2:]
        first, second, third = self.soft_splits
        h, w = h // self.strides[0], w // self.strides[0]
        x = self.attention1(first(x).mT).mT.unflatten(-1, (h, w))
        h, w = h // self.strides[1], w // self.strides[1]
        x = self.attention2(second(x).mT).mT.unflatten(-1, (h, w))
        return self.project(third(x).mT)


class FixedPositions:
    """For a vision transformer behind :class:`TokensToToken`: positions that are never trained."""

    blocks: Any
    embed_dim: int
    num_prefix_tokens: int
    patch_embed: Any
    pos_embed: Any

    def fix_positions(self) -> None:
        """Make the position table for the present size of the images."""
        table = sinusoids(self.patch_embed.num_patches + self.num_prefix_tokens, self.embed_dim)
        like = next(self.blocks.parameters())
        self.pos_embed = nn.Parameter(table.to(like), requires_grad=False)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Take images of another size from now on; the position table is made anew."""
        self.patch_embed.set_input_size(None if img_size is None else pair(img_size), patch_size)
        self.fix_positions()
