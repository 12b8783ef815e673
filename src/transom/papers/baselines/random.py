"""The random control: a seeded random subset of the patches stays in a few blocks.

Any method that chooses has to beat it at equal token counts. The subset depends on the seed, the
block and the number of tokens, not on the image or its place in the batch, so a result does not
depend on batch mates and repeats exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from transom.errors import SettingsError
from transom.hosts.base import Host
from transom.ops import padded
from transom.registry import Method
from transom.settings import counts_left, named_blocks, one_a_block
from transom.slots import Ask, Fill
from transom.tokens import Tokens


@dataclass(frozen=True)
class KeepRandom:
    """Token step: keep a random subset, in the order the tokens have.

    Attributes:
        keep_rate: part of the patch tokens that stays.
        count: tokens that stay, prefix included, instead of a rate.
        seed: of the draw.
    """

    keep_rate: float
    count: int | None
    seed: int

    def __call__(self, tokens: Tokens, attended: Ask) -> Tokens:
        total = tokens.count - tokens.prefix
        k = math.ceil(self.keep_rate * total) if self.count is None else self.count - tokens.prefix
        if k >= total:
            return tokens
        valid = tokens.record.valid
        if valid is not None:
            return tokens.keep(self._padded(valid, tokens.prefix, k))
        order = shuffled(total, self.seed)
        stay = sorted(order[:k])
        index = torch.tensor(
            [*range(tokens.prefix), *(i + tokens.prefix for i in stay)], device=tokens.x.device
        )
        return tokens.keep(index.expand(tokens.x.shape[0], -1))

    def _padded(self, valid: Tensor, prefix: int, k: int) -> Tensor:
        """The same draw for each item of a padded batch as for that item alone."""
        behind = valid[:, prefix:]
        total = behind.shape[1]
        amount = behind.sum(-1)
        # a graph has to hold the draw of every length, because it cannot look at the mask
        lengths = range(total + 1) if torch.compiler.is_compiling() else set(amount.tolist())
        turns = [ranks(n, self.seed) if n in lengths else [] for n in range(total + 1)]
        table = torch.tensor([[*turn, *[total] * (total - len(turn))] for turn in turns])
        stays = torch.tensor([self._stays(n, k) for n in range(total + 1)])
        place = (behind.cumsum(-1) - 1).clamp(min=0)
        turn = table.to(valid.device)[amount].gather(1, place)
        stay = stays.to(valid.device)[amount]
        index, _, _ = padded.highest(-turn.to(torch.float32), valid, stay, k, prefix)
        return index.sort(-1).values

    def _stays(self, length: int, k: int) -> int:
        """How many of `length` real tokens stay where the batch keeps k."""
        return min(math.ceil(self.keep_rate * length) if self.count is None else k, length)


def shuffled(count: int, seed: int) -> list[int]:
    """The numbers 0 ... count - 1 in an order that depends on the seed and the count only.

    Plain integer arithmetic (a linear congruential generator), so that a compiled or exported
    model draws the same subset.
    """
    state, order = (seed * 2654435761 + count) % 2**32, list(range(count))
    for i in range(count - 1, 0, -1):
        state = (1664525 * state + 1013904223) % 2**32
        j = (state >> 8) % (i + 1)
        order[i], order[j] = order[j], order[i]
    return order


def ranks(count: int, seed: int) -> list[int]:
    """The turn of each of `count` numbers in :func:`shuffled`."""
    turn = [0] * count
    for i, number in enumerate(shuffled(count, seed)):
        turn[number] = i
    return turn


@dataclass(frozen=True)
class Random(Method):
    """Random pruning.

    Attributes:
        keep_rate: part of the patch tokens that stays in a reducing block.
        layers: reducing blocks; by default those behind a quarter, a half and three quarters of
            the depth (3, 6, 9 of 12).
        counts: tokens left after each block, prefix included, instead of rates: the control of a
            method that ran with these counts.
        seed: of the draw.
    """

    keep_rate: float = 0.7
    layers: tuple[int, ...] | None = None
    counts: tuple[int, ...] | None = None
    seed: int = 0
    may_empty: ClassVar[bool] = False
    """Whether it may be that none stays."""

    def __post_init__(self) -> None:
        least = "from 0" if self.may_empty else "above 0"
        if not 0 <= self.keep_rate <= 1 or (not self.keep_rate and not self.may_empty):
            raise SettingsError(
                f"keep_rate is {self.keep_rate!r}; expected the part of patch tokens that stays: "
                f"{least}, at most 1"
            )

    def fit(self, host: Host) -> list[Fill]:
        depth = host.depth
        if self.counts is not None:
            counts = one_a_block(self.counts, depth, "counts")
            counts_left(counts, host.prefix)
            return [self._fill(i, count) for i, count in enumerate(counts)]
        layers = named_blocks(self.layers, depth)
        reduces = [i in layers and self.keep_rate < 1 for i in range(depth)]
        return [self._fill(i, None) if on else Fill() for i, on in enumerate(reduces)]

    def _fill(self, block: int, count: int | None) -> Fill:
        step = KeepRandom(self.keep_rate, count, self.seed * 1000 + block)
        return Fill(tokens=step, asks=False, drops=True)

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        return [{"keep_rate": rate} for rate in (0.9, 0.7, 0.5)]

    @classmethod
    def neutral(cls) -> dict[str, Any]:
        return {"keep_rate": 1.0}
