"""Methods that exist for the tests only: what a host must let any method do."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from transom.errors import FitError
from transom.hosts import Host
from transom.ops import reference
from transom.projections import Projections
from transom.registry import Method
from transom.slots import Ask, BlockView, Fill, Part
from transom.tokens import Record, Tokens


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


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None,
    scale: float,
    record: Record | None = None,
) -> Tensor:
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
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None,
        scale: float,
        record: Record | None,
    ) -> Tensor:
        assert record is not None
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


class OwnMixer(nn.Module):
    """The host's plain attention, rebuilt from its projections."""

    def __init__(self, given: Projections) -> None:
        super().__init__()
        self.heads = given.heads
        self.maps = nn.ModuleList()
        for weight, bias in (given.q, given.k, given.v, given.out):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
            linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
            self.maps.append(linear)

    def forward(self, h: Tensor, ask: Ask) -> Tensor:
        *inward, out = self.maps
        q, k, v = (m(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in inward)
        y = ask.attend(q, k, v, dropout=0.0, scale=q.shape[-1] ** -0.5)
        return out(y.transpose(1, 2).flatten(2))


class OwnNorm(nn.Module):
    """A norm that is not the host's; factor 1 is."""

    def __init__(self, norm: nn.Module, factor: float) -> None:
        super().__init__()
        self.norm = copy.deepcopy(norm)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * self.factor


class OwnFfn(nn.Module):
    """An ffn that is not the host's; factor 1 is."""

    def __init__(self, ffn: nn.Module, factor: float) -> None:
        super().__init__()
        self.ffn = copy.deepcopy(ffn)
        self.factor = factor

    def forward(self, h: Tensor, record: Record) -> Tensor:
        record.as_map(h)
        return self.ffn(h) * self.factor


@dataclass(frozen=True)
class Rebuild(Method):
    """Replaces attention, norms and ffn with copies of the host's own.

    Attributes:
        factor: of the norms' and the ffn's output; 1 is the host.
    """

    factor: float = 1.0
    slug: ClassVar[str] = "rebuild"
    needs_grid: ClassVar[bool] = True

    def fit(self, host: Host) -> list[Fill]:
        return [self._fill(host.views[i]) for i in range(host.depth)]

    def _fill(self, view: BlockView) -> Fill:
        given, parts = view.projections(), {n: view.part(n) for n in get_args(Part)}
        norm1, attention, norm2, ffn = parts.values()
        if given is None or norm1 is None or attention is None or norm2 is None or ffn is None:
            raise FitError(f"rebuild needs every part of a block, here there is {parts}")
        return Fill(
            mixer=OwnMixer(given),
            norms=(OwnNorm(norm1, self.factor), OwnNorm(norm2, self.factor)),
            ffn=OwnFfn(ffn, self.factor),
        )
