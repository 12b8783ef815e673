"""SpectFormer: the first layers filter tokens in the Fourier domain, the later ones attend.

The spectral gate takes the patches as a map X (h, w, D) and learns one complex weight W for each
frequency and channel:

    Y = irfft2(rfft2(X) ⊙ W)        both orthonormal, over h and w

which is a circular convolution of each channel with a kernel as large as the map.

    W: (h, w // 2 + 1, D, 2), real and imaginary part; drawn from 0.02 · N(0, 1)

Two architectures carry the name. The isotropic one puts the gate inside the ffn branch, with one
residual, x + mlp(norm2(gate(norm1(x)))), in the first `alpha` = 4 blocks; the hierarchical one has
two residuals, x + gate(norm1(x)) and x + ffn(norm2(x)), in its first two stages, a depthwise
convolution inside the ffn, a block of class attention on the mean token, and, by default, a second
head (token labelling) that adds half the largest logits among the tokens.

Source: Patro, Namboodiri and Agneeswaran, SpectFormer: Frequency and Attention is what you need in
a Vision Transformer, 2023, sec. 3; official code badripatro/SpectFormers@b6cf487 (no licence file;
this package is our own). Published sizes: the model tables and training logs of that repository.

Checked: gate, both isotropic blocks and both models against golden cases, with gradients; sizes of
all variants. Not checked: accuracy, as no weights are published.

What is ours, as there is nothing official to follow:

* the gates of the official code fit 224 px only; here a gate of another grid keeps its kernel (see
  `gate.resized`), in place (`model.set_input_size`) or for one call;
* the official isotropic model has 6 heads whatever its width, which 256 and 512 channels cannot
  have; the ti and b variants have heads of 64 channels. Parameters do not depend on it;
* half precision is transformed in float32 and returned as it came (the official gate returns
  float32);
* in training, too, a model returns one tensor of logits; the feature-level cutmix of the official
  training loop is not part of it;
* as a method, the gate replaces the attention of the first `alpha` blocks of a host, with the
  host's two residuals; prefix tokens get nothing from it and wait for the attention blocks.

`torch.export` and ONNX take the gate as real matrix products of the same values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from transom.errors import FitError, SettingsError
from transom.hosts.base import Host
from transom.papers.attention.spectformer.gate import (
    Grid,
    SpectralGate,
    filtered,
    filtered_by_matrices,
    resized,
)
from transom.papers.attention.spectformer.hierarchical import HierarchicalSpectFormer
from transom.papers.attention.spectformer.isotropic import (
    AttentionBlock,
    IsotropicSpectFormer,
    SpectralBlock,
    fitted_state,
)
from transom.registry import Backbone, Method
from transom.slots import Ask, Fill

__all__ = [
    "BACKBONES",
    "AttentionBlock",
    "HierarchicalSpectFormer",
    "IsotropicSpectFormer",
    "SpectFormer",
    "SpectralBlock",
    "SpectralGate",
    "filtered",
    "filtered_by_matrices",
    "resized",
]


class GatedPatches(nn.Module):
    """The spectral gate in the slot `attention` of a host."""

    def __init__(self, width: int, grid: Grid) -> None:
        super().__init__()
        self.gate = SpectralGate(width, grid)

    def forward(self, h: Tensor, ask: Ask) -> Tensor:
        """Filtered patches, and zeros for the prefix; (B, N, D) both ways."""
        assert ask.record is not None
        prefix, patches = ask.record.as_map(h)
        return torch.cat([torch.zeros_like(prefix), self.gate(patches).flatten(1, 2)], 1)


@dataclass(frozen=True)
class SpectFormer(Method):
    """Spectral gates instead of attention in the first blocks.

    Attributes:
        alpha: how many blocks, from the first on; None takes a third of them, as the paper does. A
            host of which only the class token is read has to keep attention in at least one.
    """

    alpha: int | None = None
    needs_grid = True
    needs_training = True

    def __post_init__(self) -> None:
        if self.alpha is not None and self.alpha < 0:
            raise SettingsError(f"alpha is {self.alpha}; expected a number of blocks, at least 0")

    def fit(self, host: Host) -> list[Fill]:
        if host.grid is None:
            raise FitError(
                f"spectformer filters the grid of the patches, and that of this {host.family} host "
                "is not known; fit it to a host with square images and patches"
            )
        alpha = max(1, round(host.depth / 3)) if self.alpha is None else self.alpha
        if host.reads == "class token" and alpha >= host.depth:
            raise FitError(
                f"alpha is {alpha}, but this {host.family} has {host.depth} blocks and only its "
                "class token is read, which gates do not reach: it would never see a patch. Leave "
                "attention in the last blocks"
            )
        return [
            Fill(mixer=GatedPatches(host.width, host.grid)) if i < alpha else Fill()
            for i in range(host.depth)
        ]

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        return [{"alpha": max(1, depth * part // 6)} for part in (1, 2, 3)]

    @classmethod
    def neutral(cls) -> dict[str, Any]:
        return {"alpha": 0}


BACKBONES = (
    Backbone("spectformer_ti", params=9.16, gmacs=1.8),
    Backbone("spectformer_xs", params=20.03, gmacs=4.0),
    Backbone("spectformer_s", params=32.45, gmacs=6.6),
    Backbone("spectformer_b", params=57.16, gmacs=11.5),
    Backbone("spectformer_h_s", params=22.2, gmacs=3.9),
    Backbone("spectformer_h_b", params=33.1, gmacs=6.3),
    Backbone("spectformer_h_l", params=54.7, gmacs=12.7),
)


def _cfg(first_conv: str, classifier: str | tuple[str, ...]) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": classifier,
    }


default_cfgs = generate_default_cfgs(
    {
        backbone.name: _cfg("patch_embed1.conv.0", ("head", "aux_head"))
        if "_h_" in backbone.name
        else _cfg("patch_embed.proj", "head")
        for backbone in BACKBONES
    }
)


def _create(
    architecture: type[nn.Module],
    name: str,
    pretrained: bool,
    out_indices: int,
    given: dict[str, Any],
) -> nn.Module:
    indices = given.pop("out_indices", out_indices)
    return build_model_with_cfg(
        architecture,
        name,
        pretrained,
        pretrained_filter_fn=fitted_state,
        feature_cfg={"out_indices": indices, "feature_cls": "getter"},
        **given,
    )


def _isotropic(
    name: str, pretrained: bool, own: dict[str, Any], given: dict[str, Any]
) -> nn.Module:
    return _create(IsotropicSpectFormer, name, pretrained, 3, {**own, **given})


@register_model
def spectformer_ti(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Isotropic, 256 channels, 12 blocks."""
    own = {"embed_dim": 256, "depth": 12, "num_heads": 4}
    return _isotropic("spectformer_ti", pretrained, own, kwargs)


