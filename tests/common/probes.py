"""Methods that exist for the tests only: what a host must let any method do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from transom.hosts import Host
from transom.ops import reference
from transom.registry import Method
from transom.slots import Ask, Fill
from transom.tokens import Tokens


@dataclass(frozen=True)
class Listening:
    """Token step: reads everything it may ask for, and makes sizes of one."""

    def __call__(self, tokens: Tokens, attended: Ask) -> Tokens:
        row, key = attended.class_row(), attended.key
        assert row.shape == tokens.x.shape[:2] == key.shape[:2]
        torch.testing.assert_close(row.sum(1), torch.ones_like(row[:, 0]))
        size = torch.ones_like(tokens.x[..., :1], dtype=torch.float32)
        return Tokens(tokens.x, replace(tokens.record, size=size))


@dataclass(frozen=True)
class Listen(Method):
    """Changes nothing, on the paths of a method that changes everything."""

    slug: ClassVar[str] = "listen"

    def fit(self, host: Host) -> list[Fill]:
        return [Fill(tokens=Listening(), size_bias=True)] * host.depth


def written_out(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, scale: float) -> Tensor:
    """An attention operator: the reference."""
    return reference.attention(q, k, v, bias, scale)


@dataclass(frozen=True)
class WriteOut(Method):
    """Fills the slot `attention` with the reference.

    Attributes:
        sharpness: factor of the logits; 1 is the host's attention.
    """

    sharpness: float = 1.0
    slug: ClassVar[str] = "write-out"

    def fit(self, host: Host) -> list[Fill]:
        return [Fill(attention=Sharpened(self.sharpness))] * host.depth


@dataclass(frozen=True)
class Sharpened:
    sharpness: float

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, scale: float
    ) -> Tensor:
        return written_out(q, k, v, bias=bias, scale=scale * self.sharpness)


class Scaling(nn.Module):
    """Token step with a parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 1.5))

    def forward(self, tokens: Tokens, attended: Ask) -> Tokens:
        return Tokens(tokens.x * self.weight, tokens.record)


@dataclass(frozen=True)
class Scale(Method):
    """Brings parameters of its own."""

    slug: ClassVar[str] = "scale"

    def fit(self, host: Host) -> list[Fill]:
        return [Fill(tokens=Scaling(host.width), asks=False) for _ in range(host.depth)]

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        return [{}]
