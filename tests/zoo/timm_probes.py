"""What the zoo of timm families is looked at with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tests.common.hosts import tensors
from tests.zoo.timm_zoo import GRID, SIDE
from transom.hosts import Host
from transom.registry import Method
from transom.slots import Ask, Fill
from transom.tokens import Tokens

REDUCED = 8
"""Tokens ToMe removes in every block of the zoo."""
TOTAL = GRID * GRID
"""Patches of an image of the zoo."""


def images(count: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, SIDE, SIDE, generator=generator)


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What a model makes of images; of two towers only the one that sees them."""
    encode: Callable[[Tensor], Any] = getattr(model, "encode_image", model)
    return tensors(encode(x))


def far(got: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference of two outputs of the same shapes."""
    assert [t.shape for t in got] == [t.shape for t in expected]
    return max(float((a - b).detach().abs().max()) for a, b in zip(got, expected, strict=True))


@dataclass(frozen=True)
class Look:
    """Token step: asks for keys and sizes, and changes nothing."""

    def __call__(self, tokens: Tokens, attended: Ask) -> Tokens:
        row, key = attended.class_row(), attended.key
        assert row.shape == key.shape[:2] == tokens.x.shape[:2]
        return tokens


@dataclass(frozen=True)
class Shuffle:
    """Token step: another order of the patch tokens for each image; nothing is lost."""

    seed: int

    def __call__(self, tokens: Tokens, attended: Ask) -> Tokens:
        generator = torch.Generator().manual_seed(self.seed)
        behind = torch.rand(len(tokens.x), tokens.count - tokens.prefix, generator=generator)
        front = torch.arange(tokens.prefix).expand(len(tokens.x), -1)
        return tokens.keep(torch.cat([front, behind.argsort(1) + tokens.prefix], 1))


@dataclass(frozen=True)
class Keep:
    """Token step: the patch tokens at `places` stay, in that order."""

    places: tuple[int, ...]

    def __call__(self, tokens: Tokens, attended: Ask) -> Tokens:
        stay = [*range(tokens.prefix), *(tokens.prefix + p for p in self.places)]
        return tokens.keep(torch.tensor(stay).expand(len(tokens.x), -1))


@dataclass(frozen=True)
class Note:
    """Token step: keeps the attention of the class token; changes nothing."""

    seen: list[Tensor]

    def __call__(self, tokens: Tokens, attended: Ask) -> Tokens:
        self.seen.append(attended.class_row())
        return tokens


@dataclass(frozen=True)
class Probe(Method):
    """Token steps for the first blocks; the others get none."""

    steps: tuple[Any, ...]
    drops: bool = True
    slug: ClassVar[str] = "probe"

    def fit(self, host: Host) -> list[Fill]:
        fills = [Fill(tokens=step, size_bias=True, drops=self.drops) for step in self.steps]
        return fills + [Fill()] * (host.depth - len(fills))
