"""DPN against a transcription of aihao2000/DPN-LLaVA."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import transom
from transom.papers.tokens.dpn import DPN, TEMPERATURE, Router, pool, routing_loss, summary

from ..golden import Golden


def expanded(ids: Tensor, visual: Tensor) -> Tensor:
    """Ids for every token of the hidden sequence; the image stands for one of them."""
    rows = []
    for words, seen in zip(ids, visual.bool(), strict=True):
        start, count = int(seen.nonzero()[0]), int(seen.sum())
        image = words[start].expand(count)
        rows.append(torch.cat([words[:start], image, words[start + 1 :]]))
    return torch.stack(rows)


def router(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    module = Router(c["hidden_size"], c["num_experts"])
    golden.load(module)
    logits = module(golden.inputs["router_token"])
    return {"logits": logits, "probs": (logits / c["temperature"]).softmax(-1)}


def pooling(golden: Golden) -> dict[str, Tensor]:
    c, given = golden.config, golden.inputs
    module = Router(c["hidden_size"], len(c["strides"]))
    golden.load(module)
    h, visual = given["hidden"], given["vision_mask"].bool()
    words = expanded(given["input_ids"], visual)
    probs = (module(summary(h, words == c["router_token_id"])) / TEMPERATURE).softmax(-1)
    drawn = c["drawn_expert"]
    expert = probs.argmax(-1) if drawn is None else torch.tensor(drawn)
    rows, sizes, masks = [], [], []
    for b, index in enumerate(expert.tolist()):
        image = visual[b].nonzero()[:, 0]
        start, end = int(image[0]), int(image[-1]) + 1
        size = (c["grid"], c["grid"])
        done = pool(h[b, image], size, c["strides"][index], c["pooling_function"])
        row = torch.cat([h[b, :start], done.x * probs[b, index], h[b, end:]])
        if c["mode"] == "train":
            row = torch.cat([row, row.new_zeros(h.shape[1] - len(row), h.shape[2])])
        rows.append(row)
        sizes.append(done.size)
        mask = visual[b].clone()
        mask[start + len(done.x) :] = False
        masks.append(mask)
    return {
        "hidden": torch.stack(rows),
        "probs": probs,
        "expert": expert,
        "map_shape": torch.tensor(sizes),
        "vision_mask": torch.stack(masks).long(),
    }


def model(golden: Golden) -> dict[str, Tensor]:
    c, given = golden.config, golden.inputs
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_hidden_layers=c["layers"],
        num_attention_heads=c["heads"],
        num_key_value_heads=c["heads"],
        rms_norm_eps=c["rms_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": float(c["rope_base"])},
    )
    host = LlamaForCausalLM(config).double().eval().model
    state = golden.tensors("param")
    plain = {k: v for k, v in state.items() if "pooling_router" not in k}
    missing, unknown = host.load_state_dict(plain, strict=False)
    assert missing == ["embed_tokens.weight"]
    assert not unknown
    layers = tuple(int(i) for i in c["pooling_layers"])
    strides = tuple(tuple(map(tuple, s)) for s in c["pooling_layers"].values())
    method = DPN(layers=layers, strides=strides, router_token=c["router_token_id"])
    transom.apply(host, method, check=False)
    fills = transom.fittings(host)[0].fills
    for i in layers:
        prefix = f"layers.{i}.pooling_router."
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        step = fills[i].after
        assert isinstance(step, nn.Module)
        step.router.load_state_dict(own)
    golden.loaded = host
    visual = given["vision_mask"].bool()
    out = host(
        inputs_embeds=given["embeds"],
        use_cache=True,
        transom_visual=visual,
        transom_words=expanded(given["input_ids"], visual),
    )
    cache = out.past_key_values
    probs = [cache._transom[i]["probs"] for i in layers]
    step = host(inputs_embeds=given["next"], past_key_values=cache, use_cache=True)
    return {
        "hidden": out.last_hidden_state,
        "decode": step.last_hidden_state,
        "experts": torch.cat([p.argmax(-1) for p in probs]),
        "cache_lengths": torch.tensor([cache.get_seq_length(i) for i in range(c["layers"])]),
    }


def loss(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    probs = [golden.inputs[f"probs{i}"] for i in range(len(c["experts"]))]
    return {
        "loss_as_released": routing_loss(probs, c["scales"], c["margin"]),
        "loss_per_layer": routing_loss(probs, c["scales"], c["margin"], shared=False),
    }


KINDS = {"router": router, "pooling": pooling, "model": model, "loss": loss}
