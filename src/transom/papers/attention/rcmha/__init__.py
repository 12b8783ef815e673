"""RCMHA: attention with relative positions and a short convolution behind q, k and v.

    q = conv(W_q x),   k = conv(W_k [m, x]),   v = conv(W_v [m, x] + b_v)
    conv(z)_t = b + w_0 z_{t-2} + w_1 z_{t-1} + w_2 z_t       per channel of a head, all heads alike
    logit_ij = ((q_i + u) · k_j + q_i · R[P + j - M - i] + β[P + j - M - i]) / sqrt(d)

x: (L, B, D), m: (M, B, D) the memory, what a layer got one segment before; T = M + L keys. R
(2P, H, d) and β (2P, H) are tables by offset, u (H, d) one more bias of the query; the last two
terms of q do not have it. The query convolution begins at the segment and does not see the memory.

Source: Hermansh et al., RCMHA: Relative Convolutional Multi-Head Attention for Natural Language
Modelling, 2023; official code hermansh-id/rcmha@87df49b (this file is our own, from the equations).
The script released there builds its model without the convolution, so it trains the baseline; the
class of the paper is the one followed here. Official names of parameters throughout.

What the relative terms add is one product with the table and a shift of it in memory
(:mod:`transom.ops.relative`); the rest is fused attention with that as a mask. Ours beside the
paper: offsets beyond the table get its end rows (the official class fails); `sees_memory` lets the
query convolution look into the memory, and then two segments are the joined one exactly; either
part can be switched off, so that MHA, MDHA, RMHA and RCMHA are four corners of one class.

As a method on encoders it convolves q, k and v of the host over the patches, symmetrically, and
adds tables over the sequence or over rows and columns of the grid (ours). It begins as the host
itself (w the identity, tables and u zero), or as the official code does (w random). Checked
against goldens of the official class and model and against a lookup of every pair. The results of
the paper (one small data set, no spread) were not reproduced.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.errors import FitError, SettingsError, TokensError
from transom.hosts.base import Host
from transom.hosts.heads import head_shape
from transom.ops import relative
from transom.papers.attention.rcmha.layer import (
    Filter,
    RelativeConvolutionalAttention,
    attend,
    attend_along,
    convolve,
    present,
    reference,
)
from transom.papers.attention.rcmha.model import RelativeLanguageModel, remember
from transom.registry import Method, Offer
from transom.slots import Fill
from transom.tokens import Record

__all__ = [
    "OFFERS",
    "RCMHA",
    "ConvolvedAttention",
    "RelativeConvolutionalAttention",
    "RelativeLanguageModel",
    "attend",
    "attend_along",
    "convolve",
    "reference",
    "remember",
]

Positions = Literal["sequence", "grid"]

_log = logging.getLogger(__name__)


class ConvolvedAttention(nn.Module):
    """Attention operator between a host's projections: convolutions, then relative logits."""

    def __init__(
        self, method: RCMHA, host: Host, shape: tuple[int, int], rng: torch.Generator
    ) -> None:
        super().__init__()
        heads, width = shape
        self.positions: Positions = method.positions
        self.relative = method.relative
        self.filters: nn.ModuleList | None = None
        if method.convolution:
            self.filters = nn.ModuleList(Filter(width, method.kernel_size) for _ in range(3))
            for one in self.filters.modules():
                if isinstance(one, nn.Conv1d):
                    _initialise(one, method.init, rng)
        if self.relative:
            self.query_pos_bias = nn.Parameter(torch.zeros(heads, width))
            sizes = _reaches(method, host)
            tables = (nn.Parameter(torch.zeros(2 * p, heads, width)) for p in sizes)
            self.key_pos_embeddings = nn.ParameterList(tables)
            biases = (nn.Parameter(torch.zeros(2 * p, heads)) for p in sizes)
            self.key_pos_bias = nn.ParameterList(biases)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None,
        scale: float,
        record: Record | None,
    ) -> Tensor:
        """Heads (B, H, N, d) from q, k, v (B, H, N, d)."""
        assert record is not None
        count = q.shape[2]
        if count != record.layout.count or record.size is not None:
            raise TokensError(
                f"rcmha needs the tokens in their original places, but this block has {count} "
                f"where {record.layout.count} were expected; fit it without a method that "
                "reduces tokens, or in the blocks before one"
            )
        prefix = record.layout.prefix
        if self.filters is not None:
            q, k, v = (
                self._convolved(one, x, prefix, record.valid)
                for one, x in zip(self.filters, (q, k, v), strict=True)
            )
        if not self.relative:
            return attend(q, k, v, scale=scale, bias=bias)
        extra = self.query_pos_bias
        if self.positions == "sequence":
            table, of = self.key_pos_embeddings[0], self.key_pos_bias[0]
            return attend_along(q, k, v, table, of, scale=scale, extra=extra, bias=bias)
        added = self._logits(q * scale, scale, prefix, record.layout.grid)
        return attend(q, k, v, scale=scale, extra=extra, positions=added, bias=bias)

    def _convolved(self, one: nn.Module, x: Tensor, prefix: int, valid: Tensor | None) -> Tensor:
        if valid is not None:
            x = x * valid[:, None, :, None]  # padding is as good as the end
        return torch.cat([x[:, :, :prefix], one(x[:, :, prefix:], causal=False)], 2)

    def _logits(self, q: Tensor, scale: float, prefix: int, grid: tuple[int, int] | None) -> Tensor:
        """For scaled queries."""
        if grid is None:
            raise TokensError(
                f"rcmha with positions='grid' got {q.shape[2]} tokens, which are not those of the "
                "host's own image size; call it with such images, or use positions='sequence'"
            )
        rows, columns = self.key_pos_embeddings
        down, across = (bias * scale for bias in self.key_pos_bias)
        inside = relative.grid_logits(q[:, :, prefix:], rows, columns, grid, (down, across))
        return F.pad(inside, (prefix, 0, prefix, 0))  # the prefix has no place on the grid


