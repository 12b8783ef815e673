"""Attention of all layers of an image host, on the grid of its patches.

Where a fitted method merges or drops tokens, what a token has is spread over the patches that
became it: they share the attention it gets, and each of them looks where it looks. Patches that
were dropped get nothing and look nowhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transom import api, hosts
from transom.errors import SettingsError, TokensError
from transom.lens.capture import capture

Grid = tuple[int, int]


class Maps(NamedTuple):
    """What :func:`maps_of` saw; N counts the tokens that the model began with.

    attention: of each layer (B, H, N, N).
    residual: tokens behind each layer (B, N, D); empty when not asked for.
    grid: (h, w) of the patches.
    prefix: class and register tokens in front.
    class_token: whether the first of these is a class token.
    places: of each layer (B, N), the token that each original one is part of as the layer is
        entered, -1 where dropped; empty where no token leaves.
    output: of the model.
    """

    attention: list[Tensor]
    residual: list[Tensor]
    grid: Grid
    prefix: int
    class_token: bool
    places: Sequence[Tensor] = ()
    output: Any = None

    def looked_at(self) -> Tensor:
        """(L, B, H, h, w) attention of the class token on patches.

        Without class token what patches get from all patches, on average.
        """
        p = self.prefix
        rows = [
            a[:, :, 0, p:] if self.class_token else a[:, :, p:, p:].mean(2) for a in self.attention
        ]
        return torch.stack(rows).float().unflatten(-1, self.grid)

    def received(self) -> Tensor:
        """(L, B, N) attention that each token gets, mean over heads and queries."""
        if not self.places:
            return torch.stack([a.float().mean((1, 2)) for a in self.attention])
        there = [(i >= 0).sum(1, keepdim=True) for i in self.places]
        sums = [a.float().mean(1).sum(1) for a in self.attention]
        return torch.stack([s / n for s, n in zip(sums, there, strict=True)])

    def rollout(self) -> Tensor:
        """(L, B, N, N) attention through all layers up to each one, half of it going straight on.

        Source: Abnar and Zuidema, Quantifying Attention Flow in Transformers, ACL 2020.
        """
        flow, flows = None, []
        for i, each in enumerate(self.attention):
            mean = each.float().mean(1)
            if self.places:  # patches that became one token have one stream
                stays = together(self.places[i]).to(mean)
                stays = stays / stays.sum(-1, keepdim=True).clamp_min(1)
            else:
                stays = torch.eye(mean.shape[-1], device=mean.device)
            step = (mean + stays) / 2
            flow = step if flow is None else step @ flow
            flows.append(flow)
        return torch.stack(flows)


@torch.no_grad()
def maps_of(
    model: nn.Module,
    images: Tensor,
    *,
    residual: bool = False,
    spread: bool = False,
    layers: Sequence[int] | None = None,
) -> Maps:
    """Attention of layers of an image host.

    Args:
        model: with or without fitted methods.
        images: (B, 3, H, W) as the model wants them.
        residual: whether the tokens behind each layer are wanted too.
        spread: whether tokens that leave on the way are spread over their patches; otherwise they
            are an error.
        layers: which, counted from 0; all when None.

    Raises:
        TokensError: tokens leave on the way and are not to be spread, attention is within
            windows, or a method has replaced it.
        SettingsError: there is no such layer.
    """
    host = hosts.find(model)
    chosen = range(host.depth) if layers is None else layers
    outside = [i for i in chosen if not 0 <= i < host.depth]
    if outside or not chosen:
        raise SettingsError(f"layers is {layers!r}; expected some of 0 to {host.depth - 1}")
    kinds = ["attention.probabilities"] + ["residual.post"] * residual
    traced = spread and bool(api.fittings(model))
    with (
        capture(model, *(f"blocks.{i}.{kind}" for i in chosen for kind in kinds), check=False) as s,
        api.trace(model) if traced else contextlib.nullcontext() as trace,
    ):
        output = model(images)
    missing = [i for i in chosen if f"blocks.{i}.attention.probabilities" not in s]
    if missing:
        raise TokensError(
            f"a fitted method has replaced the attention of layers {missing}, and what it does "
            "there is no matrix of probabilities; remove the method to look at the attention"
        )
    found = [s[f"blocks.{i}.attention.probabilities"] for i in chosen]
    behind = [s[f"blocks.{i}.residual.post"] for i in chosen] if residual else []
    index: list[Tensor] = []
    if trace is not None and len(set(trace.lengths) | {trace.tokens[0].layout.count}) > 1:
        after = [record.index for record in trace.tokens]
        first = torch.arange(trace.tokens[0].layout.count, device=images.device)
        before = [first.expand(len(images), -1), *after[:-1]]
        index = [each for j in chosen if (each := before[j]) is not None]
        left = [each for j in chosen if (each := after[j]) is not None]
        found = [_spread(a, i) for a, i in zip(found, index, strict=True)]
        behind = [_copied(x, i) for x, i in zip(behind, left, strict=bool(behind))]
    n = found[0].shape[-1] - host.prefix
    grid = host.grid if host.grid and host.grid[0] * host.grid[1] == n else _square(n)
    for i, each in zip(chosen, found, strict=True):
        if grid is None or each.shape[-2:] != found[0].shape[-2:] or len(each) != len(images):
            raise TokensError(
                f"the attention of layer {i} has the shape {tuple(each.shape)}; expected all "
                "patches of a grid in every layer (no windows, no method that removes tokens)"
            )
    assert grid is not None
    return Maps(found, behind, grid, host.prefix, host.class_token, index, output)


def together(index: Tensor) -> Tensor:
    """(B, N, N) bool: which original tokens are part of the same one, by their index (B, N)."""
    return (index[:, :, None] == index[:, None]) & (index >= 0)[:, :, None]


def _spread(attention: Tensor, index: Tensor) -> Tensor:
    """Attention (B, H, n, n) of tokens, over the original ones (B, N) they are made of."""
    b, h, n, _ = attention.shape
    there = index >= 0
    place = index.clamp_min(0)
    size = torch.zeros(b, n, dtype=attention.dtype, device=index.device)
    size = size.scatter_add(1, place, there.to(size)).clamp_min(1)
    shared = attention / size[:, None, None]
    wide = shared.gather(2, place[:, None, :, None].expand(b, h, -1, n))
    full = wide.gather(3, place[:, None, None].expand(b, h, place.shape[1], -1))
    return full * (there[:, None, :, None] & there[:, None, None])


def _copied(x: Tensor, index: Tensor) -> Tensor:
    """Features (B, n, D) of tokens at every original one (B, N); zeros where dropped."""
    rows = index.clamp_min(0)[..., None].expand(-1, -1, x.shape[-1])
    return x.gather(1, rows) * (index >= 0)[..., None]


def _square(n: int) -> Grid | None:
    side = round(n**0.5)
    return (side, side) if side * side == n and n else None
