"""ViTamin against Beckschen/ViTamin."""

from __future__ import annotations

from timm.models.vitamin import MbConvLNBlock
from torch import Tensor

from transom.papers.vision_language.vitamin import convert, encoder

from ..golden import Golden


def block(golden: Golden) -> dict[str, Tensor]:
    config = golden.config
    module = MbConvLNBlock(
        config["in_channels"],
        config["out_channels"],
        stride=config["stride"],
        kernel_size=config["kernel"],
        expand_ratio=config["expand_ratio"],
        norm_eps=config["norm_eps"],
    )
    golden.load(module)
    return {"y": module(golden.inputs["x"])}


SIZES = (
    *("stem_width", "conv_dims", "conv_depths", "embed_dim", "depth", "num_heads"),
    *("mlp_ratio", "img_size", "num_classes"),
)


def model(golden: Golden) -> dict[str, Tensor]:
    module = encoder(**{n: golden.config[n] for n in SIZES if n in golden.config}).eval()
    own = golden.tensors("param")
    assert convert(own) is own
    golden.load(module)
    tokens = module.forward_features(golden.inputs["x"])
    return {"tokens": tokens, "logits": module.forward_head(tokens)}


KINDS = {"block": block, "model": model}
