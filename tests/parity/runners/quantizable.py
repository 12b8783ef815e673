"""Quantizable transformers against Qualcomm-AI-research/outlier-free-transformers."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from transom.papers.compression.quantizable.attention import (
    Predictor,
    QuantizableAttention,
    clipped_softmax,
)
from transom.papers.compression.quantizable.outliers import infinity_norm, kurtosis
from transom.papers.compression.quantizable.quantizers import ErrorRange, RunningRange, grid, span

from ..golden import Golden


def operator(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    probs = clipped_softmax(golden.inputs["scores"], c["gamma"], c["zeta"], c.get("dim", -1))
    return {"probs": probs}


def attention(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    opt = any(name.startswith("q_proj") for name in golden.tensors("param"))
    made = QuantizableAttention(
        c["dim"],
        c["heads"],
        "opt" if opt else "bert",
        gamma=c.get("gamma", 0.0),
        zeta=c.get("zeta", 1.0),
        alpha=c.get("alpha"),
        max_length=c.get("max_seq_length"),
        gate=c["gate"],
        predictor=_predictor(c.get("gate_module", "linear")),
        init=c.get("gate_init") or 0.5,
        finetune=bool(c.get("fine_tuning", False)),
    )
    golden.load(made)
    out, probs, gate = made(golden.inputs["hidden_states"], golden.inputs.get("attention_mask"))
    found = {"out" if opt else "context": out, "probs": probs}
    if gate is not None:
        shape = golden.tensors("output").get("gate", gate).shape
        found["gate"] = gate.reshape(shape) if gate.numel() == shape.numel() else gate
    return found


def _predictor(words: str) -> Predictor:
    if "all" in words:
        return "all"
    if "mlp" not in words:
        return "linear"
    return (
        "mlp2" if "mlp2" in words or ("hidden=head_dim" in words and "//" not in words) else "mlp"
    )


def quantizer(golden: Golden) -> dict[str, Tensor]:
    bits: Any = golden.config["bits"]
    weight = golden.inputs["weight"]
    made = grid(*span(weight), bits, symmetric=True)
    channels = grid(*span(weight, 0), bits, symmetric=True)
    search = ErrorRange(bits, candidates=int(_number(golden.config["weight"], "candidates", 100)))
    search.see(weight)
    low, high = search.seen
    found = grid(torch.tensor(low).double(), torch.tensor(high).double(), bits, symmetric=True)
    running = RunningRange(_number(golden.config["activation"], "momentum", 0.9))
    acts = [golden.inputs[name] for name in sorted(golden.inputs) if name.startswith("act")]
    for act in acts:
        running.see(act)
    act_min, act_max = running.seen
    act = grid(act_min, act_max, bits)
    return {
        "weight_q": made(weight),
        "weight_int": made.codes(weight),
        "weight_scale": made.scale,
        "weight_q_perchannel": channels(weight),
        "weight_q_mse": found(weight),
        "weight_mse_max": torch.tensor(high),
        "act_min": act_min,
        "act_max": act_max,
        "act_scale": act.scale,
        "act_zero_point": act.zero,
        "act_int": act.codes(acts[-1]),
        "act_q": act(acts[-1]),
        "kurtosis": kurtosis(acts[0]),
        "inf_norm": infinity_norm(acts[0]),
    }


def _number(words: str, name: str, usual: float) -> float:
    found = re.search(rf"{name} ([\d.]*\d)|(\d+) {name}", words)
    return float(found[1] or found[2]) if found else usual


KINDS = {"operator": operator, "attention": attention, "quantizer": quantizer}
