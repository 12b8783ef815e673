"""ILLaMA against techmonsterwang/iLLaMA."""

from __future__ import annotations

from torch import Tensor

from transom.papers.attention.illama import (
    ILLaMA,
    drop_schedule,
    selected,
    soft_mask_schedule,
)
from transom.papers.attention.illama.attention import rotary
from transom.papers.attention.illama.model import Attention

from ..golden import Golden


def attended(golden: Golden) -> dict[str, Tensor]:
    c, x = golden.config, golden.inputs["x"]
    module = Attention(c["dim"], c["num_heads"], c["qkv_bias"]).eval()
    golden.load(module)
    table = rotary(x.shape[1], c["dim"] // c["num_heads"], c["rope_base"], x)
    return {"y": module(x, table, c["soft_mask_rate"])}


def model(golden: Golden) -> dict[str, Tensor]:
    names = (
        *("img_size", "patch_size", "embed_dim", "num_heads", "depth", "mlp_ratio", "multiple_of"),
        *("qkv_bias", "rms_eps", "soft_mask_rate", "num_classes", "rope_base", "in_chans"),
    )
    c = golden.config
    host = ILLaMA(**{name: c[name] for name in names if name in c}).eval()
    golden.load(host)
    features = host.forward_features(golden.inputs["image"])
    return {"feature": features[:, -1], "logits": host.forward_head(features)}


def schedule(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    lengths = c["epochs"], c["iters_per_epoch"], c["cutoff_epoch"]
    # the cases do not name the rates of dropout: these are the ones they were made with
    dropped, standard = c.get("drop_rate", 0.2), c.get("standard_rate", 0.25)
    return {
        "soft_mask": soft_mask_schedule(c["rate"], *lengths, c["schedule"]),
        "early_drop": drop_schedule(dropped, *lengths, "early", c["schedule"]),
        "late_drop": drop_schedule(dropped, *lengths, "late"),
        "standard": drop_schedule(standard, *lengths, "standard"),
    }


def selection(golden: Golden) -> dict[str, Tensor]:
    return {"selected": selected(golden.inputs["weight"], golden.config["student_shape"])}


KINDS = {
    "attention": attended,
    "model": model,
    "schedule": schedule,
    "weight_selection": selection,
}
