"""Aggregated attention, global attention and the convolutional GLU, on tokens (B, N, C)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.ops import attention
from transom.ops.neighborhood import unfused
from transom.papers.attention.transnext.geometry import Geometry, Grid, PositionBias

# softplus of this is 1/0.24, the temperature that training begins with
_TEMPERATURE = math.log(math.exp(1 / 0.24) - 1)


class Cosine(PositionBias):
    """What both attentions share: query embedding, temperature, position bias.

    Args:
        dim: width C.
        heads: number of them.

    Attributes:
        weigh: from this module and its input (B, N, C) to a weight (B, N, H) of each head's
            output; None leaves them as they are.
    """

    proj: nn.Linear

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.weigh: Callable[[nn.Module, Tensor], Tensor] | None = None
        self.num_heads = heads
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), _TEMPERATURE))
        self.query_embedding = nn.Parameter(torch.empty(heads, 1, dim // heads))
        nn.init.trunc_normal_(self.query_embedding, std=0.02)
        self.cpb_fc1 = nn.Linear(2, 512)
        self.cpb_fc2 = nn.Linear(512, heads)

    def heads(self, x: Tensor) -> Tensor:
        """(B, N, H, d)."""
        return x.unflatten(-1, (self.num_heads, -1))

    def scaled(self, q: Tensor, length: Tensor | float) -> Tensor:
        """Unit queries (B, N, H, d) with embedding, times temperature and `length` (N, 1, 1)."""
        sharpness = F.softplus(self.temperature)[:, 0]  # (H, 1)
        return (q + self.query_embedding[:, 0]) * sharpness * length

    def join(self, heads: Tensor, x: Tensor) -> Tensor:
        """Outputs of the heads (B, N, H, d) for the input x, back to the stream (B, N, C)."""
        if self.weigh is not None:
            heads = heads * self.weigh(self, x)[..., None]
        y: Tensor = self.proj(heads.flatten(2))
        return y


class AggregatedAttention(Cosine):
    """One softmax over the window around a query and the pooled image.

    Args:
        dim: width C.
        heads: number of them.
        window: positions of the window along both axes, an odd number.
        qkv_bias: whether the projections to q, k and v have a bias.
    """

    def __init__(self, dim: int, heads: int, window: int = 3, qkv_bias: bool = True) -> None:
        super().__init__(dim, heads)
        self.window = window
        places = window**2
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.sr = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim)
        self.relative_pos_bias_local = nn.Parameter(torch.empty(heads, places))
        self.learnable_tokens = nn.Parameter(torch.empty(heads, dim // heads, places))
        self.learnable_bias = nn.Parameter(torch.zeros(heads, 1, places))
        nn.init.trunc_normal_(self.relative_pos_bias_local, std=0.0004)
        nn.init.trunc_normal_(self.learnable_tokens, std=0.02)

    def pool(self, x: Tensor, grid: Grid, pooled: Grid) -> Tensor:
        """Pooled features (B, P, C)."""
        # a convolution of one position is a linear map of tokens, and needs no copy into a map
        y = F.gelu(F.linear(x, self.sr.weight.flatten(1), self.sr.bias))
        return self.norm(F.adaptive_avg_pool2d(y.mT.unflatten(2, grid), pooled).flatten(2).mT)

    def pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Unit keys and values (B, N, H, d)."""
        k, v = self.kv(x).chunk(2, -1)
        return F.normalize(self.heads(k), dim=-1), self.heads(v)

    def forward(
        self, x: Tensor, grid: Grid, tables: Geometry, prefix: Tensor | None = None
    ) -> Tensor:
        """Mixed tokens.

        Args:
            x: (B, N, C), row-major.
            grid: (h, w) of them.
            tables: for this grid.
            prefix: (B, T, C) further tokens that every query sees, with no bias; None for none.

        Returns:
            (B, N, C).
        """
        inside = tables.inside
        assert inside is not None
        q = F.normalize(self.heads(self.q(x)), dim=-1)
        k, v = self.pairs(x)
        far = self.pool(x, grid, tables.pooled)
        bias = self.bias(tables.coords, tables.pair, x.shape[1])  # (H, N, P)
        if prefix is not None:
            far = torch.cat([far, prefix], 1)
            bias = F.pad(bias, (0, prefix.shape[1]))
        far_k, far_v = (t.transpose(1, 2) for t in self.pairs(far))  # (B, H, P, d)

        seen = inside.flatten(0, 1)  # (N, L)
        # the logarithm in at least single precision, as the official buffer has it
        wide = q.dtype if q.dtype == torch.float64 else torch.float32
        length = (seen.sum(-1) + far.shape[1]).to(wide).log().to(q.dtype)
        query = self.scaled(q, length[:, None, None])
        near = unfused.window_logits(query.unflatten(1, grid), k.unflatten(1, grid), self.window)
        near = near.flatten(1, 2) + self.relative_pos_bias_local
        near = near.masked_fill(~seen[:, None], float("-inf"))  # (B, N, H, L)
        pooled = query.transpose(1, 2) @ far_k.mT + bias
        places = near.shape[-1]
        weight = torch.cat([near.transpose(1, 2), pooled], -1).softmax(-1)  # (B, H, N, L + P)
        own = q.transpose(1, 2) @ self.learnable_tokens + self.learnable_bias
        local = (own + weight[..., :places]).transpose(1, 2).unflatten(1, grid)
        y = unfused.window_sum(local, v.unflatten(1, grid), self.window).flatten(1, 2)
        y = y + (weight[..., places:] @ far_v).transpose(1, 2)
        return self.join(y, x)


