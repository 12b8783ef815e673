"""DyVTE against DoubtedSteam/DyVTE."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import transom
from transom.papers.tokens.dyvte import (
    DyVTE,
    Router,
    exit_layers,
    paired_forward,
    router_loss,
)

from ..golden import Golden


def decoder(golden: Golden) -> LlamaForCausalLM:
    c, params = golden.config, golden.tensors("param")
    config = LlamaConfig(
        vocab_size=len(params["lm_head.weight"]) if "lm_head.weight" in params else 8,
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_hidden_layers=c["layers"],
        num_attention_heads=c["heads"],
        num_key_value_heads=c["heads"],
        rms_norm_eps=c.get("rms_eps", 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": float(c.get("rope_base", 10000))},
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).double().eval()


def load(golden: Golden, model: LlamaForCausalLM, routers: nn.ModuleList) -> None:
    """Put the parameters in their places; the routers hang where the official code has them."""
    holder = nn.Module()
    holder.model, holder.lm_head = model.model, model.lm_head
    holder.model.visual_gates_router = routers
    state = golden.tensors("param")
    missing, unknown = holder.double().load_state_dict(state, strict=False)
    assert not unknown
    assert all("embed_tokens" in name or name == "lm_head.weight" for name in missing)
    del model.model.visual_gates_router
    golden.loaded = model


def picture(golden: Golden, batch: int, count: int) -> Tensor:
    c = golden.config
    visual = torch.zeros(batch, count, dtype=torch.bool)
    visual[:, c["image_start"] : c["image_start"] + c["num_image_tokens"]] = True
    return visual


def model(golden: Golden) -> dict[str, Tensor]:
    host, given = decoder(golden), golden.inputs
    depth, width = golden.config["layers"], golden.config["router_hidden"]
    routers = nn.ModuleList(Router(golden.config["hidden_size"], width) for _ in range(depth))
    load(golden, host, routers)
    transom.apply(host, DyVTE(width=width), check=False)
    fills = transom.fittings(host)[0].fills
    for router, fill in zip(routers, fills, strict=True):
        if fill.after is not None:
            fill.after.router = router
    visual = picture(golden, *given["embeds"].shape[:2])
    with transom.trace(host) as trace:
        out = host.model(inputs_embeds=given["embeds"], use_cache=True, transom_visual=visual)
    (layer,) = exit_layers(trace, visual)
    found = {
        "hidden": out.last_hidden_state,
        "exit_layer": torch.tensor([-1 if layer is None else layer]),
    }
    cache = out.past_key_values
    gates = [m["gate"] for m in cache._transom.values() if "gate" in m]
    found["gate_logits"] = torch.cat(gates)
    found["logits"] = host.lm_head(out.last_hidden_state)[:, -1]
    step = 0
    while f"next{step}" in given:
        found[f"decode{step}"] = host.model(
            inputs_embeds=given[f"next{step}"], past_key_values=cache, use_cache=True
        ).last_hidden_state
        step += 1
    found["cache_lengths"] = torch.tensor([cache.get_seq_length(i) for i in range(depth)])
    return found


def training_forward(golden: Golden) -> dict[str, Tensor]:
    host, c, given = decoder(golden), golden.config, golden.inputs
    routers = nn.ModuleList(
        Router(c["hidden_size"], c["router_hidden"]) for _ in range(c["layers"])
    )
    load(golden, host, routers)
    mask = given["mask"]
    visual = picture(golden, *mask.shape)
    last = mask.sum(1) - given["answer_lengths"] - 1
    layer = c["exit_layer"]
    full, without, gate = paired_forward(
        host.model,
        routers[layer],
        layer,
        visual,
        last,
        inputs_embeds=given["embeds"],
        attention_mask=mask,
        use_cache=False,
        transom_visual=visual,
    )
    hidden = torch.cat([full.last_hidden_state, without.last_hidden_state])
    return {"gate_logits": gate, "hidden": hidden}


def loss(golden: Golden) -> dict[str, Tensor]:
    given, (agree, worse) = golden.inputs, golden.config["thresholds"]
    got = router_loss(
        given["gate_logits"], given["ori_logits"], given["logits"], given["labels"], agree, worse, 0
    )
    return {
        "gate_labels": got.labels,
        "loss": got.loss,
        "loss_full": got.full,
        "loss_noimage": got.without,
    }


KINDS = {"model": model, "training_forward": training_forward, "loss": loss}
