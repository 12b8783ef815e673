"""T2T-ViT: overlapping pieces become tokens step by step, in front of a deep and narrow ViT.

Instead of cutting an image (B, 3, H, W) into patches, three soft splits unfold it with overlap
(kernel 7 stride 4, then 3 and 2 twice); between them a light layer mixes the tokens and makes them
narrow (t = 64), and its output is laid out as a map again:

    pieces (B, HW/16, 147)  ->  layer  ->  (B, HW/16, t)  ->  map
    pieces (B, HW/64, 9t)   ->  layer  ->  (B, HW/64, t)  ->  map
    pieces (B, HW/256, 9t)  ->  linear ->  tokens (B, HW/256, D)

The layers attend by softmax (`t2t_vit_t_*`) or by random features in O(N) (`t2t_vit_*`); see
:mod:`transom.ops.tokens_to_token`. Behind them stands a pre-norm ViT with a class token, fixed
sinusoid positions and no bias on q, k and v.

Source: Yuan et al., Tokens-to-Token ViT, ICCV 2021; official code yitu-opensource/T2T-ViT@0f63dc9
(Clear BSD). Checked against it: both layers, both tokenizers, a whole model, outputs and gradients.
Not checked: a published checkpoint, ImageNet accuracy. Dense, squeeze-excite and ghost variants of
the backbone are not here.

As a method, the tokenizer takes the place of a ViT's patch embedding with patches of 4, 8 or 16
pixels; it has to be trained. Published checkpoints of the official code were trained with attention
scaled by 1/sqrt(D) instead of 1/sqrt(D / heads): create the model with `qk_scale="width"` for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from transom.errors import FitError, SettingsError, TokensError
from transom.front import Embed, Front
from transom.hosts.base import Host
from transom.ops.tokens_to_token import SPLITS, FixedPositions, Kind, TokensToToken, pair
from transom.registry import Backbone, Method
from transom.slots import Fill


class T2TViT(FixedPositions, VisionTransformer):
    """A vision transformer behind a tokens-to-token module."""

    def __init__(
        self,
        tokens_type: Kind = "performer",
        token_dim: int = 64,
        qk_scale: str | None = None,
        **settings: Any,
    ) -> None:
        """Build the network.

        Args:
            tokens_type: of the layers between the soft splits.
            token_dim: their width.
            qk_scale: "width" scales attention by the width D, as published checkpoints need; None
                by the width of a head.
            **settings: as for timm's VisionTransformer.

        Raises:
            SettingsError: qk_scale is neither.
        """
        if qk_scale not in (None, "width"):
            raise SettingsError(f"qk_scale is {qk_scale!r}; expected None or 'width'")
        norm = partial(nn.LayerNorm, eps=1e-5)
        embed: Any = partial(
            TokensToToken, token_dim=token_dim, kind=tokens_type, norm_layer=nn.LayerNorm
        )
        defaults: dict[str, Any] = {"qkv_bias": False, "mlp_ratio": 3.0, "norm_layer": norm}
        super().__init__(embed_layer=embed, **{**defaults, **settings})
        self.fix_positions()
        if qk_scale == "width":
            for block in self.blocks:
                block.attn.scale = self.embed_dim**-0.5


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours: the tokens-to-token module is the patch embedding."""
    return {k.replace("tokens_to_token.", "patch_embed.", 1): v for k, v in state.items()}


# depth, width, heads, ratio of the ffn
SIZES: dict[str, tuple[int, int, int, float]] = {
    "7": (7, 256, 4, 2.0),
    "10": (10, 256, 4, 2.0),
    "12": (12, 256, 4, 2.0),
    "14": (14, 384, 6, 3.0),
    "19": (19, 448, 7, 3.0),
    "24": (24, 512, 8, 3.0),
    "14_resnext": (14, 384, 32, 3.0),
    "14_wide": (4, 768, 12, 3.0),
}


def _cfg(kind: Kind) -> Any:
    projection = "kqv" if kind == "performer" else "attn.qkv"
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
        "first_conv": f"patch_embed.attention1.{projection}",
        "classifier": "head",
        "license": "bsd-3-clause-clear",
        "paper_ids": "arXiv:2101.11986",
        "origin_url": "https://github.com/yitu-opensource/T2T-ViT",
    }


default_cfgs = generate_default_cfgs(
    {f"t2t_vit_{name}": _cfg("performer") for name in SIZES}
    | {f"t2t_vit_t_{name}": _cfg("transformer") for name in ("14", "19", "24")}
)


def _create(name: str, size: str, kind: Kind, pretrained: bool, settings: dict[str, Any]) -> Any:
    depth, width, heads, ratio = SIZES[size]
    own = {"depth": depth, "embed_dim": width, "num_heads": heads, "mlp_ratio": ratio}
    return build_model_with_cfg(
        T2TViT,
        name,
        pretrained,
        pretrained_filter_fn=lambda state, model: convert(state),
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        tokens_type=kind,
        **{**own, **settings},
    )


@register_model
def t2t_vit_7(pretrained: bool = False, **settings: Any) -> Any:
    """T2T-ViT-7."""
    return _create("t2t_vit_7", "7", "performer", pretrained, settings)


@register_model
def t2t_vit_10(pretrained: bool = False, **settings: Any) -> Any:
    """T2T-ViT-10."""
    return _create("t2t_vit_10", "10", "performer", pretrained, settings)


