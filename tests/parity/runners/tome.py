"""ToMe against facebookresearch/ToMe."""

from __future__ import annotations

import torch
from timm.layers import Attention
from torch import Tensor

import transom
from transom.hosts.timm_attention import answer_for
from transom.ops import attention, matching, merging
from transom.papers.tokens.tome import ToMe
from transom.slots import Ask
from transom.tokens import Layout, Record, Tokens

from ..golden import Golden
from . import vit


def matched(golden: Golden) -> dict[str, Tensor]:
    x, metric, config = golden.inputs["x"], golden.inputs["metric"], golden.config
    if "k" in config:
        found = matching.every_kth(metric, config["k"])
        count = x.shape[1] - x.shape[1] % config["k"]
        merged = merging.merge(x, found)
        return {"merged": merged, "unmerged": merging.spread(merged, found.target(count))}
    prefix = int(config["class_token"]) + int(config["distill_token"])
    found = matching.bipartite(metric, config["r"], prefix)
    target = found.target(x.shape[1])
    places = torch.arange(x.shape[1]).expand(x.shape[0], -1)
    record = Record(Layout(prefix, None, x.shape[1]), index=places)
    weighted = Record(record.layout, size=golden.inputs["size"], index=places)
    out = Tokens(x, weighted).merge(found)
    mean = merging.merge(x, found)
    assert out.size is not None
    return {
        "merged": out.x,
        "size": out.size,
        "source": out.record.sources(out.count),
        "merged_nosize": Tokens(x, record).merge(found).x,
        "mean": mean,
        "unmerged": merging.spread(out.x, target),
    }


def attended(golden: Golden) -> dict[str, Tensor]:
    config = golden.config
    module = Attention(config["dim"], config["num_heads"], qkv_bias=config["qkv_bias"]).eval()
    golden.load(module)
    size = golden.inputs.get("size")
    x = golden.inputs["x"]
    ask = Ask(attention.key_bias(size, None, x.dtype), keep=True)
    y = answer_for(module, "attention")(x, transom=ask)
    assert ask.k is not None
    return {"y": y, "metric": ask.k.mean(1)}


def model(golden: Golden) -> dict[str, Tensor]:
    config = golden.config
    host = vit.build(config)
    golden.load(host)
    r = tuple(config["r_per_layer"])
    given = config["r"]
    if isinstance(given, int):
        made = ToMe(r=given)
    elif len(given) == 2 and isinstance(given[1], float):
        made = ToMe(r=given[0], inflect=given[1])
    else:
        made = ToMe(r=tuple(given))
    assert tuple(made.per_block(config["depth"])) == r
    transom.apply(
        host, ToMe(r=made.r, inflect=made.inflect, prop_attn=config["prop_attn"]), restore="never"
    )
    with transom.trace(host) as trace:
        tokens = host.forward_features(golden.inputs["image"])
    logits = host.forward_head(tokens)
    return {"logits": logits, "tokens": tokens, **vit.sizes_and_sources(trace)}


KINDS = {"matching": matched, "attention": attended, "model": model}
