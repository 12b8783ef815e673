"""MoH-ViT: TransNeXt whose heads are routed in every stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.papers.attention.moh.routing import add_router, route


def weigh(attention: nn.Module, x: Tensor) -> Tensor:
    """Gates (B, N, H) of an attention with a router."""
    return route(attention, x).gate


def moh_vit(
    host: str, shared_head: Sequence[int], routed_head: Sequence[int], **settings: Any
) -> nn.Module:
    """A TransNeXt with routed heads.

    Args:
        host: name of its timm model.
        shared_head: S of each stage.
        routed_head: K of each stage; 0 where all heads are shared.
        **settings: of that model.

    Raises:
        SettingsError: numbers of heads do not fit each other, or there is not one a stage.
    """
    model: Any = timm.create_model(host, **settings)
    if not len(shared_head) == len(routed_head) == model.stages:
        raise SettingsError(
            f"shared_head is {shared_head!r} and routed_head {routed_head!r}; expected "
            f"{model.stages} values each, one a stage"
        )
    for i, (shared, chosen) in enumerate(zip(shared_head, routed_head, strict=True)):
        for block in getattr(model, f"block{i + 1}"):
            attention = block.attn
            add_router(attention, attention.proj.out_features, attention.num_heads, shared, chosen)
            attention.weigh = weigh
            for name in ("wg", "wg_0", "wg_1"):
                linear = getattr(attention, name)
                if linear is not None:
                    nn.init.trunc_normal_(linear.weight, std=0.02)
    return model
