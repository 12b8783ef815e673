"""Sparsifiner against lim142857/Sparsifiner."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.papers.attention.sparsifiner.loss import Weights, losses
from transom.papers.attention.sparsifiner.model import Attended, SparseAttention, Sparsifiner
from transom.papers.attention.sparsifiner.predictor import Budget, MaskPredictor

from ..golden import Golden


def budget(config: dict[str, Any]) -> Budget:
    names = ("coef_topk", "coef_threshold", "basis_threshold", "score", "score_threshold")
    settings = {name: config[name] for name in (*names, "prune_rows") if name in config}
    return Budget(config["attn_keep_rate"], **settings)


def load(golden: Golden, module: nn.Module) -> None:
    """The parameters; a tied map may be there once for both places."""
    given, changes = golden.tensors("param"), {}
    for name in module.state_dict():
        if name.endswith("proj_back_n") and name not in given:
            changes[name] = given[name.replace("proj_back_n", "proj_n")]
    golden.load(module, **changes)


def mask_of(found: Attended, live: Tensor | None = None) -> Tensor:
    assert found.found.mask is not None
    return F.pad(found.found.mask, (0, 0, 1, 0), value=True)


def attention(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    reduce_n, reduce_c = c["reduce_n_factor"], c["reduce_c_factor"]
    width = c["dim"] // c["num_heads"]
    predictor = MaskPredictor(
        width, c["num_tokens"], reduce_n, reduce_c, c.get("share_inout_proj", False), budget(c)
    )
    predictor.reconstructs = c.get("attn_recon", False)
    module = SparseAttention(c["dim"], c["num_heads"], predictor, c["qkv_bias"])
    load(golden, module)
    module.train(c["mode"] == "train")
    x = golden.inputs["x"]
    live = golden.inputs.get("token_mask")
    if live is not None:
        live = F.pad(live.flatten(1).bool(), (1, 0), value=True)
    found = module.attended(x, live, class_row=True, with_maps=True)
    assert found.maps is not None
    sparse, full = found.maps
    out = {"x": found.x, "approx_attn": found.found.approx, "basis_coef": found.found.coefficients}
    out |= {"attn_mask": mask_of(found).to(x.dtype), "masked_attn": sparse, "unmasked_attn": full}
    if found.found.places is not None and not predictor.phase1:
        for path in ("gathered", "masked"):
            module.path = path  # type: ignore[assignment]
            with torch.no_grad():
                golden._close(f"path {path}", module(x), found.x.detach())
    return out


def model(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    host = Sparsifiner(
        reduce_n=c["reduce_n_factor"],
        reduce_c=c["reduce_c_factor"],
        tied=c.get("share_inout_proj", False),
        token_keep_rates=c["token_keep_rate_list"],
        pruning_layers=c["token_pruning_layers"],
        budget=budget(c),
        norm_layer=partial(nn.LayerNorm, eps=c["norm_eps"]),
        num_classes=c["num_classes"],
        **{name: c[name] for name in names},
    ).eval()
    load(golden, host)
    for module in host.modules():
        if isinstance(module, MaskPredictor):
            module.reconstructs = c.get("attn_recon", False)
    seen: dict[str, Tensor] = {}
    for i, block in enumerate(host.blocks):
        predictor, number = block.attn.mask_predictor, str(i)
        predictor.register_forward_hook(partial(_mask, seen, number))
        block.register_forward_hook(partial(_live, seen, number))
    features = host.forward_features(golden.inputs["image"])
    return {"logits": host.forward_head(features), "features": features[:, 1:], **seen}


def _mask(seen: dict[str, Tensor], number: str, module: Any, args: Any, found: Any) -> None:
    seen[f"attn_mask{number}"] = F.pad(found.mask, (0, 0, 1, 0), value=True).long()


def _live(seen: dict[str, Tensor], number: str, module: Any, args: Any, x: Tensor) -> None:
    seen[f"token_mask{number}"] = x[:, 1:].ne(0).any(-1).long()


def loss(golden: Golden) -> dict[str, Tensor]:
    given, weights = golden.inputs, golden.config["weights"]
    assert golden.config["criterion"] == "MSE"

    def several(name: str) -> list[Tensor]:
        return [given[f"{name}{i}"] for i in range(len(given)) if f"{name}{i}" in given]

    live = given.get("token_mask")
    found = losses(
        given["logits"],
        given["labels"],
        given["features"],
        given["t_logits"],
        given["t_features"],
        several("approx"),
        several("t_attn"),
        several("unmasked"),
        live=None if live is None else live.flatten(1).bool(),
        weights=Weights(**weights),
    )
    weighted = {f"{k}_loss": weights[k] * v for k, v in found.items() if k != "loss"}
    return {"loss": found["loss"], **weighted}


KINDS = {"attention": attention, "model": model, "loss": loss}
