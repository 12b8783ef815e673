"""ViTamin: a hybrid image tower for contrastive pre-training of images and text.

    stem      conv 3x3 /2, norm, GELU, conv 3x3                               stride 2
    stage 1, 2   MBConv-LN blocks: x' = shortcut(x) + W3 GELU(DW3x3 GELU(W1 norm(x)))   4, 8
    tokens    norm, conv 3x3 /2; learned positions; no class token            stride 16
    stage 3   z + attention(norm1(z)), then z + geglu(norm2(z))
    head      mean over the tokens, norm, linear

    geglu(v) = W2 (GELU(W0 u + b0) ⊙ (W1 u + b1)) + b2,   u = norm(v),   hidden width 2 D

Images (B, 3, H, W) become (B, H/16 · W/16, D), what a ViT/16 gives. All norms are layer norms over
channels with eps 1e-6, all GELU exact; the shortcut of a block of stride 2 is a 3x3 mean over what
lies inside the map, and a 1x1 convolution where the width changes. What enters the ffn has been
normed twice, by norm2 and by the ffn's own norm.

Source: Chen et al., ViTamin: Designing Scalable Vision Models in the Vision-Language Era, CVPR
2024; official code Beckschen/ViTamin@24f7475 (Apache-2.0). The architecture is in timm, and this
room uses it; what is here: the state dicts of the released CLIP models as timm's (`convert`), an
encoder of any size (`encoder`), the two towers through open_clip (`clip`), locked-text tuning
(`lock_text`), and as a method the GEGLU ffn for other hosts.

Checked: the block and a small encoder against golden cases, with gradients; parameters of every
size; multiply-adds of every size, against the published ones without the two matrix products
inside attention, which the authors did not count (for S that is 7 %). Not checked: accuracy, and
the released weights themselves.

The official XL models have a position table that timm's do not make; for their state dicts create
the timm model with `pos_embed="learn"`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from timm.models.vitamin import GeGluMlp, MbConvLNBlock, MbConvStages, VitCfg
from torch import Tensor, nn

from transom.errors import CheckpointError, FitError, SettingsError
from transom.hosts.base import Host
from transom.registry import Backbone, Method, Offer
from transom.slots import Fill
from transom.tokens import Record

TRUNK, HEAD, TEXT = "visual.trunk.", "visual.head.proj.weight", "text."


def encoder(
    stem_width: int,
    conv_dims: Sequence[int],
    conv_depths: Sequence[int],
    embed_dim: int,
    depth: int,
    num_heads: int,
    *,
    mlp_ratio: float = 2.0,
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 0,
    drop_path_rate: float = 0.0,
) -> VisionTransformer:
    """An image tower of any size, made of timm's parts.

    Args:
        stem_width: channels of the stem.
        conv_dims: channels of the two stages of convolutions.
        conv_depths: blocks of each.
        embed_dim: width D of the tokens.
        depth: transformer blocks.
        num_heads: of each.
        mlp_ratio: hidden width of the ffn divided by D.
        img_size: height and width of the images, in pixels.
        num_classes: outputs of the head; 0 for the pooled features.
        drop_path_rate: of the last transformer block; grows linearly from 0.

    Returns:
        timm's VisionTransformer with the parameter names of the official code.

    Raises:
        SettingsError: there are not two stages of convolutions.
    """
    if len(conv_dims) != 2 or len(conv_depths) != 2:
        raise SettingsError(
            f"conv_dims is {conv_dims!r} and conv_depths {conv_depths!r}; expected two numbers each"
        )
    sizes = VitCfg((*conv_dims, embed_dim), (*conv_depths, 1), stem_width)
    return VisionTransformer(
        img_size=img_size,
        patch_size=1,
        num_classes=num_classes,
        global_pool="avg",
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        class_token=False,
        drop_path_rate=drop_path_rate,
        embed_layer=partial(HybridEmbed, backbone=MbConvStages(sizes), proj=False),
        mlp_layer=GeGluMlp,
    )


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A released state dict as that of timm's model.

    Args:
        state: of a CLIP model, of which the image tower is taken, or of an image tower.

    Returns:
        The image tower; the projection into the joint space, which has no bias, is its head.
    """
    if not any(name.startswith(TRUNK) for name in state):
        return state
    trunk = {n.removeprefix(TRUNK): t for n, t in state.items() if n.startswith(TRUNK)}
    if HEAD in state:
        trunk["head.weight"] = state[HEAD]
        trunk["head.bias"] = torch.zeros_like(state[HEAD][:, 0])
    return trunk


