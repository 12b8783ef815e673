"""iLLaMA: a vision transformer made of the parts of a LLaMA, in five steps.

    tokens     [patches, class]: the class token comes last, so that it sees every patch
    mask       A = softmax(q kᵀ / sqrt(d));  y = (A ⊙ M) v,  M = ρ 1 + (1 - ρ) L
               L lower-triangular ones; ρ falls from 1 (bidirectional) to 0 (causal) in training
    norm       RMSNorm instead of LayerNorm
    ffn        SwiGLU, W₂(silu(W₁ x) ⊙ W₃ x), instead of a GELU MLP
    position   rotary angles n · 10000^(-2i/d) beside the learned positions, n along the sequence

x: (B, h w + 1, D). `attention.py` the operator, `model.py` the backbones, `method.py` the steps for
other hosts, `training.py` schedules and the start from a LLaMA's weights.

Source: Wang et al., Adapting LLaMA Decoder to Vision Transformer, 2024; official code
techmonsterwang/iLLaMA@dfc93b9 (no licence file; nothing here is taken from it).

The mask multiplies probabilities behind the softmax: rows do not sum to one, and their denominator
holds later patches, so the released model is not causal in the strict sense and no causal kernel
or key/value cache computes it. `form="before"` is strictly causal and runs on the fused causal
kernel; weights trained in one form are not meant for the other.

Checked against golden cases of the official code: attention and whole model with gradients, at
rates 0 and between, schedules, weight selection. Not checked here: accuracies (no checkpoint was
run), and the start from a 7B teacher beyond its selection rule.
"""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor

from transom.papers.attention.illama.attention import soft_causal
from transom.papers.attention.illama.method import DecoderSteps
from transom.papers.attention.illama.model import ILLaMA, resized
from transom.papers.attention.illama.training import (
    drop_schedule,
    from_llama,
    selected,
    soft_mask_schedule,
)
from transom.registry import Backbone, Offer

__all__ = [
    "BACKBONES",
    "OFFERS",
    "DecoderSteps",
    "ILLaMA",
    "convert",
    "drop_schedule",
    "from_llama",
    "selected",
    "soft_causal",
    "soft_mask_schedule",
]

BACKBONES = (
    Backbone("illama_tiny", 5.7, 1.3),
    Backbone("illama_small", 21.9, 4.6),
    Backbone("illama_base", 86.3, 17.6),
    Backbone("illama_base_384", 86.3, 55.5, 384),
    Backbone("illama_large", 310.2, 62.8),
    Backbone("illama_large_384", 310.2, 194.7, 384),
)

OFFERS = (
    Offer("operator", "soft-causal", soft_causal),
    Offer("objective", "soft-mask-schedule", soft_mask_schedule),
    Offer("objective", "drop-schedule", drop_schedule),
    Offer("objective", "from-llama", from_llama),
)

WIDTHS: dict[str, dict[str, int]] = {
    "illama_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "illama_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "illama_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "illama_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict: the names are the same, training keeps it under `model`."""
    for key in ("model_ema", "model"):
        inner: Any = state.get(key)
        if isinstance(inner, dict):
            return dict(inner)
    return dict(state)


def _adapted(state: dict[str, Tensor], model: ILLaMA) -> dict[str, Tensor]:
    """A state dict for `model`, positions interpolated where its size differs."""
    state = convert(state)
    if "pos_embed" in state:
        side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
        state["pos_embed"] = resized(state["pos_embed"], (side, side), model.grid)
    return state


def _cfg(size: int) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": 0.875 if size == 224 else 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs({f"{b.name}.untrained": _cfg(b.size) for b in BACKBONES})


def _create(name: str, pretrained: bool, **settings: Any) -> ILLaMA:
    size = 384 if name.endswith("_384") else 224
    model: ILLaMA = build_model_with_cfg(
        ILLaMA,
        name,
        pretrained,
        pretrained_filter_fn=_adapted,
        feature_cfg={"out_indices": settings.pop("out_indices", 3), "feature_cls": "getter"},
        **{"img_size": size, **WIDTHS[name.removesuffix("_384")], **settings},
    )
    return model


@register_model
def illama_tiny(pretrained: bool = False, **settings: Any) -> ILLaMA:
    """iLLaMA-T/16."""
    return _create("illama_tiny", pretrained, **settings)


@register_model
def illama_small(pretrained: bool = False, **settings: Any) -> ILLaMA:
    """iLLaMA-S/16."""
    return _create("illama_small", pretrained, **settings)


@register_model
def illama_base(pretrained: bool = False, **settings: Any) -> ILLaMA:
    """iLLaMA-B/16."""
    return _create("illama_base", pretrained, **settings)


@register_model
def illama_base_384(pretrained: bool = False, **settings: Any) -> ILLaMA:
    """iLLaMA-B/16 for images of 384 pixels."""
    return _create("illama_base_384", pretrained, **settings)


@register_model
def illama_large(pretrained: bool = False, **settings: Any) -> ILLaMA:
    """iLLaMA-L/16."""
    return _create("illama_large", pretrained, **settings)


@register_model
def illama_large_384(pretrained: bool = False, **settings: Any) -> ILLaMA:
    """iLLaMA-L/16 for images of 384 pixels."""
    return _create("illama_large_384", pretrained, **settings)
