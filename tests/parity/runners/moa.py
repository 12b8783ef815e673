"""MoA against thu-nics/MoA."""

from __future__ import annotations

import torch
from torch import Tensor

from transom.ops import reference
from transom.papers.attention.moa.cache import RaggedCache
from transom.papers.attention.moa.influence import block_sums, influence
from transom.papers.attention.moa.spans import Cut, Plan, density, layout, lost, rules
from transom.papers.attention.moa.window import window_mask, windowed

from ..golden import Golden


def effect(golden: Golden) -> dict[str, Tensor]:
    c, given = golden.config, golden.inputs
    signed = torch.stack(
        [
            influence(*(given[f"{name}{i}"] for name in ("q", "k", "v", "grad_out")))
            for i in range(c["layers"])
        ],
        1,
    )
    blocks = block_sums(signed, c["aggregating_block_size"])
    return {"influence_signed": signed, "influence_blocks_abs": blocks}


def span_search(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    found = rules(
        c["alphas"],
        c["betas"],
        c["max_profile_length"],
        c["max_token_length"],
        c["min_token_length"],
    )
    causal, block, length = c["is_causal"], c["block_size"], c["length"]
    kept = torch.stack([layout(rule, length, block, causal) for rule in found])
    importance = golden.inputs["importance"]
    cost = (density(kept) * length).double().expand(len(importance), -1)
    return {
        "alpha": torch.tensor([rule.alpha for rule in found]),
        "beta": torch.tensor([rule.beta for rule in found]),
        "layout": kept.long(),
        "loss": lost(importance, kept, causal),
        "latency": cost,
    }


def cache_config(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    plan = Plan(c["alphas"], c["betas"])
    cut = Cut(c["split_size"], c["sink_size"], c["minimum_cache_size"], c["max_new_token"])
    out = {"permutation": torch.tensor([plan.order(i) for i in range(plan.shape[0])])}
    for length in golden.inputs["seq_len"].tolist():
        out[f"cache_{length}"] = plan.sizes(length, cut)
        out[f"sink_{length}"] = plan.sinks(length, cut)
    return out


def cache_update(golden: Golden) -> dict[str, Tensor]:
    c, given = golden.config, golden.inputs
    cache = RaggedCache(c["cache_size"], c["static_size"], given["k0"])
    real = given.get("mask")
    with torch.no_grad():
        cache.write(given["k0"], given["v0"], None if real is None else real.bool())
        out = {"k_prefill": cache.k.clone(), "v_prefill": cache.v.clone()}
        out["valid_prefill"] = cache.valid
        for i in range(c["decode_steps"]):
            cache.write(given[f"dk{i}"], given[f"dv{i}"])
    out |= {"k_final": cache.k, "v_final": cache.v, "valid_final": cache.valid}
    return {**out, "next_slot": cache.next_slot, "slots": torch.tensor(cache.offsets)}


def attention(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    q, k, v = (golden.inputs[name] for name in "qkv")
    local, block = c["local_blocks"], c["block_size"]
    sinks = [c["sink_blocks"]] * len(local)
    mask = window_mask(torch.arange(c["tokens"]), local, sinks, block)
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    y = windowed(q, k, v, local, sinks, block)
    plain = reference.attention(q, k, v, bias, q.shape[-1] ** -0.5)
    golden._close("windows block by block", y.detach(), plain.detach())
    return {"mask": mask.long(), "y": y}


KINDS = {
    "influence": effect,
    "span_search": span_search,
    "cache_config": cache_config,
    "cache_update": cache_update,
    "attention": attention,
}
