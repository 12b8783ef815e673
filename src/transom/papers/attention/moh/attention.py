"""The official attention layers, by their parameter names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.papers.attention.moh.routing import NormRouter, add_router, check_heads, route
from transom.papers.attention.moh.skipping import Path, attend


class MoHAttention(nn.Module):
    """Attention of a ViT or DiT whose heads are routed.

    Args:
        dim: C.
        num_heads: H.
        shared_head: S, the first heads, always on.
        routed_head: K, of the others, that a token uses.
        qkv_bias: whether the projection to q, k and v has a bias.
        qk_norm: whether q and k go through a LayerNorm a head.
        head_dim: d; C / H when None.
        path: whether heads that are not chosen are left out; "auto" where that is faster.

    Raises:
        SettingsError: the numbers of heads do not fit each other, or H does not divide C.
    """

    wg: nn.Linear | None
    wg_0: nn.Linear | None
    wg_1: nn.Linear | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        shared_head: int,
        routed_head: int,
        *,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        head_dim: int | None = None,
        path: Path = "auto",
    ) -> None:
        super().__init__()
        if head_dim is None and dim % num_heads:
            raise SettingsError(
                f"{num_heads} heads do not divide the width {dim}; expected a divisor, or head_dim"
            )
        width = dim // num_heads if head_dim is None else head_dim
        self.num_heads, self.path = num_heads, path
        self.qkv = nn.Linear(dim, 3 * num_heads * width, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(width) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width) if qk_norm else nn.Identity()
        self.proj = nn.Linear(num_heads * width, dim)
        add_router(self, dim, num_heads, shared_head, routed_head)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Mixed tokens (B, N, C).

        Args:
            x: (B, N, C).
            bias: broadcastable to (B, H, N, N), added to the logits; None for none.
        """
        gates = route(self, x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        y = attend(q, k, v, gates, bias, q.shape[-1] ** -0.5, path=self.path)
        out: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return out


class MoHLlamaAttention(nn.Module):
    """Causal attention of LLaMA whose heads are chosen by the norms of their queries.

    Args:
        hidden: C.
        num_heads: H.
        num_kv_heads: of keys and values, a divisor of H; H when None.
        shared_head: S; H // 2 when None.
        routed_head: K; a quarter of H, rounded down, when None.
        rope_theta: base of the rotary frequencies.
        head_dim: d, an even number; C / H when None.
        bias: whether the projections have biases.
        straight_through: see :class:`NormRouter`.
        path: as for :class:`MoHAttention`.

    Raises:
        SettingsError: the numbers of heads do not fit each other.
    """

    def __init__(
        self,
        hidden: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        shared_head: int | None = None,
        routed_head: int | None = None,
        *,
        rope_theta: float = 5e5,
        head_dim: int | None = None,
        bias: bool = False,
        straight_through: bool = False,
        path: Path = "auto",
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % kv_heads or (head_dim is None and hidden % num_heads):
            raise SettingsError(
                f"{num_heads} heads and {kv_heads} of keys do not fit a width of {hidden}; "
                "expected divisors of each other and of the width"
            )
        width = hidden // num_heads if head_dim is None else head_dim
        shared = num_heads // 2 if shared_head is None else shared_head
        chosen = int(0.25 * num_heads) if routed_head is None else routed_head
        self.heads, self.kv_heads, self.theta, self.path = num_heads, kv_heads, rope_theta, path
        self.q_proj = nn.Linear(hidden, num_heads * width, bias)
        self.k_proj = nn.Linear(hidden, kv_heads * width, bias)
        self.v_proj = nn.Linear(hidden, kv_heads * width, bias)
        self.o_proj = nn.Linear(num_heads * width, hidden, bias)
        check_heads(num_heads, shared, chosen)
        self.router = NormRouter(shared, chosen, straight_through)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Mixed tokens (B, N, C).

        Args:
            x: (B, N, C).
            positions: (B or 1, N) of the tokens; 0 … N - 1 when None.
        """
        q, k, v = (
            linear(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for linear, heads in (
                (self.q_proj, self.heads),
                (self.k_proj, self.kv_heads),
                (self.v_proj, self.kv_heads),
            )
        )
        gates = self.router(q)
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        q, k = (rotate(t, positions, self.theta) for t in (q, k))
        groups = self.heads // self.kv_heads
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        count = x.shape[1]
        hidden = torch.ones(count, count, dtype=torch.bool, device=x.device).triu(1)
        bias = torch.zeros_like(hidden, dtype=q.dtype).masked_fill(hidden, float("-inf"))
        path = "dense" if self.router.passes else self.path
        y = attend(q, k, v, gates, bias[None, None], q.shape[-1] ** -0.5, path=path)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding of x (B, H, N, d), whose halves are the parts of d/2 pairs.

    Args:
        x: queries or keys.
        positions: (B or 1, N).
        theta: base of the frequencies.
    """
    pairs = x.shape[-1] // 2
    rates = theta ** -(torch.arange(pairs, device=x.device, dtype=torch.float64) / pairs)
    angle = positions[:, None, :, None].double() * rates
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
