"""VAR against seilk/VisAttnSink."""

from __future__ import annotations

import torch
from torch import Tensor

from transom.papers.lens.var import redistribute, sink_values

from ..golden import Golden


def attention(golden: Golden) -> dict[str, Tensor]:
    c, given = golden.config, golden.inputs
    x, a = given["hidden"], given["attn"]
    sinks = sink_values(x, c["sink_dims"]) > c["tau"]
    places = torch.arange(x.shape[1])
    end = c["image_start"] + c["image_len"]
    visual = ((places >= c["image_start"]) & (places < end)).expand(len(x), -1)
    decoding = a.shape[2] == 1
    rows = torch.ones(1, 1, dtype=torch.bool) if decoding else (places >= end)[None]
    # the official share of sinks is one minus the share the paper speaks of
    done = redistribute(a, sinks, visual, rows, rho=1 - c["rho"], total=c["summ"], keep=c["p"])
    return {
        "attention": done.attention,
        "selected": done.chosen.nonzero(),
        "sink_tokens": sinks[0].nonzero()[:, 0],
    }


KINDS = {"attention": attention}
