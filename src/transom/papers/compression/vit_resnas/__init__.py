"""ViT-ResNAS: vision transformers in three stages, found in a super-network that shares weights.

Three things, one file each:

    layers.py      residual spatial reduction turns a plain ViT into stages: between two of them
                   (h w) patches become (h w)/4 and D channels become D_out >= D, with a skip path
                   (2 x 2 mean, zero-padded channels) that keeps deep networks trainable
    supernet.py    one set of weights for all sub-networks, whose widths, heads, hidden units and
                   blocks are the leading ones; one forward-backward pass trains
                   batch / example_per_arch sub-networks, by a mask per image
    search.py      evolution under a budget of multiply-adds, scored with inherited weights

x: (B, P + h w, D) -> (B, P + (h/2)(w/2), D_out) in a reduction; P class tokens.

Source: Liao, Karaman, Sze, Searching for Efficient Multi-Stage Vision Transformers, 2021; official
code yilunliao/vit-search@303e7c3 (CC BY-NC 4.0; this room is our own, and so are its words). The
searched definitions below are those of its training scripts.

Checked against golden cases of the official code: reduction, whole network, masked norm with its
gradients, sorting and slicing, masked super-network, multiply-adds. Not checked here: accuracies
(no checkpoint was run), token mixup, and the schedule of a whole super-network training.

Where this differs from the official code: a network without `patch_output` ignores the patch head
of an official checkpoint; odd grids are rounded up; other image sizes interpolate the position
tables; which sub-networks are trained is drawn once for a call and handed on, instead of kept in
every layer.
"""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor

from transom.papers.compression.vit_resnas.definition import (
    BlockDef,
    Definition,
    EmbedDef,
    ReduceDef,
)
from transom.papers.compression.vit_resnas.layers import SpatialReduction, resized
from transom.papers.compression.vit_resnas.masks import MaskedLayerNorm
from transom.papers.compression.vit_resnas.model import ViTResNAS
from transom.papers.compression.vit_resnas.search import (
    Evolution,
    Found,
    inherited_accuracy,
    measured_macs,
)
from transom.papers.compression.vit_resnas.supernet import Options, Space, SuperNet
from transom.registry import Backbone, Offer

__all__ = [
    "BACKBONES",
    "OFFERS",
    "BlockDef",
    "Definition",
    "EmbedDef",
    "Evolution",
    "Found",
    "MaskedLayerNorm",
    "Options",
    "ReduceDef",
    "Space",
    "SpatialReduction",
    "SuperNet",
    "ViTResNAS",
    "convert",
    "inherited_accuracy",
    "measured_macs",
]

# Of small and medium only the budgets of their searches are published.
BACKBONES = (
    Backbone("vit_resnas_tiny", gmacs=1.7826),
    Backbone("vit_resnas_small", gmacs=2.9),
    Backbone("vit_resnas_medium", gmacs=4.6),
    Backbone("vit_res_tiny", gmacs=1.7944),
)

OFFERS = (
    Offer("operator", "masked-layer-norm", MaskedLayerNorm),
    Offer("operator", "spatial-reduction", SpatialReduction),
    Offer("objective", "supernet", SuperNet),
    Offer("pipeline", "evolution", Evolution),
)


def stage(dim: int, head_dim: int, heads: list[int], hidden: list[int]) -> list[Any]:
    """Entries of the transformer blocks of one stage."""
    return [(1, (dim, h, head_dim), (dim, m), 1) for h, m in zip(heads, hidden, strict=True)]


