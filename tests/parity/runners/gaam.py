"""GAAM against gioannides/Gaussian-Adaptive-Attention."""

from __future__ import annotations

from torch import Tensor

from transom.papers.attention.gaam import GaussianBlock, GaussianHead, MultiHeadGaussian

from ..golden import Golden


def head(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    eps = c.get("eps", 1e-8)
    module = GaussianHead(c["norm_axis"], c["num_gaussians"], c.get("padding_value"), eps)
    golden.load(module)
    y, weights = module(golden.inputs["x"])
    return {"y": y, "weights": weights}


def multihead(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    module = MultiHeadGaussian(
        c["norm_axis"], c["num_heads"], c["num_gaussians"], c.get("padding_value")
    )
    golden.load(module)
    y, weights = module(golden.inputs["x"])
    return {"y": y, "weights": weights}


def block(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    module = GaussianBlock(
        c["norm_axes"], c["num_heads"], c["num_gaussians"], c.get("padding_value")
    )
    golden.load(module)
    y, weights = module(golden.inputs["x"])
    return {"y": y, **weights}


KINDS = {"attention-head": head, "attention": multihead, "block": block}