@register_model
def t2t_vit_12(pretrained: bool = False, **settings: Any) -> Any:
    """T2T-ViT-12."""
    return _create("t2t_vit_12", "12", "performer", pretrained, settings)


@register_model
def t2t_vit_14(pretrained: bool = False, **settings: Any) -> Any:
    """T2T-ViT-14."""
    return _create("t2t_vit_14", "14", "performer", pretrained, settings)


@register_model
def t2t_vit_19(pretrained: bool = False, **settings: Any) -> Any:
    """T2T-ViT-19."""
    return _create("t2t_vit_19", "19", "performer", pretrained, settings)


@register_model
def t2t_vit_24(pretrained: bool = False, **settings: Any) -> Any:
    """T2T-ViT-24."""
    return _create("t2t_vit_24", "24", "performer", pretrained, settings)


@register_model
def t2t_vit_14_resnext(pretrained: bool = False, **settings: Any) -> Any:
    """T2T-ViT-14 with 32 heads."""
    return _create("t2t_vit_14_resnext", "14_resnext", "performer", pretrained, settings)


@register_model
def t2t_vit_14_wide(pretrained: bool = False, **settings: Any) -> Any:
    """T2T-ViT, shallow and wide."""
    return _create("t2t_vit_14_wide", "14_wide", "performer", pretrained, settings)


@register_model
def t2t_vit_t_14(pretrained: bool = False, **settings: Any) -> Any:
    """T2T-ViT_t-14."""
    return _create("t2t_vit_t_14", "14", "transformer", pretrained, settings)


@register_model
def t2t_vit_t_19(pretrained: bool = False, **settings: Any) -> Any:
    """T2T-ViT_t-19."""
    return _create("t2t_vit_t_19", "19", "transformer", pretrained, settings)


@register_model
def t2t_vit_t_24(pretrained: bool = False, **settings: Any) -> Any:
    """T2T-ViT_t-24."""
    return _create("t2t_vit_t_24", "24", "transformer", pretrained, settings)


BACKBONES = (
    Backbone("t2t_vit_7", 4.3, 1.1),
    Backbone("t2t_vit_10", 5.9, 1.5),
    Backbone("t2t_vit_12", 6.9, 1.8),
    Backbone("t2t_vit_14", 21.5, 4.8),
    Backbone("t2t_vit_19", 39.2, 8.5),
    Backbone("t2t_vit_24", 64.1, 13.8),
    Backbone("t2t_vit_14_resnext"),
    Backbone("t2t_vit_14_wide"),
    Backbone("t2t_vit_t_14", 21.5, 6.1),
    Backbone("t2t_vit_t_19", 39.2, 9.8),
    Backbone("t2t_vit_t_24", 64.1, 15.0),
)


class SoftSplit(nn.Module):
    """Fills the slot `tokenizer`.

    Args:
        width: channels D of the host.
        patch: size of its patches in pixels.
        token_dim: width of the layers between the splits.
        kind: of these layers.
    """

    def __init__(self, width: int, patch: int, token_dim: int, kind: Kind) -> None:
        super().__init__()
        self.split = TokensToToken(patch, patch, embed_dim=width, token_dim=token_dim, kind=kind)

    def forward(self, pixels: Tensor, embed: Embed, patch: tuple[int, int]) -> Tensor:
        """Tokens (B, h, w, D) of the pixels (B, 3, H, W)."""
        sides = pixels.shape[-2] % patch[0], pixels.shape[-1] % patch[1]
        if any(sides):
            raise TokensError(
                f"images of {tuple(pixels.shape[-2:])} pixels are no multiple of patches of {patch}"
            )
        tokens = self.split.tokens(pixels)
        grid = pixels.shape[-2] // patch[0], pixels.shape[-1] // patch[1]
        return tokens.unflatten(1, grid)


def _patch(host: Host) -> int:
    """Size of the host's patches in pixels."""
    root: Any = host.root
    found: Any = getattr(getattr(root, "patch_embed", None), "patch_size", None)
    found = getattr(getattr(root, "config", None), "patch_size", found)
    found = getattr(root, "patch_size", found)
    sides = pair(found) if isinstance(found, int) else tuple(found or (0, 0))
    if sides[0] != sides[1] or sides[0] not in SPLITS:
        raise FitError(
            f"t2t-vit stands for patches of {sorted(SPLITS)} pixels, but this {host.family} has "
            f"{found}"
        )
    return sides[0]


@dataclass(frozen=True)
class T2T(Method):
    """The tokens-to-token module in the place of a patch embedding.

    Attributes:
        tokens_type: "performer" or "transformer", the layers between the soft splits.
        token_dim: their width.
    """

    tokens_type: Kind = "performer"
    token_dim: int = 64
    needs_training = True

    def __post_init__(self) -> None:
        if self.tokens_type not in ("performer", "transformer"):
            raise SettingsError(
                f"tokens_type is {self.tokens_type!r}; expected 'performer' or 'transformer'"
            )
        if self.token_dim < 2:
            raise SettingsError(f"token_dim is {self.token_dim!r}; expected at least 2")

    def fit(self, host: Host) -> list[Fill]:
        return [Fill()] * host.depth

    def front(self, host: Host) -> Front:
        if host.modality != "image":
            raise FitError(f"t2t-vit cuts images, and this {host.family} takes {host.modality}")
        return Front(SoftSplit(host.width, _patch(host), self.token_dim, self.tokens_type))
