"""ComplexFormer against shaojintian/complexFormer."""

from __future__ import annotations

from torch import Tensor

from transom.papers.attention.complexformer import ComplexAttention, Frequencies

from ..golden import Golden


def _run(golden: Golden, frequencies: Frequencies) -> dict[str, Tensor]:
    c, given = golden.config, golden.inputs
    module = ComplexAttention(
        c["d_model"],
        c["num_heads"],
        frequencies=frequencies,
        rope_base=c.get("rope_base", 10000),
        magnitude_eps=c.get("magnitude_eps", 1e-9),
    )
    golden.load(module)
    past = (given["past_key"], given["past_value"]) if "past_key" in given else None
    y, weights, (key, value) = module(given["x"], given.get("mask"), past, need_weights=True)
    assert weights is not None
    fused = module(given["x"], given.get("mask"), past)[0]
    assert (fused - y).abs().max() < 1e-9, "fused attention is not the written-out one"
    return {"y": y, "weights": weights, "present_key": key, "present_value": value}


def attention(golden: Golden) -> dict[str, Tensor]:
    return _run(golden, "exact")


def rounded(golden: Golden) -> dict[str, Tensor]:
    return _run(golden, "bfloat16")


KINDS = {"attention": attention, "attention-bf16freq": rounded}
