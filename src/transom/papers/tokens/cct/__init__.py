"""CCT: a small transformer for small data, with a convolutional tokenizer and sequence pooling.

Three steps from a small ViT, each a family of models here:

* ViT-Lite (`vit_7_4_32`): patches of 4×4 pixels and a class token;
* CVT (`cvt_7_4_32`): no class token; the tokens x (B, N, D) after the last norm are pooled,

      a = softmax over tokens of (x w + b)        z = Σ_n a_n x_n        logits = fc(z)

* CCT (`cct_7_3x1_32`: 7 layers, 1 convolution 3×3): tokens come from a few times convolution
  without bias -> ReLU -> max-pool 3, stride 2, read row by row.

The encoder layer is neither pre- nor post-norm: the residual of its MLP starts from the normalised
state,

    h = LN_1(x + attn(LN_pre(x)))        y = h + W₂ GELU(W₁ h).

Positions are learnable, fixed sines, or none; at another image size they are resized bilinearly.

Source: Hassani et al., Escaping the Big Data Paradigm with Compact Transformers, 2021; official
code SHI-Labs/Compact-Transformers@cd11f09 (Apache-2.0; these files are our own). Parameter names
are the official ones. There the `_sine` models get learnable positions, because the factories
never hand the choice on; here they get sines.

Other methods fit onto these models (`transom.hosts.compact`): the token step of a layer runs behind
LN_1, and merged tokens are restored in front of the sequence pooling.

Checked: tokenizer, layer, CCT with both kinds of positions, and CVT against golden cases with
gradients. Not checked: accuracies; ViT-Lite has no golden case. Left out: the variant for text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from transom.papers.tokens.cct.network import CompactTransformer
from transom.registry import Backbone

_LAYERS: dict[int, dict[str, Any]] = {
    2: {"depth": 2, "num_heads": 2, "mlp_ratio": 1.0, "embed_dim": 128},
    4: {"depth": 4, "num_heads": 2, "mlp_ratio": 1.0, "embed_dim": 128},
    6: {"depth": 6, "num_heads": 4, "mlp_ratio": 2.0, "embed_dim": 256},
    7: {"depth": 7, "num_heads": 4, "mlp_ratio": 2.0, "embed_dim": 256},
    14: {"depth": 14, "num_heads": 6, "mlp_ratio": 3.0, "embed_dim": 384},
}


def _convolutional(depth: int, kernel: int, layers: int, positions: str = "learnable") -> Any:
    return {**_LAYERS[depth], "kernel": kernel, "conv_layers": layers, "positions": positions}


def _patches(depth: int, seq_pool: bool) -> dict[str, Any]:
    return {**_LAYERS[depth], "kernel": 4, "convolutional": False, "seq_pool": seq_pool}


# name: (architecture, image size, classes)
_MODELS: dict[str, tuple[dict[str, Any], int, int]] = {
    "cct_2_3x2_32": (_convolutional(2, 3, 2), 32, 10),
    "cct_4_3x2_32": (_convolutional(4, 3, 2), 32, 10),
    "cct_6_3x1_32": (_convolutional(6, 3, 1), 32, 10),
    "cct_6_3x2_32": (_convolutional(6, 3, 2), 32, 10),
    "cct_7_3x1_32": (_convolutional(7, 3, 1), 32, 10),
    "cct_7_3x1_32_sine": (_convolutional(7, 3, 1, "sine"), 32, 10),
    "cct_7_3x1_32_c100": (_convolutional(7, 3, 1), 32, 100),
    "cct_7_3x1_32_sine_c100": (_convolutional(7, 3, 1, "sine"), 32, 100),
    "cct_7_3x2_32": (_convolutional(7, 3, 2), 32, 10),
    "cct_7_3x2_32_sine": (_convolutional(7, 3, 2, "sine"), 32, 10),
    "cct_7_7x2_224": (_convolutional(7, 7, 2), 224, 102),
    "cct_7_7x2_224_sine": (_convolutional(7, 7, 2, "sine"), 224, 102),
    "cct_14_7x2_224": (_convolutional(14, 7, 2), 224, 1000),
    "cct_14_7x2_384": (_convolutional(14, 7, 2), 384, 1000),
    "cct_14_7x2_384_fl": (_convolutional(14, 7, 2), 384, 102),
    **{f"cvt_{n}_4_32": (_patches(n, True), 32, 10) for n in (2, 4, 6, 7)},
    **{f"vit_{n}_4_32": (_patches(n, False), 32, 10) for n in (2, 4, 6, 7)},
}

# The published multiply-adds (5.11 and 15.02 G) leave out the products inside attention; with these
# 0.41 and 3.57 G they are what our counter finds.
_PUBLISHED = {"cct_14_7x2_224": 22.36, "cct_14_7x2_384": 22.51}

BACKBONES = tuple(
    Backbone(name, _PUBLISHED.get(name), size=size) for name, (_, size, _) in _MODELS.items()
)

default_cfgs = generate_default_cfgs(
    {
        name: {
            "url": "",
            "num_classes": classes,
            "input_size": (3, size, size),
            "pool_size": None,
            "crop_pct": 1.0 if size == 32 else 0.9,
            "interpolation": "bicubic",
            "fixed_input_size": False,
            "mean": (0.4914, 0.4822, 0.4465) if size == 32 else IMAGENET_DEFAULT_MEAN,
            "std": (0.2470, 0.2435, 0.2616) if size == 32 else IMAGENET_DEFAULT_STD,
            "first_conv": "tokenizer.conv_layers.0.0",
            "classifier": "classifier.fc",
        }
        for name, (_, size, classes) in _MODELS.items()
    }
)


def _factory(name: str) -> Callable[..., nn.Module]:
    architecture, size, classes = _MODELS[name]

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        indices = kwargs.pop("out_indices", min(architecture["depth"], 3))
        settings = {"img_size": size, "num_classes": classes, **architecture, **kwargs}
        model: nn.Module = build_model_with_cfg(
            CompactTransformer,
            name,
            pretrained,
            feature_cfg={"out_indices": indices, "feature_cls": "getter"},
            **settings,
        )
        return model

    build.__name__ = build.__qualname__ = name
    build.__module__ = __name__
    build.__doc__ = f"{name}: {size}×{size} pixels, {classes} classes."
    return build


for _name in _MODELS:
    globals()[_name] = register_model(_factory(_name))
