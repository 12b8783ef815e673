"""T2T-ViT with Unified Normalization in place of every LayerNorm."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from transom.errors import SettingsError, TokensError
from transom.papers.compression.unified_norm.norm import UnifiedNormLayer

SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
"""Kernel, stride and padding of the three soft splits, in pixels and then in tokens."""


def un(
    channels: int,
    window_size: int = 4,
    warmup_iters: int = 4000,
    outlier_filtration: bool = True,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> UnifiedNormLayer:
    """The norm as timm's VisionTransformer asks for one."""
    layer = UnifiedNormLayer(channels, window_size, warmup_iters, outlier_filtration)
    return layer.to(device=device, dtype=dtype)


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
        norm_layer: Any = un,
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
        norm_layer: Any = un,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **other: Any,
    ) -> None:
        """Build the module. Arguments are those of a patch embedding of timm, and two more.

        Args:
            token_dim: width of the two attentions.
            norm_layer: makes a norm of so many channels.
            **other: what timm says beside; only its defaults are taken.

        Raises:
            SettingsError: patches are not 16 pixels, or images of changing size are asked for.
        """
        super().__init__()
        if patch_size != 16 or other.get("dynamic_img_pad") or "output_fmt" in other:
            raise SettingsError(
                "T2T-ViT has patches of 16 pixels and images of one size; build it with img_size "
                "or call its set_input_size instead of patch_size and dynamic_img_size"
            )
        self.patch_size = (patch_size, patch_size)
        self.set_input_size(to_2tuple(img_size))
        self.soft_splits = nn.ModuleList(nn.Unfold(k, stride=s, padding=p) for k, s, p in SPLITS)
        self.attention1 = TokenPerformer(in_chans * 49, token_dim, norm_layer)
        self.attention2 = TokenPerformer(token_dim * 9, token_dim, norm_layer)
        self.project = nn.Linear(token_dim * 9, embed_dim)
        self.to(device=device, dtype=dtype)

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: int | None = None
    ) -> None:
        """Take images of another size from now on."""
        if patch_size not in (None, 16, (16, 16)):
            raise SettingsError(f"patch_size is {patch_size}; patches of T2T-ViT are 16 pixels")
        if img_size is None:
            return
        if img_size[0] % 16 or img_size[1] % 16:
            raise SettingsError(f"img_size is {img_size}; expected multiples of 16 pixels")
        self.img_size = img_size
        self.grid_size = (img_size[0] // 16, img_size[1] // 16)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels of a token's side."""
        return 16 if as_scalar else (16, 16)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the map of an image."""
        return img_size[0] // 16, img_size[1] // 16

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) to tokens (B, N, D)."""
        if tuple(x.shape[-2:]) != self.img_size:
            raise TokensError(
                f"got images of {tuple(x.shape[-2:])} pixels, but the model is built for "
                f"{self.img_size}; build it with that img_size or call set_input_size"
            )
        h, w = self.img_size
        first, second, third = self.soft_splits
        x = self.attention1(first(x).mT).mT.unflatten(-1, (h // 4, w // 4))
        x = self.attention2(second(x).mT).mT.unflatten(-1, (h // 8, w // 8))
        return self.project(third(x).mT)


class T2TViT(VisionTransformer):
    """A vision transformer behind a tokens-to-token module, with a fixed position table."""

    def __init__(
        self,
        norm_layer: Any = None,
        token_dim: int = 64,
        window_size: int = 4,
        warmup_iters: int = 4000,
        outlier_filtration: bool = True,
        **settings: Any,
    ) -> None:
        """Build the network.

        Args:
            norm_layer: makes a norm of so many channels; Unified Normalization for None.
            token_dim: width of the attentions of the tokens-to-token module.
            window_size: of the norm: batches.
            warmup_iters: of the norm: steps without smoothing.
            outlier_filtration: of the norm: whether windows are tested for outliers.
            **settings: as for timm's VisionTransformer.
        """
        norm = norm_layer or partial(
            un,
            window_size=window_size,
            warmup_iters=warmup_iters,
            outlier_filtration=outlier_filtration,
        )
        embed: Any = partial(TokensToToken, token_dim=token_dim, norm_layer=norm)
        super().__init__(
            norm_layer=norm, embed_layer=embed, **{"qkv_bias": False, "mlp_ratio": 3.0, **settings}
        )
        self._fix_positions()

    def _fix_positions(self) -> None:
        table = sinusoids(self.patch_embed.num_patches + self.num_prefix_tokens, self.embed_dim)
        like = self.head_weight()
        self.pos_embed = nn.Parameter(table.to(like), requires_grad=False)

    def head_weight(self) -> Tensor:
        """A parameter that tells device and dtype."""
        return next(self.blocks.parameters())

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Take images of another size from now on; the position table is made anew."""
        embed: Any = self.patch_embed
        embed.set_input_size(None if img_size is None else to_2tuple(img_size), patch_size)
        self._fix_positions()


default_cfgs = generate_default_cfgs(
    {
        "T2t_vit_14_all_un1d": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": None,
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "patch_embed.attention1.kqv",
            "classifier": "head",
            "license": "apache-2.0",
            "paper_ids": "arXiv:2208.01313",
            "origin_url": "https://github.com/hikvision-research/Unified-Normalization",
        }
    }
)


@register_model
def T2t_vit_14_all_un1d(pretrained: bool = False, **settings: Any) -> nn.Module:
    """T2T-ViT-14 with Unified Normalization throughout."""
    own = {"embed_dim": 384, "depth": 14, "num_heads": 6}
    model: nn.Module = build_model_with_cfg(
        T2TViT,
        "T2t_vit_14_all_un1d",
        pretrained,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**own, **settings},
    )
    return model
