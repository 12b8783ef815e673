"""The free twin: the token counts of another method, reached by plain slicing.

The first tokens stay. It looks at nothing and copies nothing, so what a method needs beyond its
free twin is the method's own overhead. As a way to choose tokens it is worthless.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transom.errors import SettingsError
from transom.hosts.base import Host
from transom.registry import Method
from transom.settings import counts_left, one_a_block
from transom.slots import Ask, Fill
from transom.tokens import Tokens


@dataclass(frozen=True)
class KeepFirst:
    """Token step: the first `count` tokens stay."""

    count: int

    def __call__(self, tokens: Tokens, attended: Ask) -> Tokens:
        if self.count >= tokens.count:
            return tokens
        record = tokens.record
        index, size, valid, home = record.index, record.size, record.valid, record.home
        if index is not None:
            index = index.masked_fill(index >= self.count, -1)
        if size is not None:
            size = size[:, : self.count]
        if valid is not None:
            valid = valid[:, : self.count]
        if home is not None:
            home = home[:, : self.count]
        visual, words = record.visual, record.words
        if visual is not None:
            visual = visual[:, : self.count]
        if words is not None:
            words = words[:, : self.count]
        changed = replace(
            record, index=index, size=size, valid=valid, home=home, visual=visual, words=words
        )
        return Tokens(tokens.x[:, : self.count], changed)


@dataclass(frozen=True)
class Slice(Method):
    """Keep the first tokens.

    Attributes:
        counts: tokens left after each block, prefix included; blocks beyond the end keep all.
    """

    counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if any(count < 1 for count in self.counts):
            raise SettingsError(f"counts is {self.counts!r}; expected numbers of at least 1")

    def fit(self, host: Host) -> list[Fill]:
        counts_left(self.counts, host.prefix)
        fills = [Fill(tokens=KeepFirst(n), asks=False, drops=True) for n in self.counts]
        return one_a_block(fills, host.depth, "counts", rest=Fill())

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        # evenly down to 9/10, 7/10 and a half of the patches
        return [
            {"counts": tuple(round(patches * (1 - gone * (i + 1) / depth)) for i in range(depth))}
            for gone in (0.1, 0.3, 0.5)
        ]

    @classmethod
    def neutral(cls) -> dict[str, Any]:
        return {}
