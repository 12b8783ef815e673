"""SpectFormer against badripatro/SpectFormers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from transom.papers.attention.spectformer import (
    AttentionBlock,
    HierarchicalSpectFormer,
    IsotropicSpectFormer,
    SpectralBlock,
    SpectralGate,
)

from ..golden import Golden


def gate(golden: Golden) -> dict[str, Tensor]:
    config = golden.config
    grid = (config["H"], config["W"])
    module = SpectralGate(config["dim"], grid)
    golden.load(module)
    return {"y": module(golden.inputs["x"].unflatten(1, grid)).flatten(1, 2)}


def block(golden: Golden) -> dict[str, Tensor]:
    config = golden.config
    grid = (config["H"], config["W"])
    module: nn.Module
    if config["kind"] == "spectral":
        module = SpectralBlock(config["dim"], grid, config["mlp_ratio"])
    else:
        module = AttentionBlock(config["dim"], config["num_heads"], config["mlp_ratio"])
    golden.load(module)
    return {"y": module(golden.inputs["x"], grid)}


ISOTROPIC = (
    *("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "alpha"),
    *("num_heads", "mlp_ratio"),
)
HIERARCHICAL = (
    *("img_size", "in_chans", "num_classes", "stem_hidden_dim", "embed_dims", "num_heads"),
    *("mlp_ratios", "depths", "token_label"),
)


def model(golden: Golden) -> dict[str, Tensor]:
    config = golden.config
    hierarchical = "embed_dims" in config
    architecture: Any = HierarchicalSpectFormer if hierarchical else IsotropicSpectFormer
    names = HIERARCHICAL if hierarchical else ISOTROPIC
    module = architecture(**{n: config[n] for n in names if n in config}).eval()
    golden.load(module)
    return {"logits": module(golden.inputs["x"])}


KINDS = {"token-mixer": gate, "block": block, "model": model}
