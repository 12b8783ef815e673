"""MULTI-LANE against tdemin16/multi-lane."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

from transom.papers.tokens.multi_lane import model

from ..golden import Golden


def lanes(config: dict[str, Any], class_mask: Any) -> model.Lanes:
    return model.Lanes(
        class_mask=class_mask,
        num_selectors=config["num_selectors"],
        num_prompts=config["num_prompts"],
        num_prompt_layers=config.get("num_prompt_layers", 0),
        dandr=not config.get("disable_dandr", False),
        normalize=config.get("normalize", "pre-head") == "pre-head",
        head_mode=config.get("head_mode", "concat"),
        tome=config.get("tome", 0),
    )


def attended(golden: Golden) -> dict[str, Tensor]:
    config = golden.config
    attn: Any = Attention(config["dim"], config["num_heads"], qkv_bias=config["qkv_bias"]).eval()
    shape = (config["num_tasks"], config["num_prompts"], config["num_heads"])
    attn.prompts = nn.Parameter(torch.empty(2, *shape, config["dim"] // config["num_heads"]))
    golden.load(attn)
    x, tokens = golden.inputs["x"], golden.inputs["tokens"]
    settings = lanes(config, [[i] for i in range(config["num_tasks"])])
    prompts = attn.prompts[:, : config["pathways"]]
    with torch.no_grad():
        frozen = model.lane_attention(attn, x[None])[0]
    y = model.lane_branch(attn, x, tokens, prompts, settings, config.get("id", 0) == 0)
    return {"tokens": y, "x": frozen}


def whole(golden: Golden) -> dict[str, Tensor]:
    config = golden.config
    names = (
        *("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes"),
        *("mlp_ratio", "qkv_bias", "init_values"),
    )
    made = model.MultiLane(
        lanes(config, config["class_mask"]),
        norm_layer=partial(nn.LayerNorm, eps=config.get("norm_eps", 1e-6)),
        **{name: config[name] for name in names if name in config},
    )
    golden.load(made.train(config["mode"] == "train"))
    made.learnable()
    made.task = config["current_task"]
    out = made(golden.inputs["image"])
    return {
        "logits": out.logits,
        "task_tokens": out.task_tokens,
        "frozen_cls": out.frozen_cls,
        "sim": out.similarity,
        "tasks": out.task,
    }


KINDS = {"attention": attended, "model": whole}