class GlobalAttention(Cosine):
    """Cosine attention of every position to every other, scaled by the logarithm of their number.

    Args:
        dim: width C.
        heads: number of them.
        qkv_bias: whether the projection to q, k and v has a bias.
    """

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__(dim, heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Grid, tables: Geometry) -> Tensor:
        """Mixed tokens (B, N, C) of x (B, N, C)."""
        q, k, v = (self.heads(part) for part in self.qkv(x).chunk(3, -1))
        query = self.scaled(F.normalize(q, dim=-1), math.log(x.shape[1]))
        key = F.normalize(k, dim=-1)
        bias = self.bias(tables.coords, tables.pair, x.shape[1])[None]
        query, key, v = (t.transpose(1, 2) for t in (query, key, v))
        y = attention.attend(query, key, v, bias.to(query.dtype), scale=1.0)
        return self.join(y.transpose(1, 2), x)


class DWConv(nn.Module):
    """Depthwise 3x3 convolution of maps (B, C, h, w)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dwconv(x)
        return y


class ConvGLU(nn.Module):
    """fc2(GELU(DW3x3(gate)) * value) with gate and value from one linear layer.

    Args:
        dim: width C.
        hidden: of a plain ffn of the same cost; gate and value have two thirds of it each.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        width = int(2 * hidden / 3)
        self.fc1 = nn.Linear(dim, 2 * width)
        self.dwconv = DWConv(width)
        self.fc2 = nn.Linear(width, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens (B, N, C) to tokens (B, N, C)."""
        gate, value = self.fc1(x).chunk(2, -1)
        gate = self.dwconv(gate.mT.unflatten(2, grid)).flatten(2).mT
        y: Tensor = self.fc2(F.gelu(gate) * value)
        return y

    def alone(self, x: Tensor) -> Tensor:
        """The same for tokens (B, T, C) without neighbours: each is a map of one position."""
        gate, value = self.fc1(x).chunk(2, -1)
        conv = self.dwconv.dwconv
        gate = gate * conv.weight[:, 0, 1, 1] + conv.bias
        y: Tensor = self.fc2(F.gelu(gate) * value)
        return y
