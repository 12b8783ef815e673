"""PiToMe against hchautran/PiToMe."""

from __future__ import annotations

import torch
from torch import Tensor

import transom
from transom.ops import matching, merging
from transom.papers.tokens.pitome import PiToMe, removed
from transom.tokens import Layout, Record, Tokens

from ..golden import Golden
from . import vit


def matched(golden: Golden) -> dict[str, Tensor]:
    config, inputs = golden.config, golden.inputs
    prefix = int(config["class_token"])
    kind = "bipartite" if config["use_bsm_pitome"] else "pitome"
    score = matching.energy(
        matching.unit(inputs["metric"][:, prefix:]), config["margin"], config["alpha"]
    )
    r = removed(score.shape[1], config["ratio"])
    found = matching.by_energy(inputs["metric"], r, prefix, config["margin"], kind, config["alpha"])
    out = _tokens(inputs["x"], prefix, inputs["size"]).merge(found)
    return {**_merged(out), "energy": score, "mean": merging.merge(inputs["x"], found)}


def matched_text(golden: Golden) -> dict[str, Tensor]:
    config, inputs = golden.config, golden.inputs
    prefix = int(config["class_token"])
    r = removed(inputs["x"].shape[1] - prefix, config["ratio"])
    found = matching.by_energy(inputs["metric"], r, prefix, config["margin"], "text")
    return _merged(_tokens(inputs["x"], prefix, None).merge(found, weighted=False))


def _tokens(x: Tensor, prefix: int, size: Tensor | None) -> Tokens:
    places = torch.arange(x.shape[1]).expand(x.shape[0], -1)
    return Tokens(x, Record(Layout(prefix, None, x.shape[1]), size=size, index=places))


def _merged(out: Tokens) -> dict[str, Tensor]:
    assert out.size is not None
    return {"merged": out.x, "size": out.size, "source": out.record.sources(out.count)}


def model(golden: Golden) -> dict[str, Tensor]:
    config = golden.config
    host = vit.build(config)
    golden.load(host)
    kinds = tuple("bipartite" if flag else "pitome" for flag in config["use_bsm_pitome"])
    method = PiToMe(
        ratio=config["ratio"],
        margin=tuple(config["margins"]),
        matching=kinds,
        prop_attn=config["prop_attn"],
    )
    transom.apply(host, method, restore="never")
    with transom.trace(host) as trace:
        tokens = host.forward_features(golden.inputs["image"])
    width, entering = config["embed_dim"], [host.pos_embed.shape[1], *trace.lengths[:-1]]
    flops = sum(4 * n * width**2 + 2 * n**2 * width + 8 * n * width**2 for n in entering)
    return {
        "logits": host.forward_head(tokens),
        "tokens": tokens,
        "flops": torch.tensor([flops]),
        **vit.sizes_and_sources(trace),
    }


KINDS = {"matching": matched, "matching_text": matched_text, "model": model}
