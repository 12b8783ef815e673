"""What of TransNeXt goes onto other hosts: its two halves of a block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.errors import FitError, SettingsError, TokensError
from transom.hosts.base import Host
from transom.ops import attention
from transom.papers.attention.transnext.geometry import geometry
from transom.papers.attention.transnext.mixer import AggregatedAttention, ConvGLU
from transom.projections import Affine, Projections
from transom.registry import Method
from transom.slots import Ask, Fill
from transom.tokens import Record


class Aggregate(nn.Module):
    """Mixer: aggregated attention over the patches of a host, which may have prefix tokens.

    Every patch sees the prefix tokens beside its window and the pooled image. A prefix token sees
    every token, by the same cosine attention without position.

    Args:
        given: the host's projections, to begin from.
        window: positions of the local window along both axes.
        pool: patches that are pooled into one key along each axis.
        grid: (h, w) of the patches at the host's own size, which fixes the scale of coordinates.
    """

    def __init__(self, given: Projections, window: int, pool: int, grid: tuple[int, int]) -> None:
        super().__init__()
        width, inner = given.out[0].shape[0], given.out[0].shape[1]
        if inner != width:
            raise FitError(
                f"transnext needs heads that fill the width {width} of a host, but those of this "
                f"one fill {inner}; fit it with parts='ffn'"
            )
        self.pool = pool
        self.grid = grid
        self.attention = AggregatedAttention(width, given.heads, window)
        (qw, qb), (kw, kb), (vw, vb) = given.q, given.k, given.v
        _begin(self.attention.q, (qw, qb))
        zero = torch.zeros_like(kw[:, 0])
        biases = [zero if b is None else b for b in (kb, vb)]
        _begin(self.attention.kv, (torch.cat([kw, vw]), torch.cat(biases)))
        _begin(self.attention.proj, given.out)
        self.to(qw)

    def forward(self, h: Tensor, ask: Ask) -> Tensor:
        """Mixed tokens (B, N, D) of normed ones."""
        assert ask.record is not None
        if ask.bias is not None:
            raise TokensError(
                "transnext pools the patches of whole images, but some of these are padding; run "
                "images of one size together"
            )
        prefix, patches = ask.record.as_map(h)
        grid = (patches.shape[1], patches.shape[2])
        pooled = (max(grid[0] // self.pool, 1), max(grid[1] // self.pool, 1))
        tables = geometry(grid, pooled, self.grid, self.attention.window, h.device)
        x = patches.flatten(1, 2)
        if not prefix.shape[1]:
            return self.attention(x, grid, tables)
        y = self.attention(x, grid, tables, prefix)
        return torch.cat([self._everything(prefix, h), y], 1)

    def _everything(self, query: Tensor, h: Tensor) -> Tensor:
        """What prefix tokens (B, T, D) see of all tokens (B, N, D)."""
        a = self.attention
        q = F.normalize(a.heads(a.q(query)), dim=-1)
        k, v = a.pairs(h)
        q, k, v = (t.transpose(1, 2) for t in (a.scaled(q, math.log(h.shape[1])), k, v))
        y: Tensor = a.proj(attention.attend(q, k, v, scale=1.0).transpose(1, 2).flatten(2))
        return y


def _begin(linear: nn.Linear, given: Affine) -> None:
    weight, bias = given
    with torch.no_grad():
        linear.weight.copy_(weight)
        if linear.bias is not None:
            linear.bias.zero_() if bias is None else linear.bias.copy_(bias)


class Gated(nn.Module):
    """Ffn: the convolutional GLU on the patches; a prefix token is a map of its own.

    Args:
        dim: width of the host.
        hidden: of a plain ffn of the same cost.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.glu = ConvGLU(dim, hidden)

    def forward(self, h: Tensor, record: Record) -> Tensor:
        """Features (B, N, D) of normed tokens."""
        prefix, patches = record.as_map(h)
        y: Tensor = self.glu(patches.flatten(1, 2), (patches.shape[1], patches.shape[2]))
        return torch.cat([self.glu.alone(prefix), y], 1) if prefix.shape[1] else y


Parts = Literal["both", "attention", "ffn"]


@dataclass(frozen=True)
class TransNeXtBlock(Method):
    """Aggregated attention and the convolutional GLU in the blocks of a host.

    Attributes:
        parts: which half of a block is replaced.
        window: positions of the local window along both axes, an odd number.
        sr_ratio: patches pooled into one key along each axis.
        mlp_ratio: hidden width of a plain ffn over the width; the gated one has two thirds of it.
    """

    parts: Parts = "both"
    window: int = 3
    sr_ratio: int = 2
    mlp_ratio: float = 4.0
    needs_grid: ClassVar[bool] = True
    needs_training = True

    def __post_init__(self) -> None:
        if self.window < 1 or self.window % 2 == 0:
            raise SettingsError(f"window is {self.window}; expected an odd number of at least 1")
        if self.sr_ratio < 1:
            raise SettingsError(f"sr_ratio is {self.sr_ratio}; expected at least 1")
        if self.mlp_ratio < 1:
            raise SettingsError(f"mlp_ratio is {self.mlp_ratio}; expected at least 1")

    def fit(self, host: Host) -> list[Fill]:
        return [self._fill(host, i) for i in range(host.depth)]

    def _fill(self, host: Host, i: int) -> Fill:
        mixer = ffn = None
        given = host.views[i].projections()
        like = next(host.stack.parameters())
        if self.parts != "ffn":
            assert host.grid is not None
            if given is None:
                raise FitError(
                    "transnext begins from the host's projections, but the attention of this host "
                    "has not three plain linear ones; fit it with parts='ffn'"
                )
            mixer = Aggregate(given, self.window, self.sr_ratio, host.grid)
        if self.parts != "attention":
            ffn = Gated(host.width, int(host.width * self.mlp_ratio)).to(like)
        return Fill(mixer=mixer, ffn=ffn)

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        return [{"parts": part} for part in ("ffn", "attention", "both")]
