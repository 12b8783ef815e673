"""RMT against qhfan/RMT."""

from __future__ import annotations

from torch import Tensor, nn

from transom.papers.attention.rmt.attention import (
    MaSA,
    RelPos,
    axis_mask,
    grid_mask,
    rotation,
)
from transom.papers.attention.rmt.backbone import RetBlock, VisRetNet

from ..golden import Golden


def position(golden: Golden) -> dict[str, Tensor]:
    config = golden.config
    angle, decay = golden.inputs["angle"], golden.inputs["decay"]
    made = _relpos(config)
    assert made.angle.allclose(angle.float()) and made.decay.allclose(decay.float())
    height, width = config["H"], config["W"]
    sin, cos = rotation(angle, height, width)
    return {
        "sin": sin,
        "cos": cos,
        "mask": grid_mask(decay, height, width),
        "mask_h": axis_mask(decay, height),
        "mask_w": axis_mask(decay, width),
    }


def attention(golden: Golden) -> dict[str, Tensor]:
    config, x = golden.config, golden.inputs["x"]
    parts = {"retention": MaSA(config["embed_dim"], config["num_heads"])}
    return _run(golden, x, parts)


def block(golden: Golden) -> dict[str, Tensor]:
    config, x = golden.config, golden.inputs["x"]
    scale = 1e-6 if config["layerscale"] else None
    made = RetBlock(config["embed_dim"], config["num_heads"], config["ffn_dim"], 0.0, scale)
    for norm in (made.retention_layer_norm, made.final_layer_norm):
        norm.eps = config["norm_eps"]
    return _run(golden, x, {"block": made})


def _run(golden: Golden, x: Tensor, parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    relpos = _relpos(golden.config)
    (module,) = parts.values()
    golden.load(nn.ModuleDict({"Relpos": relpos, **parts}).eval())
    tables = relpos(x.shape[1], x.shape[2], golden.config["form"])
    return {"y": module(x, tables)}


def _relpos(config: dict) -> RelPos:
    return RelPos(
        config["embed_dim"], config["num_heads"], config["initial_value"], config["heads_range"]
    )


def model(golden: Golden) -> dict[str, Tensor]:
    config = dict(golden.config)
    config.pop("img_size")
    made = VisRetNet(**config).eval()
    golden.load(made)
    x = made.forward_features(golden.inputs["x"])
    return {"features": made.forward_head(x, pre_logits=True), "logits": made.forward_head(x)}


KINDS = {"position": position, "attention": attention, "block": block, "model": model}
