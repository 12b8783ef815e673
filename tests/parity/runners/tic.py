"""TiC against zs670980918/MSA-Conv."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from transom.papers.attention.tic.operator import MSAConv2d, window_dots, window_sum

from ..golden import Golden


def operator(golden: Golden) -> dict[str, Tensor]:
    config, given = golden.config, golden.inputs
    first, second = _pairs(config["kernel"])
    dilation = _pair(config.get("dilation", 1))
    dots = window_dots(given["q"], given["k_"], first, dilation)
    scale = config.get("scale", "none")
    logits = dots if scale == "none" else dots * scale
    return {"dots": dots, "out": window_sum(logits.softmax(1), given["v"], second, dilation)}


def block(golden: Golden) -> dict[str, Tensor]:
    names = ("input_channel", "output_channel", "kernel_size", "stride", "dilation", "padding")
    config: dict[str, Any] = {n: _pair(v) for n, v in golden.config.items() if n in names}
    module = MSAConv2d(**config, bias=golden.config["bias"]).eval()
    golden.load(module)
    return {"y": module(golden.inputs["x"])}


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _pairs(kernel: Any) -> tuple[Any, Any]:
    """Windows of the products and of the sum: one for both, or two of the same area."""
    if isinstance(kernel, list) and isinstance(kernel[0], list):
        return _pair(kernel[0]), _pair(kernel[1])
    return _pair(kernel), _pair(kernel)


KINDS = {"attention": operator, "block": block}
