"""FNA against SHI-Labs/NATTEN."""

from __future__ import annotations

from torch import Tensor

from transom.ops import neighborhood
from transom.papers.attention import fna

from ..golden import Golden

MODULES = {
    1: fna.NeighborhoodAttention1D,
    2: fna.NeighborhoodAttention2D,
    3: fna.NeighborhoodAttention3D,
}


def operator(golden: Golden) -> dict[str, Tensor]:
    c, given = golden.config, golden.inputs
    out, lse = neighborhood.attend(
        given["q"],
        given["k"],
        given["v"],
        c["kernel_size"],
        c["stride"],
        c["dilation"],
        c["is_causal"],
        scale=c["scale"],
        extra_k=given.get("extra_k"),
        extra_v=given.get("extra_v"),
        return_lse=True,
    )
    return {"out": out, "lse": lse}


def module(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    made = MODULES[len(c["token_shape"])](
        c["embed_dim"],
        c["num_heads"],
        c["kernel_size"],
        c["stride"],
        c["dilation"],
        c["is_causal"],
        qkv_bias=c["qkv_bias"],
        qk_scale=c.get("qk_scale"),
    )
    golden.load(made)
    return {"y": made(golden.inputs["x"])}


KINDS = {"na1d": operator, "na2d": operator, "na3d": operator, "module": module}
