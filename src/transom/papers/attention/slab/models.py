"""The published networks of SLAB, registered with timm under the names of the official configs."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from transom.papers.attention.slab.cswin import SlabCSWin
from transom.papers.attention.slab.deit import SlabDeiT, deit_norm
from transom.papers.attention.slab.pvt import SlabPVT
from transom.papers.attention.slab.swin import SlabSwin


def _cfg(first_conv: str) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": first_conv,
        "classifier": "head",
        "license": "unknown",
        "paper_ids": "arXiv:2405.11582",
        "origin_url": "https://github.com/xinghaochen/SLAB",
    }


_FIRST = {
    **dict.fromkeys(
        ("deit_t_prepbn", "deit_s_prepbn", "slab_deit_t", "slab_deit_s"), "patch_embed.proj"
    ),
    **dict.fromkeys(
        ("swin_t_prepbn", "slab_swin_t", "slab_swin_s", "slab_swin_b"), "patch_embed.proj"
    ),
    **dict.fromkeys(("pvt_t_prepbn", "pvt_s_prepbn", "pvt_m_prepbn"), "patch_embed1.proj"),
    **dict.fromkeys(("slab_pvt_t", "slab_pvt_s", "slab_pvt_m"), "patch_embed1.proj"),
    **dict.fromkeys(("slab_cswin_t", "slab_cswin_s"), "stage1_conv_embed.0"),
}
default_cfgs = generate_default_cfgs({name: _cfg(first) for name, first in _FIRST.items()})


def _build(cls: Any, name: str, pretrained: bool, settings: dict[str, Any], **own: Any) -> Any:
    flat = issubclass(cls, VisionTransformer)
    features = {"out_indices": 3, "feature_cls": "getter"}
    stages = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
    return build_model_with_cfg(
        cls, name, pretrained, feature_cfg=features if flat else stages, **{**own, **settings}
    )


def _deit(name: str, pretrained: bool, settings: dict[str, Any], dim: int, heads: int) -> Any:
    """DeiT with PRepBN alone: timm's own network with another norm."""
    norm = partial(deit_norm, total_step=settings.pop("total_step", 300_000))
    own = {"embed_dim": dim, "num_heads": heads, "depth": 12, "norm_layer": norm}
    return _build(VisionTransformer, name, pretrained, settings, **own)


@register_model
def deit_t_prepbn(pretrained: bool = False, **settings: Any) -> nn.Module:
    """DeiT-T with PRepBN."""
    return _deit("deit_t_prepbn", pretrained, settings, 192, 3)


@register_model
def deit_s_prepbn(pretrained: bool = False, **settings: Any) -> nn.Module:
    """DeiT-S with PRepBN."""
    return _deit("deit_s_prepbn", pretrained, settings, 384, 6)


@register_model
def slab_deit_t(pretrained: bool = False, **settings: Any) -> nn.Module:
    """DeiT-T with PRepBN and linear attention."""
    own = {"embed_dim": 192, "num_heads": 3, "depth": 12}
    return _build(SlabDeiT, "slab_deit_t", pretrained, settings, **own)


@register_model
def slab_deit_s(pretrained: bool = False, **settings: Any) -> nn.Module:
    """DeiT-S with PRepBN and linear attention."""
    own = {"embed_dim": 384, "num_heads": 6, "depth": 12}
    return _build(SlabDeiT, "slab_deit_s", pretrained, settings, **own)


@register_model
def swin_t_prepbn(pretrained: bool = False, **settings: Any) -> nn.Module:
    """Swin-T with PRepBN."""
    own = {"attn_type": "SSSS", "drop_path_rate": 0.1}
    return _build(SlabSwin, "swin_t_prepbn", pretrained, settings, **own)


@register_model
def slab_swin_t(pretrained: bool = False, **settings: Any) -> nn.Module:
    """Swin-T with PRepBN, the first two stages with linear attention."""
    return _build(SlabSwin, "slab_swin_t", pretrained, settings, drop_path_rate=0.2)


@register_model
def slab_swin_s(pretrained: bool = False, **settings: Any) -> nn.Module:
    """Swin-S with PRepBN, the first two stages with linear attention."""
    own = {"depths": (2, 2, 18, 2), "drop_path_rate": 0.3}
    return _build(SlabSwin, "slab_swin_s", pretrained, settings, **own)


@register_model
def slab_swin_b(pretrained: bool = False, **settings: Any) -> nn.Module:
    """Swin-B with PRepBN, the first two stages with linear attention; a config without weights."""
    own = {
        "embed_dim": 128,
        "depths": (2, 2, 18, 2),
        "num_heads": (4, 8, 16, 32),
        "drop_path_rate": 0.5,
    }
    return _build(SlabSwin, "slab_swin_b", pretrained, settings, **own)


@register_model
def pvt_t_prepbn(pretrained: bool = False, **settings: Any) -> nn.Module:
    """PVT-T with PRepBN."""
    return _build(SlabPVT, "pvt_t_prepbn", pretrained, settings, attn_type="SSSS")


@register_model
def pvt_s_prepbn(pretrained: bool = False, **settings: Any) -> nn.Module:
    """PVT-S with PRepBN."""
    own = {"attn_type": "SSSS", "depths": (3, 4, 6, 3)}
    return _build(SlabPVT, "pvt_s_prepbn", pretrained, settings, **own)


@register_model
def pvt_m_prepbn(pretrained: bool = False, **settings: Any) -> nn.Module:
    """PVT-M with PRepBN."""
    own = {"attn_type": "SSSS", "depths": (3, 4, 18, 3), "drop_path_rate": 0.3}
    return _build(SlabPVT, "pvt_m_prepbn", pretrained, settings, **own)


@register_model
def slab_pvt_t(pretrained: bool = False, **settings: Any) -> nn.Module:
    """PVT-T with PRepBN and linear attention."""
    return _build(SlabPVT, "slab_pvt_t", pretrained, settings)


@register_model
def slab_pvt_s(pretrained: bool = False, **settings: Any) -> nn.Module:
    """PVT-S with PRepBN and linear attention; a config without weights."""
    return _build(SlabPVT, "slab_pvt_s", pretrained, settings, depths=(3, 4, 6, 3))


@register_model
def slab_pvt_m(pretrained: bool = False, **settings: Any) -> nn.Module:
    """PVT-M with PRepBN and linear attention; a config without weights."""
    return _build(SlabPVT, "slab_pvt_m", pretrained, settings, depths=(3, 4, 18, 3))


@register_model
def slab_cswin_t(pretrained: bool = False, **settings: Any) -> nn.Module:
    """CSWin-T with PRepBN, the first two stages with linear attention."""
    return _build(SlabCSWin, "slab_cswin_t", pretrained, settings)


@register_model
def slab_cswin_s(pretrained: bool = False, **settings: Any) -> nn.Module:
    """CSWin-S with PRepBN, the first two stages with linear attention; a config without weights."""
    return _build(SlabCSWin, "slab_cswin_s", pretrained, settings, depths=(2, 4, 32, 2))
