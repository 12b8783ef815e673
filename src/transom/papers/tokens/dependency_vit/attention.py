"""Reversed attention: every token sends its value to others, instead of gathering theirs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from transom.errors import SettingsError


class Heads(NamedTuple):
    """Queries, keys and values (B, H, N, d) of one attention."""

    q: Tensor
    k: Tensor
    v: Tensor


def sending(q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Where every token sends.

    Args:
        q: (B, H, N, d) of the senders.
        k: (B, H, N, d) of the receivers.
        scale: of the logits.
        bias: broadcastable to (B, H, N, N), added to the logits; the last axis is the receiver.

    Returns:
        (B, H, N, N): row j is how token j spreads over its possible parents; rows sum to 1.
    """
    logits = (q * scale) @ k.mT
    return (logits if bias is None else logits + bias).softmax(-1)


def receive(sent: Tensor, v: Tensor, strength: Tensor) -> Tensor:
    """What arrives at every token: y_i = Σ_j sent[j, i] · strength[j] · v_j.

    Args:
        sent: (B, H, N, N) from :func:`sending`.
        v: (B, H, N, d).
        strength: (B, H, N) of every sender in every head, which is p · m.

    Returns:
        (B, H, N, d).
    """
    return sent.mT @ (v * strength[..., None])


def dependencies(sent: Tensor, strength: Tensor) -> Tensor:
    """The soft graph of one layer.

    Args:
        sent: (B, H, N, N) from :func:`sending`.
        strength: (B, H, N), p · m.

    Returns:
        (B, N, N) summed over heads: row i receives (parent), column j sends (child).
    """
    return torch.einsum("bhji,bhj->bij", sent, strength)


class Senders(nn.Module):
    """Which head a token sends through, and how much it says at all.

    Args:
        dim: channels D.
        heads: number of them, H.
        temperature: of the softmax over heads.

    Raises:
        SettingsError: a number is out of range.
    """

    def __init__(self, dim: int, heads: int, temperature: float = 0.1) -> None:
        super().__init__()
        if not temperature > 0:
            raise SettingsError(
                f"the temperature of the head selector is {temperature!r}; expected above 0"
            )
        if dim < 2 or heads < 1:
            raise SettingsError(
                f"got {dim} channels and {heads} heads; expected at least 2 channels and 1 head"
            )
        self.heads = heads
        self.temperature = temperature
        self.head_selector = nn.Linear(dim, heads, bias=False)
        self.message_controller = Mlp(dim, dim // 2, 1, bias=False)

    def select(self, x: Tensor) -> Tensor:
        """The share p (B, H, N) of every head in what each token of x (B, N, D) sends."""
        logits = self.head_selector(x)
        # divided by a small temperature, half precision overflows soon
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return (wide / self.temperature).softmax(-1).to(x.dtype).mT

    def control(self, x: Tensor, m: Tensor | None) -> Tensor:
        """The next m (B, N) from x (B, N, D) and the one before, (B, N) or a scalar; None is 1."""
        gate: Tensor = self.message_controller(x)[..., 0].sigmoid()
        return gate if m is None else m * gate

    def split(self, x: Tensor) -> Heads:
        """Queries, keys and values of x (B, N, D)."""
        raise NotImplementedError

    def depend(self, x: Tensor, m: Tensor, bias: Tensor | None = None) -> Tensor:
        """The soft graph (B, N, N) of this layer.

        Args:
            x: (B, N, D) that entered the attention.
            m: (B, N) that came out of it.
            bias: as in :func:`sending`.
        """
        q, k, _ = self.split(x)
        return dependencies(sending(q, k, scale_of(q), bias), self.select(x) * m[:, None])


def scale_of(q: Tensor) -> float:
    """1/√d of queries (B, H, N, d)."""
    return float(1 / math.sqrt(q.shape[-1]))


class ReversedAttention(Senders):
    """Reversed attention with its projections, under the names of the third-party code.

    Args:
        dim: channels D.
        heads: number of them, a divisor of D.
        qkv_bias: whether the projections to q, k and v have one.
        temperature: of the softmax over heads.

    Raises:
        SettingsError: a number is out of range, or the heads do not divide the channels.
    """

    def __init__(
        self, dim: int, heads: int, qkv_bias: bool = False, temperature: float = 0.1
    ) -> None:
        super().__init__(dim, heads, temperature)
        if dim % heads:
            raise SettingsError(f"{heads} heads do not divide {dim} channels")
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> Heads:
        parts = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return Heads(*parts.unbind())

    def forward(
        self, x: Tensor, m: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Send once.

        Args:
            x: (B, N, D), normed.
            m: (B, N) or a scalar, what the layers before left of every token's voice; None is 1.
            bias: as in :func:`sending`.

        Returns:
            What arrives (B, N, D), and the next m (B, N).
        """
        m = self.control(x, m)
        q, k, v = self.split(x)
        y = receive(sending(q, k, scale_of(q), bias), v, self.select(x) * m[:, None])
        return self.proj(y.transpose(1, 2).flatten(2)), m
