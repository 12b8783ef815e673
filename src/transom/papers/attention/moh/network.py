"""MoH-ViT: TransNeXt whose heads are routed in every stage."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import timm
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.papers.attention.moh.routing import add_router, route


def weigh(attention: nn.Module, x: Tensor) -> Tensor:
    """Gates (B, N, H) of an attention with a router."""
    return route(attention, x).gate


def moh_vit(
    host: str, shared_head: Sequence[int], routed_head: Sequence[int], **settings: Any
) -> nn.Module:
    """A TransNeXt with routed heads.

    Args:
        host: name of its timm model.
        shared_head: S of each stage.
        routed_head: K of each stage; 0 where all heads are shared.
        **settings: of that model.

    Raises:
        SettingsError: numbers of heads do not fit each other, or there is not one a stage.
    """
    model: Any = timm.create_model(host, **settings)
    stages = len(model.feature_info)
    if not len(shared_head) == len(routed_head) == stages:
        raise SettingsError(
            f"shared_head is {shared_head!r} and routed_head {routed_head!r}; expected "
            f"{stages} values each, one a stage"
        )
    for i, (shared, chosen) in enumerate(zip(shared_head, routed_head, strict=True)):
        for block in getattr(model, f"block{i + 1}"):
            attention = block.attn
            add_router(attention, attention.proj.out_features, attention.num_heads, shared, chosen)
            attention.weigh = weigh
            for name in ("wg", "wg_0", "wg_1"):
                linear = getattr(attention, name)
                if linear is not None:
                    nn.init.trunc_normal_(linear.weight, std=0.02)
    return model


def _cfg() -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed1.proj",
        "classifier": "head",
        "paper_name": "MoH: Multi-Head Attention as Mixture-of-Head Attention",
        "paper_ids": "arXiv:2410.11842",
        "origin_url": "https://github.com/SkyworkAI/MoH",
    }


default_cfgs = generate_default_cfgs(
    {
        name: _cfg()
        for name in ("moh_vit_small_80", "moh_vit_small_75", "moh_vit_base_75", "moh_vit_base_50")
    }
)


def _create(
    variant: str,
    host: str,
    shared: Sequence[int],
    chosen: Sequence[int],
    pretrained: bool,
    **settings: Any,
) -> nn.Module:
    shared, chosen = settings.pop("shared_head", shared), settings.pop("routed_head", chosen)
    made: nn.Module = build_model_with_cfg(
        partial(moh_vit, host, shared, chosen),
        variant,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **settings,
    )
    return made


@register_model
def moh_vit_small_80(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MoH-ViT-S with 80 % of the heads."""
    counts = (3, 6, 3, 8), (0, 0, 6, 12)
    return _create("moh_vit_small_80", "transnext_small", *counts, pretrained, **kwargs)


@register_model
def moh_vit_small_75(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MoH-ViT-S with 75 % of the heads."""
    counts = (3, 6, 3, 4), (0, 0, 6, 12)
    return _create("moh_vit_small_75", "transnext_small", *counts, pretrained, **kwargs)


@register_model
def moh_vit_base_75(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MoH-ViT-B with 75 % of the heads."""
    counts = (4, 8, 4, 5), (0, 0, 8, 16)
    return _create("moh_vit_base_75", "transnext_base", *counts, pretrained, **kwargs)


@register_model
def moh_vit_base_50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MoH-ViT-B with 50 % of the heads."""
    counts = (2, 2, 2, 4), (2, 4, 6, 8)
    return _create("moh_vit_base_50", "transnext_base", *counts, pretrained, **kwargs)
