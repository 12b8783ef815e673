"""T2T-ViT against yitu-opensource/T2T-ViT."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import Tensor, nn

from transom.ops.tokens_to_token import TokenPerformer, TokensToToken, TokenTransformer
from transom.papers.tokens.t2t_vit import T2TViT, convert

from ..golden import Golden


def norm(golden: Golden) -> Any:
    return partial(nn.LayerNorm, eps=golden.config.get("norm_eps", 1e-5))


def token_transformer(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    module = TokenTransformer(c["dim"], c["in_dim"], norm(golden)).eval()
    golden.load(module)
    return {"y": module(golden.inputs["x"])}


def token_performer(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    module = TokenPerformer(c["dim"], c["in_dim"], norm(golden), c["kernel_ratio"]).eval()
    golden.load(module)
    return {"y": module(golden.inputs["x"])}


def tokenizer(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    module = TokensToToken(
        c["img_size"],
        math.prod(s for _, s, _ in c["soft_splits"]),
        c["in_chans"],
        c["embed_dim"],
        c["token_dim"],
        norm(golden),
        c["tokens_type"],
        c["soft_splits"],
    ).eval()
    golden.load(module)
    return {"tokens": module(golden.inputs["image"])}


def model(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    network = T2TViT(
        c["tokens_type"],
        c["token_dim"],
        img_size=c["img_size"],
        embed_dim=c["embed_dim"],
        depth=c["depth"],
        num_heads=c["num_heads"],
        mlp_ratio=c["mlp_ratio"],
        qkv_bias=c["qkv_bias"],
        num_classes=c["num_classes"],
        norm_layer=norm(golden),
    ).eval()
    if c["qk_scale"] is not None:
        for block in network.blocks:
            block.attn.scale = c["qk_scale"]
    network.double().load_state_dict(convert(golden.tensors("param")), strict=True)
    golden.loaded = network
    features = network.forward_features(golden.inputs["image"])
    return {"feature": features[:, 0], "logits": network.forward_head(features)}


KINDS = {
    "token_transformer": token_transformer,
    "token_performer": token_performer,
    "tokenizer": tokenizer,
    "model": model,
}
