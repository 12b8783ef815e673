"""ViT-ResNAS against yilunliao/vit-search."""

from __future__ import annotations

import torch
from torch import Tensor

from transom.papers.compression.vit_resnas import (
    Definition,
    MaskedLayerNorm,
    ReduceDef,
    Space,
    SpatialReduction,
    SuperNet,
    ViTResNAS,
)
from transom.papers.compression.vit_resnas.layers import Kept
from transom.papers.compression.vit_resnas.masks import sliced_state, sorted_block
from transom.papers.compression.vit_resnas.supernet import chained

from ..golden import Golden


def reduction(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    grid = c["grid"] if isinstance(c["grid"], list) else [c["grid"]] * 2
    tokens, patch = c.get("class_tokens", 1), c.get("patch", 2)
    module = SpatialReduction(tuple(grid), c["in_dim"], c["out_dim"], tokens, patch)
    golden.load(module)
    return {"y": module(golden.inputs["x"], tuple(grid))}


def norm(golden: Golden) -> dict[str, Tensor]:
    module = MaskedLayerNorm(golden.config["dim"], golden.config.get("eps", 1e-6))
    golden.load(module)
    return {"y": module(golden.inputs["x"], golden.inputs["mask"].bool())}


def weights(golden: Golden) -> dict[str, Tensor]:
    c, state = golden.config, golden.tensors("param")
    state |= sorted_block(state, c["heads"])
    inner, dim, ffn = c["keep_heads"] * c["head_dim"], c["keep_dim"], c["keep_ffn"]
    shapes = {
        "attn.qkv.weight": (3 * inner, dim),
        "attn.qkv.bias": (3 * inner,),
        "attn.proj.weight": (dim, inner),
        "attn.proj.bias": (dim,),
        "mlp.fc1.weight": (ffn, dim),
        "mlp.fc1.bias": (ffn,),
        "mlp.fc2.weight": (dim, ffn),
        "mlp.fc2.bias": (dim,),
    }
    cut = sliced_state(state, shapes)
    return {f"sorted.{n}": t for n, t in state.items()} | {f"sliced.{n}": t for n, t in cut.items()}


def model(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    size = {"img_size": c["image"], "patch_size": c.get("patch", 14)}
    size["distilled"] = c.get("distill_token", False)
    if "options" in c:
        return _supernet(golden, size)
    net = ViTResNAS(c["network_def"], patch_output=c.get("patch_output", False), **size).eval()
    golden.load(net)
    features = net.forward_features(golden.inputs["image"])
    out = {"logits": net.cls_head(features[:, 0])}
    if net.dst_head is not None:
        out["distill_logits"] = net.dst_head(features[:, 1])
    return out


def _supernet(golden: Golden, size: dict[str, int]) -> dict[str, Tensor]:
    c, image = golden.config, golden.inputs["image"]
    net = SuperNet(Space.parse(c["network_def"], c["options"]), **size).eval()
    golden.load(net)
    kept = _kept(net.definition, c["kept"], image.shape[0])
    logits = net(image, kept)
    if "equal_to_subnetwork" in c:
        definition = _definition(net.definition, kept)
        expected = Definition.parse(c["equal_to_subnetwork"])
        assert definition.present() == expected.present()
        alone = net.subnetwork(definition)
        torch.testing.assert_close(alone(image), logits, rtol=0, atol=1e-10)
    return {"logits": logits}


def _kept(definition: Definition, points: list[list], batch: int) -> list[Kept]:
    """Official names of masking points with what is kept there, as ours."""
    found = {name: torch.full((batch,), count) for name, count in points}
    kept = [Kept(found.get("embed_channel_drop"))]
    for i, layer in enumerate(definition.layers):
        if isinstance(layer, ReduceDef):
            kept.append(Kept(found.get(f"blocks.{i}.channel_drop")))
            continue
        stays = found.get(f"blocks.{i}.layer_drop")
        heads = found.get(f"blocks.{i}.attn.channel_drop_layer")
        hidden = found.get(f"blocks.{i}.mlp.channel_drop_layer")
        kept.append(Kept(None, heads, hidden, stays))
    return chained(kept)


def _definition(largest: Definition, kept: list[Kept]) -> Definition:
    """What the first image keeps, as a definition."""

    def first(value: Tensor | None, otherwise: int) -> int:
        return otherwise if value is None else int(value[0])

    dim = first(kept[0].dim, largest.embed.dim)
    layers, width = [], dim
    for layer, now in zip(largest.layers, kept[1:], strict=True):
        if isinstance(layer, ReduceDef):
            layers.append(ReduceDef(width, first(now.dim, layer.out)))
            width = layers[-1].out
        else:
            heads = first(now.heads, layer.heads * layer.head_dim) // layer.head_dim
            hidden, stays = first(now.hidden, layer.hidden), bool(first(now.stays, 1))
            layers.append(layer._replace(dim=width, heads=heads, hidden=hidden, exists=stays))
    return Definition(largest.embed._replace(dim=dim), tuple(layers), largest.classes)


def count(golden: Golden) -> dict[str, Tensor]:
    found = {}
    for name, c in golden.config.items():
        definition = Definition.parse(c["network_def"])
        macs = definition.macs(c.get("image", 224), c["patch"], distilled=c["distill"])
        found[f"mac_{name}"] = torch.tensor(macs)
    return found


KINDS = {
    "token-step": reduction,
    "norm": norm,
    "weights": weights,
    "model": model,
    "count": count,
}