def _reaches(method: RCMHA, host: Host) -> tuple[int, ...]:
    """P of each table."""
    if method.positions == "sequence":
        if method.reach is None and host.grid is None:
            raise FitError(
                f"rcmha does not know how many tokens this {host.family} has; give the reach of "
                "its table, for example reach=512"
            )
        grid = host.grid or (0, 0)
        return (method.reach or host.prefix + grid[0] * grid[1],)
    if host.grid is None:
        raise FitError(
            f"rcmha with positions='grid' needs the patches on a known grid, and this "
            f"{host.family} has none; use positions='sequence'"
        )
    return tuple(method.reach or side for side in host.grid)


def _initialise(conv: nn.Conv1d, init: str, rng: torch.Generator) -> None:
    """The official random start, or a filter that changes nothing."""
    size = conv.kernel_size[0]
    weight, bias = torch.zeros_like(conv.weight), torch.zeros_like(present(conv.bias))
    if init == "official":
        limit = size**-0.5
        weight.uniform_(-limit, limit, generator=rng)
        bias.uniform_(-limit, limit, generator=rng)
    else:
        weight[:, :, (size - 1) // 2] = 1
    conv.load_state_dict({"weight": weight, "bias": bias})


@dataclass(frozen=True)
class RCMHA(Method):
    """Convolved queries, keys and values with relative positions, in encoders.

    Attributes:
        convolution: off leaves q, k and v as they are.
        relative: off leaves out everything about positions.
        kernel_size: of the convolutions over the patches, symmetric; prefix tokens are left alone.
        positions: one table over the sequence, prefix included, or one over the rows and one over
            the columns of the grid (ours).
        reach: P, largest distance with a row of its own; by default that of the host's own
            number of tokens, or of its grid.
        init: begin as the host itself, or with random filters as the official code does.
        seed: of these.
    """

    convolution: bool = True
    relative: bool = True
    kernel_size: int = 3
    positions: Positions = "sequence"
    reach: int | None = None
    init: Literal["identity", "official"] = "identity"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kernel_size < 1:
            raise SettingsError(f"kernel_size is {self.kernel_size}; expected at least 1")
        if self.reach is not None and self.reach < 1:
            raise SettingsError(f"reach is {self.reach}; expected at least 1")
        if not (self.convolution or self.relative):
            raise SettingsError(
                "convolution and relative are both off, which leaves the host's own attention; "
                "switch one of them on"
            )

    def fit(self, host: Host) -> list[Fill]:
        rng = torch.Generator().manual_seed(self.seed)
        fills = []
        for i, view in enumerate(host.views):
            shape = head_shape(view)
            if shape is None or host.follows:
                raise FitError(
                    f"rcmha needs plain projections to q, k and v and positions outside of the "
                    f"attention; block {i} of this {host.family} has others"
                )
            fills.append(Fill(attention=ConvolvedAttention(self, host, shape, rng)))
        if self.init == "official" and self.convolution:
            _log.warning("rcmha begins with random convolutions: train the model before use")
        return fills

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        return [{}, {"relative": False, "init": "official"}, {"init": "official"}]

    @classmethod
    def neutral(cls) -> dict[str, Any]:
        return {}


OFFERS = (
    Offer("operator", "relative-convolutional-attention", RelativeConvolutionalAttention),
    Offer("pipeline", "relative-language-model", RelativeLanguageModel),
)
