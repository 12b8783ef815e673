"""Attention of all layers of an image host, on the grid of its patches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from transom import hosts
from transom.errors import TokensError
from transom.lens.capture import capture

Grid = tuple[int, int]


class Maps(NamedTuple):
    """What :func:`maps_of` saw.

    attention: of each layer (B, H, N, N).
    residual: tokens behind each layer (B, N, D); empty when not asked for.
    grid: (h, w) of the patches.
    prefix: class and register tokens in front.
    class_token: whether the first of these is a class token.
    """

    attention: list[Tensor]
    residual: list[Tensor]
    grid: Grid
    prefix: int
    class_token: bool

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
        return torch.stack([a.float().mean((1, 2)) for a in self.attention])

    def rollout(self) -> Tensor:
        """(L, B, N, N) attention through all layers up to each one, half of it going straight on.

        Source: Abnar and Zuidema, Quantifying Attention Flow in Transformers, ACL 2020.
        """
        flow, flows = None, []
        for each in self.attention:
            mean = each.float().mean(1)
            step = (mean + torch.eye(mean.shape[-1], device=mean.device)) / 2
            flow = step if flow is None else step @ flow
            flows.append(flow)
        return torch.stack(flows)


@torch.no_grad()
def maps_of(model: nn.Module, images: Tensor, *, residual: bool = False) -> Maps:
    """Attention of every layer of an image host.

    Args:
        model: with or without fitted methods that keep the tokens.
        images: (B, 3, H, W) as the model wants them.
        residual: whether the tokens behind each layer are wanted too.

    Raises:
        TokensError: tokens leave on the way, or attention is within windows.
    """
    host = hosts.find(model)
    names = ["attention.probabilities"] + ["residual.post"] * residual
    with capture(model, *(f"blocks.*.{name}" for name in names), check=False) as seen:
        model(images)
    found = [x for name, x in seen.items() if name.endswith("probabilities")]
    behind = [x for name, x in seen.items() if name.endswith("post")]
    n = found[0].shape[-1] - host.prefix
    grid = host.grid if host.grid and host.grid[0] * host.grid[1] == n else _square(n)
    for i, each in enumerate(found):
        if grid is None or each.shape[-2:] != found[0].shape[-2:] or len(each) != len(images):
            raise TokensError(
                f"the attention of layer {i} has the shape {tuple(each.shape)}; expected all "
                "patches of a grid in every layer (no windows, no method that removes tokens)"
            )
    assert grid is not None
    return Maps(found, behind, grid, host.prefix, host.class_token)


def _square(n: int) -> Grid | None:
    side = round(n**0.5)
    return (side, side) if side * side == n and n else None