def clip(variant: str = "ViTamin-S", **options: Any) -> nn.Module:
    """Image and text tower as published, with random weights, through open_clip.

    Args:
        variant: open_clip's name: ViTamin-S, -B, -L, -L2 or -XL, with -LTT or an image size.
        options: for `open_clip.create_model`.

    Returns:
        An open_clip model; a batch of images and texts gives features and the logit scale.

    Raises:
        SettingsError: open_clip is not installed, or has no such variant.
    """
    try:
        library = importlib.import_module("open_clip")
    except ModuleNotFoundError as error:
        raise SettingsError(
            "the text tower of ViTamin comes from open_clip, which is not installed; run "
            "`pip install open_clip_torch`"
        ) from error
    known = [name for name in library.list_models() if name.startswith("ViTamin")]
    if variant not in known:
        raise SettingsError(f"open_clip has no model {variant!r}; it has {known}")
    return library.create_model(variant, **options)


def lock_text(model: nn.Module, teacher: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Locked-text tuning: image tower and logit scale train against a frozen text tower.

    Args:
        model: as `clip` gives it; the -LTT variants have the text tower of ViTamin-L.
        teacher: state dict of a stronger CLIP model, whose text tower is loaded; None keeps the
            model's own.

    Returns:
        The same model, with the text tower frozen.

    Raises:
        CheckpointError: the teacher has no text tower, or one of another size.
    """
    text = model.get_submodule(TEXT.removesuffix("."))
    if teacher is not None:
        state = {n.removeprefix(TEXT): t for n, t in teacher.items() if n.startswith(TEXT)}
        if not state:
            raise CheckpointError(
                "the teacher's state dict has no text tower; expected names that begin with "
                f"{TEXT!r}, as the released models have them"
            )
        try:
            text.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise CheckpointError(
                "the teacher's text tower does not fit the model's; use one of the -LTT variants, "
                f"whose text tower is that of ViTamin-L: {error}"
            ) from error
    text.requires_grad_(False)
    return model


class GeGlu(nn.Module):
    """The ffn with its own norm in the slot `ffn` of a host."""

    def __init__(self, width: int, mlp_ratio: float) -> None:
        super().__init__()
        self.mlp = GeGluMlp(width, int(width * mlp_ratio))

    def forward(self, h: Tensor, record: Record) -> Tensor:
        """(B, N, D) both ways."""
        return self.mlp(h)


@dataclass(frozen=True)
class ViTamin(Method):
    """GEGLU with a norm of its own as ffn of every block.

    Attributes:
        mlp_ratio: hidden width divided by D; 2 has three quarters of the parameters of a plain ffn
            of ratio 4.
    """

    mlp_ratio: float = 2.0
    needs_training = True

    def __post_init__(self) -> None:
        if self.mlp_ratio <= 0:
            raise SettingsError(f"mlp_ratio is {self.mlp_ratio}; expected a number above 0")

    def fit(self, host: Host) -> list[Fill]:
        if host.width * self.mlp_ratio < 1:
            raise FitError(
                f"mlp_ratio {self.mlp_ratio} leaves no hidden channel at a width of {host.width}"
            )
        return [Fill(ffn=GeGlu(host.width, self.mlp_ratio)) for _ in range(host.depth)]

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        return [{"mlp_ratio": ratio} for ratio in (2.0, 1.0, 0.5)]


# S is published with 5.50 G, 7 % less than the counter finds, which counts all of attention. Larger
# images, for which only accuracy is published, are listed for their position tables; timm's XL has
# none, so its weights are the same for every size.
BACKBONES = (
    Backbone("vitamin_small_224", params=22.0),
    Backbone("vitamin_base_224", params=87.5, gmacs=21.8),
    Backbone("vitamin_large_224", params=333.3, gmacs=72.6),
    Backbone("vitamin_large2_224", params=333.3, gmacs=72.6),
    Backbone("vitamin_xlarge_256", params=436.1, gmacs=125.3, size=256),
    *(
        Backbone(f"vitamin_{size}_{side}", size=side)
        for size, sides in (("large", (256, 336, 384)), ("large2", (256, 336, 384)))
        for side in sides
    ),
)
OFFERS = (
    Offer("operator", "mbconv-ln", MbConvLNBlock),
    Offer("pipeline", "clip", clip),
    Offer("objective", "lock-text", lock_text),
)
