"""SLAB against xinghaochen/SLAB."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from transom.fold import fold as folded
from transom.papers.attention.slab.attention import SimplifiedLinearAttention
from transom.papers.attention.slab.deit import SlabDeiT
from transom.papers.attention.slab.norm import PRepBN, RepBN
from transom.papers.attention.slab.swin import SwinBlock

from ..golden import Golden


def attention(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    module = SimplifiedLinearAttention(
        c["dim"],
        tuple(c["window_size"]),
        c["num_heads"],
        c["qkv_bias"],
        kernel_size=c["kernel_size"],
        eps=c.get("eps", 1e-6),
    )
    golden.load(module)
    return {"y": module(golden.inputs["x"])}


def norm(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    module = PRepBN(
        nn.LayerNorm(c["dim"], c["ln_eps"]),
        RepBN(c["dim"], c["bn_eps"], c["bn_momentum"]),
        warm=c["warm"],
        total_step=c["total_step"],
        r0=c["r0"],
    )
    golden.load(module)
    y = module.train(c["mode"] == "train")(golden.inputs["x"])
    bn = module.norm2.bn
    return {
        "y": y,
        "running_mean": bn.running_mean,
        "running_var": bn.running_var,
        "warm_after": module.warm.reshape(1),
        "iter_after": module.iter.reshape(1),
    }


def fold(golden: Golden) -> dict[str, Tensor]:
    c, x = golden.config, golden.inputs["x"]
    size = (c["window"], c["window"])
    block = SwinBlock(
        c["dim"],
        size,
        c["num_heads"],
        size,
        mlp_ratio=c["mlp_ratio"],
        norm_layer=partial(RepBN, eps=c["bn_eps"]),
    ).eval()
    golden.load(block)
    torch.testing.assert_close(block(x), golden.tensors("output")["y"], rtol=1e-4, atol=1e-5)
    new = folded(block, example=x.detach())
    assert not any(isinstance(module, RepBN) for module in new.modules())
    return {
        "qkv_weight": new.attn.qkv.weight,
        "qkv_bias": new.attn.qkv.bias,
        "fc1_weight": new.mlp.fc1.weight,
        "fc1_bias": new.mlp.fc1.bias,
        "y": new(x),
    }


def model(golden: Golden) -> dict[str, Tensor]:
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    c = golden.config
    network = SlabDeiT(**{n: c[n] for n in names}, num_classes=c["num_classes"]).eval()
    golden.load(network)
    return {"logits": network(golden.inputs["x"])}


KINDS = {"attention": attention, "norm": norm, "fold": fold, "model": model}
