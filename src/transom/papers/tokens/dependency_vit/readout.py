"""The soft graph over patches that a model holds, summed over its layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import transom
from transom.errors import SettingsError, TokensError
from transom.lens.maps import maps_of
from transom.papers.tokens.dependency_vit.attention import dependencies
from transom.papers.tokens.dependency_vit.backbone import DependencyViT
from transom.papers.tokens.dependency_vit.method import ReversedMixer, mixers
from transom.slots import Ask


@torch.no_grad()
def dependency_mask(
    model: nn.Module, pixels: Tensor, layers: tuple[int, ...] | None = None
) -> Tensor:
    """Who depends on whom among the patches of a batch, summed over layers.

    Three kinds of models can be read: the backbones of this room, hosts with this method fitted,
    and any other host that attends by softmax, whose attention is then read turned around: each
    token's own row says where it would send, with a voice of 1 in every head. A pruned patch has
    the edges of the layers that it saw. Where another method merges tokens, the patches of one
    token share its edges in the third kind of model; in the second they are an error.

    Args:
        model: in eval mode.
        pixels: (B, 3, H, W), or what else the model takes as its one input.
        layers: which, counted from 0; None sums over all.

    Returns:
        (B, T, T) over patches without prefix tokens, on the model's device; row i receives
        (parent), column j sends (child). For :func:`~.tree.grow`.

    Raises:
        HostError: the model is none of these.
        SettingsError: there is no such layer.
        TokensError: patches were merged by another method, so edges have no ends of their own.
    """
    if isinstance(model, DependencyViT):
        found = _of_backbone(model, pixels)
    elif mixers(model):
        found = _of_fitted(model, pixels)
    else:
        found = _of_host(model, pixels)
    chosen = tuple(range(len(found))) if layers is None else layers
    outside = [i for i in chosen if not 0 <= i < len(found)]
    if outside or not chosen:
        raise SettingsError(
            f"layers is {layers!r}; expected at least one of the layers 0 to {len(found) - 1}"
        )
    return torch.stack([found[i] for i in chosen]).sum(0)


def _of_backbone(model: DependencyViT, pixels: Tensor) -> list[Tensor]:
    flow = model.embed(pixels)
    batch, count = flow.x.shape[:2]
    found = []
    for module in model.blocks:
        block: Any = module
        h = block.norm1(flow.x)
        _, m = block.attn(h, flow.m)
        place = flow.place
        if place is None:
            place = torch.arange(count, device=h.device).expand(batch, -1)
        found.append(_spread(block.attn.depend(h, m), place, count))
        flow = block(flow)
    return found


def _spread(mask: Tensor, place: Tensor, count: int) -> Tensor:
    """Edges (B, K, K) of the tokens at `place` (B, K), among all: (B, count, count)."""
    batch, few = place.shape
    wide = mask.new_zeros(batch, count, few).scatter(1, place[..., None].expand_as(mask), mask)
    out = mask.new_zeros(batch, count, count)
    return out.scatter(2, place[:, None].expand_as(wide), wide)


def _of_fitted(model: nn.Module, pixels: Tensor) -> list[Tensor]:
    found: list[Tensor] = []

    def note(module: ReversedMixer, given: tuple[Tensor, Ask], _: Tensor) -> None:
        h, ask = given
        record = ask.record
        assert record is not None and record.voice is not None and record.index is not None
        if record.size is not None:
            raise TokensError(
                "patches were merged by another method, so an edge does not end at one patch; "
                "remove that method to read the tree"
            )
        mask, index = module.depend(h, record.voice, ask.bias), record.index
        here = (index >= 0).to(mask.dtype)
        rows = index.clamp(min=0)[..., None].expand(-1, -1, mask.shape[2])
        mask = mask.gather(1, rows)  # (B, N0, N)
        columns = index.clamp(min=0)[:, None].expand(-1, mask.shape[1], -1)
        mask = mask.gather(2, columns) * here[:, :, None] * here[:, None]
        prefix = record.layout.prefix
        found.append(mask[:, prefix:, prefix:])

    hooks: list[Any] = []
    register: Callable[..., Any]
    for mixer in mixers(model):
        register = mixer.register_forward_hook
        hooks.append(register(note))
    try:
        with transom.trace(model):
            model(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _of_host(model: nn.Module, pixels: Tensor) -> list[Tensor]:
    maps = maps_of(model, pixels, spread=True)
    p = maps.prefix
    found = []
    for sent in maps.attention:
        loud = sent.new_ones(sent.shape[:3])
        found.append(dependencies(sent, loud)[:, p:, p:])
    return found