@register_model
def spectformer_xs(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Isotropic, 384 channels, 12 blocks."""
    own = {"embed_dim": 384, "depth": 12, "num_heads": 6}
    return _isotropic("spectformer_xs", pretrained, own, kwargs)


@register_model
def spectformer_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Isotropic, 384 channels, 19 blocks; trained with a drop path rate of 0.15."""
    own = {"embed_dim": 384, "depth": 19, "num_heads": 6}
    return _isotropic("spectformer_s", pretrained, own, kwargs)


@register_model
def spectformer_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Isotropic, 512 channels, 19 blocks; trained with a drop path rate of 0.25."""
    own = {"embed_dim": 512, "depth": 19, "num_heads": 8}
    return _isotropic("spectformer_b", pretrained, own, kwargs)


def _hierarchical(
    name: str, pretrained: bool, own: dict[str, Any], given: dict[str, Any]
) -> nn.Module:
    return _create(HierarchicalSpectFormer, name, pretrained, 4, {**own, **given})


@register_model
def spectformer_h_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Hierarchical, 64 to 448 channels, 16 blocks; trained with a drop path rate of 0.1."""
    return _hierarchical("spectformer_h_s", pretrained, {}, kwargs)


@register_model
def spectformer_h_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Hierarchical, 64 to 512 channels, 22 blocks; trained with a drop path rate of 0.1."""
    own = {
        "stem_hidden_dim": 64,
        "embed_dims": (64, 128, 320, 512),
        "num_heads": (2, 4, 10, 16),
        "depths": (3, 4, 12, 3),
    }
    return _hierarchical("spectformer_h_b", pretrained, own, kwargs)


@register_model
def spectformer_h_l(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Hierarchical, 96 to 512 channels, 30 blocks; trained with a drop path rate of 0.3."""
    own = {
        "stem_hidden_dim": 64,
        "embed_dims": (96, 192, 384, 512),
        "num_heads": (3, 6, 12, 16),
        "depths": (3, 6, 18, 3),
    }
    return _hierarchical("spectformer_h_l", pretrained, own, kwargs)
