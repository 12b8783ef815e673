"""Shift equivariance against willding123/Shift-Equivariant-Vision-Transformers."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from transom.papers.attention.shift_equivariance import (
    AnchoredPatchEmbed,
    CircularPosition,
    PolyTwins,
    PolyViT,
    anchor,
    norms,
)

from ..golden import Golden


def anchoring(golden: Golden) -> dict[str, Tensor]:
    x, stride = golden.inputs["x"], golden.config["stride"]
    y = anchor(x, stride, golden.config.get("invariance", False))
    return {"y": y, "polyphase_norms": norms(x, stride)}


def tokenizer(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    options = {} if c.get("norm", True) else {"norm_layer": None}
    module = AnchoredPatchEmbed(
        c["size"], c["patch_size"], c["in_chans"], c["out_chans"], **options
    )
    golden.load(module)
    return {"tokens": module(golden.inputs["x"])}


def position(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    module = CircularPosition(c["dim"], c.get("stride", 1))
    golden.load(module)
    grid = c["grid"]
    return {"y": module(golden.inputs["x"], (grid, grid) if isinstance(grid, int) else tuple(grid))}


def _both(golden: Golden, module: nn.Module) -> dict[str, Tensor]:
    golden.load(module.eval())
    image = golden.inputs["image"]
    down, across = golden.config["roll"]
    logits, shifted = module(image), module(torch.roll(image, (down, across), (2, 3)))
    assert (logits - shifted).abs().max() < 1e-12
    return {"logits": logits, "logits_shifted": shifted}


def model(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    names = (
        *("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads"),
        *("mlp_ratio", "qkv_bias", "class_token", "global_pool"),
    )
    settings = {name: c[name] for name in names if name in c}
    norm = partial(nn.LayerNorm, eps=c.get("norm_eps", 1e-6))
    return _both(golden, PolyViT(norm_layer=norm, **settings))


def twins(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    stages = len(c["depths"])
    ratio = c["mlp_ratio"]
    built = PolyTwins(
        img_size=c["img_size"],
        patch_size=c["patch_size"],
        num_classes=c["num_classes"],
        embed_dims=c["embed_dims"],
        num_heads=c["num_heads"],
        mlp_ratios=[ratio] * stages if isinstance(ratio, int | float) else ratio,
        depths=c["depths"],
        sr_ratios=c["sr_ratios"],
        wss=c["window_sizes"],
        norm_layer=partial(nn.LayerNorm, eps=c.get("norm_eps", 1e-6)),
    )
    return _both(golden, built)


KINDS = {
    "anchoring": anchoring,
    "anchoring_invariant": anchoring,
    "tokenizer": tokenizer,
    "position": position,
    "model": model,
    "model_twins": twins,
}
