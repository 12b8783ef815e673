"""CrossGET against sdc17/CrossGET.

The official code sorts in float32 with torch's unstable sort. Mutual best partners tie there in
every call, so cases are matched in float32 and with the same sort (stable=False).
"""

from __future__ import annotations

import torch
from torch import Tensor

from transom.ops import matching, merging
from transom.papers.tokens.crossget import towers

from ..golden import Golden


def matched(golden: Golden) -> dict[str, Tensor]:
    config = golden.config
    given = dict(golden.inputs)
    x, size = given["x"], given["size"].detach()
    key, query = given["key"].detach().float(), given["query"].detach().float()
    ids = given["token_id"].detach() if config["eot_protected"] else None
    end = None if ids is None else ids.argmax(-1)
    guide = query[:, -1:] if end is None else query[torch.arange(len(query)), end][:, None]
    held = int(config["class_token"])
    reserved = matching.Reserved(held, held, end)
    importance = matching.guided_importance(key, guide)
    found = matching.complete(key, config["r"], importance, reserved, stable=False)
    graph = matching.complete_graph(key, reserved.mask(*key.shape[:2], key.device))
    order = matching.complete_order(graph, importance, stable=False)
    pool = order[:, found.source.shape[1] :]
    into = found.keep.gather(1, found.into)
    shares = matching.guided_shares(found, importance)
    out = {
        "merged": merging.ensemble(x, found, shares, size),
        "size": merging.merged_size(size, found, size.dtype),
        "src_idx": found.source,
        "dst_all_idx": pool,
        "dst_idx": (pool[:, None] == into[..., None]).int().argmax(-1),
        "weight": shares,
    }
    if ids is not None:
        out["token_id"] = merging.merge(ids[..., None], found, "mean", size)[..., 0]
    return out


def vision(golden: Golden) -> dict[str, Tensor]:
    names = ("input_resolution", "patch_size", "width", "layers", "heads", "output_dim", "r")
    config = golden.config
    settings = {name: config[name] for name in names}
    host = towers.CrossVision(**settings, norm_eps=config.get("norm_eps", 1e-5), stable=False)
    golden.load(host.train(config["mode"] == "train"))
    return _outputs(host(golden.inputs["image"]))


def text(golden: Golden) -> dict[str, Tensor]:
    names = ("context_length", "vocab", "width", "layers", "heads", "embed_dim")
    config = golden.config
    settings = {name: config[name] for name in names}
    host = towers.CrossText(
        **settings, r=config["rl"], norm_eps=config.get("norm_eps", 1e-5), stable=False
    )
    golden.load(host.train(config["mode"] == "train"))
    return _outputs(host(golden.inputs["text"]))


def _outputs(encoded: towers.Encoded) -> dict[str, Tensor]:
    out = {"feature": encoded.feature, "size": encoded.size}
    return out if encoded.cross is None else {**out, "cross": encoded.cross}


def loss(golden: Golden) -> dict[str, Tensor]:
    return {
        "loss": towers.alignment_loss(golden.inputs["image_cross"], golden.inputs["text_cross"])
    }


KINDS = {"matching": matched, "model": vision, "model_text": text, "loss": loss}
