"""T2T-ViT with Unified Normalization in place of every LayerNorm."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from transom.ops.tokens_to_token import FixedPositions, TokensToToken
from transom.papers.compression.unified_norm.norm import UnifiedNormLayer


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


class T2TViT(FixedPositions, VisionTransformer):
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
        self.fix_positions()


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
