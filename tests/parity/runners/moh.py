"""MoH against SkyworkAI/MoH."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from transom import registry
from transom.papers.attention.moh.attention import MoHAttention, MoHLlamaAttention
from transom.papers.attention.moh.network import moh_vit
from transom.papers.attention.moh.routing import load_balance, routed
from transom.papers.attention.moh.skipping import Path

from ..golden import Golden


def attention(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    path: Path = "skip"
    made: MoHAttention | MoHLlamaAttention
    if "hidden" in c:
        made = MoHLlamaAttention(
            c["hidden"], c["num_heads"], c["num_kv_heads"], rope_theta=c["rope_theta"], path=path
        )
    else:
        made = MoHAttention(
            c["dim"],
            c["num_heads"],
            c["shared_head"],
            c["routed_head"],
            qkv_bias=c["qkv_bias"],
            qk_norm=c["qk_norm"],
            head_dim=c.get("head_dim"),
            path=path,
        )
    golden.load(made)
    made.train(c.get("mode") == "train")
    x = golden.inputs["x"]
    with routed(made) as seen:
        y = made(x)
    made.path = "dense"
    with torch.no_grad():
        golden._close("heads not skipped", made(x), y.detach())
    found = {"y": y}
    if seen[0].mask is not None and seen[0].probability is not None:
        found["load_balance"] = load_balance(seen[0].probability, seen[0].mask)[None]
    return found


def model(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    registry.rooms()
    own = ("img_size", "embed_dims", "num_heads", "depths", "mlp_ratios", "sr_ratios", "qkv_bias")
    settings = {name: c[name] for name in (*own, "num_classes")}
    window = c["window"]
    made = moh_vit(
        "transnext_micro",
        c["shared_head"],
        c["routed_head"],
        window_size=[window] * len(c["depths"]) if isinstance(window, int) else window,
        **{name: c[name] for name in ("pretrain_size", "fixed_pool_size") if name in c},
        **settings,
    ).eval()
    for name, module in made.named_modules():
        if re.fullmatch(r"block\d\.\d+\.norm\d|norm\d", name):
            module.eps = c["norm_eps"]
    golden.load(made)
    return {"logits": made(golden.inputs["x"])}


KINDS = {"attention": attention, "attention+loss": attention, "model": model}
