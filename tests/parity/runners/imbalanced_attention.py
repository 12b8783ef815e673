"""Imbalanced attention against hasanar1f/llava-hallunication-fix."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from transom.instrumented import Instrumented
from transom.papers.lens.imbalanced_attention import (
    Emphasise,
    ImbalancedAttention,
    amplified,
    select,
)
from transom.slots import Ask

from ..golden import Golden


def attention(golden: Golden) -> dict[str, Tensor]:
    c, x = golden.config, golden.inputs["x"]
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    module = nn.ModuleDict({n: nn.Linear(c["hidden"], c["hidden"], bias=c["bias"]) for n in names})
    golden.load(module)
    count, width = x.shape[1], c["head_dim"]
    q, k, v = (
        module[n](x).unflatten(-1, (c["num_heads"], width)).transpose(1, 2) for n in names[:3]
    )
    turns = c["rope_base"] ** -(torch.arange(0, width, 2).double() / width)
    angles = torch.arange(count)[:, None] * turns
    table = torch.cat([angles, angles], -1)[None]
    q, k = apply_rotary_pos_emb(q, k, table.cos(), table.sin())
    causal = torch.full((count, count), -torch.inf).double().triu(1)[None, None]
    method = ImbalancedAttention(
        local=tuple(c["top_tokens"]),
        summary=tuple(c["bottom_tokens"]),
        alpha=c["alpha"],
        beta=c["beta"],
    )
    visual = torch.zeros(len(x), count, dtype=torch.bool)
    visual[:, c["image_start"] : c["image_start"] + c["image_len"]] = True
    emphasis = Emphasise(method)
    operator = Instrumented(last=emphasis)
    out = operator(q, k, v, bias=causal, scale=width**-0.5, ask=Ask(visual=visual))
    rises = emphasis._rises(visual, q.dtype)
    logits = (q @ k.mT) * width**-0.5 + causal
    weights = torch.cat([logits[:, :, :-1], amplified(logits[:, :, -1:], rises)], 2).softmax(-1)
    return {"y": module["o_proj"](out.transpose(1, 2).flatten(2)), "attention": weights}


def token_selection(golden: Golden) -> dict[str, Tensor]:
    c, maps = golden.config, golden.inputs["vit_attn"]
    rows = [maps[i, 0, :, 0, 1:].sum(0) for i in (c["first_layer"], c["summary_layer"])]
    found = select(rows[0], rows[1], c["local_token_ratio"])
    return {"top": torch.tensor(found.local), "bottom": torch.tensor(found.summary)}


KINDS = {"attention": attention, "token-selection": token_selection}
