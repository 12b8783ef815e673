"""DependencyViT against a third-party re-implementation; the authors released no code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from transom.papers.tokens.dependency_vit import DependencyViT, ReversedAttention
from transom.papers.tokens.dependency_vit.backbone import Flow

from ..golden import Golden


def attention(golden: Golden) -> dict[str, Tensor]:
    c, x = golden.config, golden.inputs["x"]
    module = ReversedAttention(
        c["dim"],
        c["num_heads"],
        c.get("qkv_bias", False),
        c.get("head_selector_temperature", 0.1),
    )
    golden.load(module)
    given = golden.inputs.get("m")  # (B, 1, 1, N), or one element in front of the first layer
    m = given if given is None or given.numel() == 1 else given.reshape(x.shape[:2])
    if m is not None and m.numel() == 1:
        m = m.reshape(1, 1)
    y, after = module(x, m)
    mask = module.depend(x, after)
    return {"y": y, "m": after[:, None, None], "dependency_mask": mask}


def stack(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    settings: dict[str, Any] = {
        ours: c[theirs]
        for ours, theirs in (
            ("qkv_bias", "qkv_bias"),
            ("head_selector_temperature", "head_selector_temperature"),
        )
        if theirs in c
    }
    model = DependencyViT(
        img_size=16,
        num_classes=c["num_classes"],
        embed_dim=c["dim"],
        depth=c["depth"],
        num_heads=c["num_heads"],
        mlp_ratio=c["mlp_ratio"],
        prune_layers=c["prune_layers"],
        prune_ratio=c["prune_ratio"],
        **settings,
    ).eval()
    # the case begins behind the embedding
    part = nn.Module()
    part.blocks, part.norm, part.head = model.blocks, model.norm, model.head
    for module in part.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = c.get("norm_eps", 1e-6)
    golden.load(part)
    flow = Flow(golden.inputs["x"])
    for block in model.blocks:
        flow = model.run(block, flow)
    tokens = model.final(flow)
    return {
        "features": model.forward_head(tokens, pre_logits=True),
        "logits": model.forward_head(tokens),
        "tokens_left": torch.tensor([tokens.shape[1]]),
    }


KINDS = {"attention": attention, "block-stack": stack}
