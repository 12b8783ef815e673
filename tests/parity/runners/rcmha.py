"""RCMHA against hermansh-id/rcmha."""

from __future__ import annotations

from torch import Tensor

from transom.papers.attention.rcmha import RelativeConvolutionalAttention, RelativeLanguageModel

from ..golden import Golden


def attention(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    module = RelativeConvolutionalAttention(
        c["heads"], c["d_model"], c["P"], c.get("kernel_size", 3)
    )
    golden.load(module)
    given = golden.inputs
    return {"y": module(given["x"], given.get("mem"), given.get("mask"))}


def model(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    module = RelativeLanguageModel(
        c["n_vocab"],
        c["d_model"],
        c["heads"],
        c["d_ff"],
        c["n_layers"],
        c["P"],
        c.get("kernel_size", 3),
    )
    golden.load(module)
    logits, memory = module(golden.inputs["ids"], golden.inputs.get("mem"))
    return {"logits": logits, "new_mem": memory}


KINDS = {"attention": attention, "model": model}
