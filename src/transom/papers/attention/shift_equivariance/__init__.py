"""Shift equivariance: grids that begin where the image says, so that logits see no shift.

A strided or windowed operation sees an image and its shifted copy through different grids. Adaptive
polyphase anchoring A_p removes the difference: of the p² grids of stride p a map can be cut into,

    (a, b) = argmax over {0 … p-1}² of ‖x[:, a::p, b::p]‖₂
    A_p(x)[i, j] = x[(i + a) mod H, (j + b) mod W]

so A_p of a circularly shifted x is A_p(x) shifted by a multiple of p: windows and patches hold the
same pixels. It comes before the patch embedding (x: (B, 3, H, W), p the patch), and in Twins before
each block on the whole stream (B, h·w, C), p being the side of its windows or what its keys are
sub-sampled by. Positions are a depth-wise 3 x 3 convolution around the borders (plus identity)
instead of a table. What is pooled, or attended by a class token, is then the same for every shift.

Source: Ding, Soselia, Armstrong, Su, Huang: Reviving Shift Equivariance in Vision Transformers,
2023; official code willding123/Shift-Equivariant-Vision-Transformers@c8cd2ef (MIT; this file is
our own).

The official code takes square maps only and builds its helpers on CUDA; here a map may be a
rectangle, and a stride of 1 in one direction leaves that direction alone (sound along time). The
choice is made in double: where the norms of two polyphases agree to more digits than that (flat or
periodic images) shifted copies may choose differently. Real shifts, which move new pixels in, are
followed up to the borders only. The patch embedding has a LayerNorm that ViT's has not.

As a method it fills the slots `tokenizer` and `position` of a ViT of timm or transformers: the
host's patch embedding of the anchored image, with the new norm or without, and the convolution
instead of the table of positions (prefix tokens keep theirs). Where a host returns its patches they
come out shifted, image by image. For Twins of timm `anchor_twins` and
`release_twins` do the same in place; its weights go on as they are.

Checked: goldens of the official operator, patch embedding, positions and both models; the roll
written out; logits of every circular shift of a patch (ViT) or of the coarsest grid (Twins) equal
to 1e-5, where those of the plain models are not. Swin and CSWin forms are not here. The training
results of the paper were not reproduced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from transom.errors import FitError
from transom.front import Front
from transom.hosts.base import Host
from transom.papers.attention.shift_equivariance.polyphase import (
    anchor,
    anchor_tokens,
    norms,
    reference,
)
from transom.papers.attention.shift_equivariance.slots import (
    AnchoredTokenizer,
    circular_position,
)
from transom.papers.attention.shift_equivariance.twins import (
    PolyTwins,
    anchor_twins,
    release_twins,
)
from transom.papers.attention.shift_equivariance.vit import (
    AnchoredPatchEmbed,
    CircularPosition,
    PolyViT,
)
from transom.registry import Backbone, Method, Offer
from transom.slots import Fill

__all__ = [
    "BACKBONES",
    "OFFERS",
    "AnchoredPatchEmbed",
    "CircularPosition",
    "PolyTwins",
    "PolyViT",
    "ShiftEquivariance",
    "anchor",
    "anchor_tokens",
    "anchor_twins",
    "norms",
    "reference",
    "release_twins",
]


@dataclass(frozen=True)
class ShiftEquivariance(Method):
    """Anchored patches and circular positions in front of a host's blocks.

    Attributes:
        norm: put the LayerNorm of the paper behind the patch embedding; without it the patches are
            those that the host's blocks are used to.
        init: begin with random positions as the official code does, or with none.
        seed: of the random ones.
    """

    norm: bool = True
    init: Literal["official", "zero"] = "official"
    seed: int = 0
    needs_training = True

    def fit(self, host: Host) -> list[Fill]:
        return [Fill()] * host.depth

    def front(self, host: Host) -> Front:
        if host.reads == "maps":
            raise FitError(
                "shift-equivariance lays the patches out from where each image says, and the maps "
                f"that are made of the features of this {host.family} would come out shifted; fit "
                "it to a model that pools its tokens or reads a class token"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            position = circular_position(host.width, self.init == "zero")
        return Front(AnchoredTokenizer(host.width, self.norm), position)

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        return [{"norm": False, "init": "zero"}, {"norm": False}, {}]


BACKBONES = (
    Backbone("polyvit_small_patch16_224"),
    Backbone("polyvit_base_patch16_224"),
    Backbone("polytwins_svt_small"),
    Backbone("polytwins_svt_base"),
    Backbone("polytwins_svt_large"),
)

OFFERS = (
    Offer("operator", "anchor", anchor),
    Offer("operator", "anchored-patch-embed", AnchoredPatchEmbed),
    Offer("operator", "circular-position", CircularPosition),
    Offer("operator", "anchor-twins", anchor_twins),
    Offer("operator", "release-twins", release_twins),
)


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
    }


default_cfgs = generate_default_cfgs(
    {
        backbone.name: _cfg("patch_embed.proj" if "vit" in backbone.name else "patch_embeds.0.proj")
        for backbone in BACKBONES
    }
)


def _vit(name: str, pretrained: bool, given: dict[str, Any], **settings: Any) -> nn.Module:
    out_indices = given.pop("out_indices", 3)
    return build_model_with_cfg(
        PolyViT,
        name,
        pretrained,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{"patch_size": 16, "depth": 12, **settings, **given},
    )


def _twins(name: str, pretrained: bool, given: dict[str, Any], **settings: Any) -> nn.Module:
    out_indices = given.pop("out_indices", 4)
    common = {
        "patch_size": 4,
        "mlp_ratios": (4, 4, 4, 4),
        "wss": (7, 7, 7, 7),
        "sr_ratios": (8, 4, 2, 1),
    }
    return build_model_with_cfg(
        PolyTwins,
        name,
        pretrained,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{**common, **settings, **given},
    )


@register_model
def polyvit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PolyViT-S/16."""
    return _vit("polyvit_small_patch16_224", pretrained, kwargs, embed_dim=384, num_heads=6)


@register_model
def polyvit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PolyViT-B/16."""
    return _vit("polyvit_base_patch16_224", pretrained, kwargs, embed_dim=768, num_heads=12)


@register_model
def polytwins_svt_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PolyTwins-SVT-S."""
    return _twins(
        "polytwins_svt_small",
        pretrained,
        kwargs,
        embed_dims=(64, 128, 256, 512),
        num_heads=(2, 4, 8, 16),
        depths=(2, 2, 10, 4),
    )


@register_model
def polytwins_svt_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PolyTwins-SVT-B."""
    return _twins(
        "polytwins_svt_base",
        pretrained,
        kwargs,
        embed_dims=(96, 192, 384, 768),
        num_heads=(3, 6, 12, 24),
        depths=(2, 2, 18, 2),
    )


@register_model
def polytwins_svt_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PolyTwins-SVT-L."""
    return _twins(
        "polytwins_svt_large",
        pretrained,
        kwargs,
        embed_dims=(128, 256, 512, 1024),
        num_heads=(4, 8, 16, 32),
        depths=(2, 2, 18, 2),
    )
