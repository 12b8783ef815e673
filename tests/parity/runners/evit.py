"""EViT against youweiliang/evit."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor

import transom
from transom.hosts.timm_attention import answer_for
from transom.ops.matching import descending
from transom.papers.tokens.evit import EViT, keep_rate_schedule, kept
from transom.slots import Ask
from transom.tokens import representatives
from transom.watching import Trace

from ..golden import Golden
from . import vit


def attended(golden: Golden) -> dict[str, Tensor]:
    config, x = golden.config, golden.inputs["x"]
    module = Attention(config["dim"], config["num_heads"], qkv_bias=config["qkv_bias"]).eval()
    golden.load(module)
    ask = Ask(keep=True)
    y = answer_for(module, "attention")(x, transom=ask)
    row = ask.class_row()[:, 1:]
    left = kept(row.shape[1], config["keep_rate"], config["tokens"])
    return {
        "x": y,
        "cls_attn": row,
        "idx": descending(row.detach())[:, :left],
        "left_tokens": torch.tensor([left]),
    }


def block(golden: Golden) -> dict[str, Tensor]:
    config, x = golden.config, golden.inputs["x"]
    host = vit.build(
        {**config, "embed_dim": config["dim"], "depth": 1},
        img_size=8,
        patch_size=8,
        num_classes=0,
    ).double()
    golden.load(host.blocks[0])
    method = EViT((config["keep_rate"],), fuse_token=config["fuse_token"], tokens=config["tokens"])
    transom.apply(host, method, restore="never", check=False)
    with transom.trace(host) as trace:
        y = host.blocks(x)
    k = kept(x.shape[1] - 1, config["keep_rate"], config["tokens"])
    out = {"x": y, "n_tokens": torch.tensor([y.shape[1] - 1])}
    if k < x.shape[1] - 1:
        (out["idx"],) = _kept(trace, x.shape[1], {0: k})
    return out


def model(golden: Golden) -> dict[str, Tensor]:
    config, depth = golden.config, golden.config["depth"]
    host = vit.build(config, img_size=config["call_img"])
    golden.load(host, pos_embed=_resized(golden.tensors("param")["pos_embed"], config))
    rates, call = config["keep_rate"], config["call_keep_rate"]
    rates = tuple(rates) if isinstance(rates, list) else (rates,) * depth
    override = tuple(call) if isinstance(call, list) else call
    transom.apply(host, EViT(rates, fuse_token=config["fuse_token"]), restore="never", check=False)
    transom.adjust(host, override=override)
    with transom.trace(host) as trace:
        logits = host(golden.inputs["image"])
    count = host.pos_embed.shape[1]
    fills = transom.fittings(host)[0].fills
    left, ks = count, {}
    for i, fill in enumerate(fills):
        if fill.tokens is not None:
            k = kept(left - 1, fill.tokens.keep_rate)
            if k < left - 1:
                ks[i] = k
        left = trace.lengths[i]
    return {"logits": logits} | {f"idx{n}": idx for n, idx in enumerate(_kept(trace, count, ks))}


def _kept(trace: Trace, count: int, ks: dict[int, int]) -> list[Tensor]:
    """For each reducing block the kept patches as positions in the block's own input."""
    out = []
    for i, k in ks.items():
        after = trace.tokens[i].index
        assert after is not None
        first = torch.arange(count).expand_as(after)
        before = trace.tokens[i - 1].index if i else first
        original = representatives(after, trace.lengths[i])[:, 1 : 1 + k]
        out.append(before.gather(1, original) - 1)
    return out


def _resized(table: Tensor, config: dict) -> Tensor:
    """The official position table at the size of the call: bicubic without antialiasing."""
    old, new = math.isqrt(table.shape[1] - 1), config["call_img"] // config["patch_size"]
    if old == new:
        return table
    grid = table[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.flatten(2).mT], 1)


def schedule(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    rates = [
        keep_rate_schedule(
            int(i),
            c["base_keep_rate"],
            c["warmup_epochs"],
            c["total_epochs"],
            c["iters_per_epoch"],
        )
        for i in golden.inputs["iteration"]
    ]
    return {"out": torch.tensor(rates)}


KINDS = {"attention": attended, "block": block, "model": model, "schedule": schedule}
