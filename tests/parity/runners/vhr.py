"""VHR against a third-party port."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transom.instrumented import Instrumented
from transom.papers.lens.vhr import Reinforce, divergence

from ..golden import Golden


def head_intervention(golden: Golden) -> dict[str, Tensor]:
    c, given = golden.config, golden.inputs
    seeing, blind = given["heads_with_image"], given["heads_without_image"]
    width = c["num_heads"] * c["head_dim"]
    projections = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(c["layers"]))
    golden.load(projections)
    found = divergence(seeing[:, 0, -1], blind[:, 0, -1], outliers=False)
    outs = []
    for i, project in enumerate(projections):
        heads = tuple(found.chosen[i].nonzero()[:, 0].tolist())
        x = seeing[i].transpose(1, 2)  # (B, H, N, d) as the values of an attention to oneself
        near = torch.full((x.shape[2], x.shape[2]), -torch.inf).double().fill_diagonal_(0)
        zero = torch.zeros_like(x)
        operator = Instrumented(heads=Reinforce(heads, c["alpha"]))
        out = operator(zero, zero, x, bias=near[None, None], scale=1.0)
        outs.append(project(out.transpose(1, 2).flatten(2)))
    return {
        "vhd": found.vhd,
        "selected": found.chosen.long(),
        "projected": torch.stack(outs),
    }


KINDS = {"head-intervention": head_intervention}