DEFINITIONS: dict[str, tuple[Any, ...]] = {
    "vit_resnas_tiny": (
        (4, 176),
        *stage(176, 32, [3, 3, 3, 4, 4], [704, 576, 640, 576, 704]),
        (3, 176, 352),
        *stage(352, 48, [10, 8, 8, 8, 10, 10], [1408, 1408, 1280, 1408, 1280, 1024]),
        (3, 352, 704),
        *stage(704, 64, [10, 10, 10, 8, 8], [2560, 1792, 2816, 2816, 2560]),
        (2, 704, 1000),
    ),
    "vit_resnas_small": (
        (4, 220),
        *stage(220, 32, [5, 5, 7, 5, 5, 5], [880, 880, 800, 720, 720, 720]),
        (3, 220, 440),
        *stage(440, 48, [10, 10, 10, 10, 12, 12], [1760, 1440, 1920, 1600, 1600, 1440]),
        (3, 440, 880),
        *stage(880, 64, [16, 12, 16, 12, 14], [3200, 3200, 2880, 2240, 2560]),
        (2, 880, 1000),
    ),
    "vit_resnas_medium": (
        (4, 240),
        *stage(240, 32, [7, 6, 7, 8, 7, 8, 6], [960, 960, 800, 960, 880, 880, 800]),
        (3, 240, 640),
        *stage(640, 48, [10, 14, 14, 16, 14, 16, 16], [1120, 1760, 1920, 1760, 1440, 1760, 1920]),
        (3, 640, 880),
        *stage(880, 64, [16, 10, 16, 12, 16, 14], [3200, 3840, 3840, 3200, 3520, 3520]),
        (2, 880, 1000),
    ),
    "vit_res_tiny": (
        (4, 192),
        *stage(192, 64, [3] * 4, [768] * 4),
        (3, 192, 384),
        *stage(384, 64, [6] * 4, [1536] * 4),
        (3, 384, 768),
        *stage(768, 64, [12] * 4, [3072] * 4),
        (2, 768, 1000),
    ),
}


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict without the head on the patches, which only training uses.

    The other names are the same. `ViTResNAS(..., patch_output=True)` takes the official file as it
    is.
    """
    found = _unwrapped(state)
    return {name: value for name, value in found.items() if not name.startswith("patch_head.")}


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Training keeps the state dict under `model`."""
    for key in ("model_ema", "model"):
        inner: Any = state.get(key)
        if isinstance(inner, dict):
            return dict(inner)
    return dict(state)


def _adapted(state: dict[str, Tensor], model: ViTResNAS) -> dict[str, Tensor]:
    """A state dict for `model`, position tables interpolated where its size differs."""
    state, own = _unwrapped(state), model.state_dict()
    for name in [n for n in state if n.endswith("pos_embed") and n in own]:
        prefix = 0 if name.startswith("blocks.") else model.num_prefix_tokens
        old = round((state[name].shape[1] - prefix) ** 0.5)
        layer: Any = model if prefix else model.get_submodule(name.removesuffix(".pos_embed"))
        state[name] = resized(state[name], (old, old), layer.grid, prefix)
    return state


def _cfg(**changes: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.conv1.conv",
        "classifier": "cls_head",
        "license": "cc-by-nc-4.0",
        **changes,
    }


default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg() for name in DEFINITIONS})


def _create(name: str, pretrained: bool, **settings: Any) -> ViTResNAS:
    model: ViTResNAS = build_model_with_cfg(
        ViTResNAS,
        name,
        pretrained,
        pretrained_filter_fn=_adapted,
        feature_cfg={
            "out_indices": settings.pop("out_indices", (0, 1, 2)),
            "feature_cls": "getter",
        },
        **{"network_def": DEFINITIONS[name], **settings},
    )
    return model


@register_model
def vit_resnas_tiny(pretrained: bool = False, **settings: Any) -> ViTResNAS:
    """ViT-ResNAS-Tiny, searched for 1.8 G multiply-adds."""
    return _create("vit_resnas_tiny", pretrained, **settings)


@register_model
def vit_resnas_small(pretrained: bool = False, **settings: Any) -> ViTResNAS:
    """ViT-ResNAS-Small, searched for 2.9 G multiply-adds."""
    return _create("vit_resnas_small", pretrained, **settings)


@register_model
def vit_resnas_medium(pretrained: bool = False, **settings: Any) -> ViTResNAS:
    """ViT-ResNAS-Medium, searched for 4.6 G multiply-adds."""
    return _create("vit_resnas_medium", pretrained, **settings)


@register_model
def vit_res_tiny(pretrained: bool = False, **settings: Any) -> ViTResNAS:
    """ViT-Res-Tiny, the network by hand that the search starts from."""
    return _create("vit_res_tiny", pretrained, **settings)
