"""Rules that make a span of a length, the plan of a whole model, and what both cost."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from transom.errors import CheckpointError, SettingsError

FORMAT = "transom-moa-1"


class Rule(NamedTuple):
    """The span alpha + beta · N of a head for an input of N tokens.

    Attributes:
        alpha: in tokens.
        beta: part of the length.
    """

    alpha: float
    beta: float

    def span(self, length: float) -> float:
        """In tokens, for an input of `length` tokens."""
        return self.alpha + self.beta * length

    def blocks(self, length: int, block: int) -> int:
        """Width of the band in blocks, at least 1."""
        return max(int(self.alpha // block + self.beta * (length // block)), 1)


def rules(
    alphas: Sequence[float], betas: Sequence[float], profiled: int, longest: int, shortest: int
) -> list[Rule]:
    """Every admissible rule, by rising span at the longest input.

    Args:
        alphas, betas: values to combine.
        profiled: length at which influence was measured; no span may be longer there.
        longest: length at which no span may be longer.
        shortest: length at which every span has to be above 0.
    """
    found = [Rule(float(a), float(b)) for a, b in product(alphas, betas)]
    found = [
        rule
        for rule in found
        if rule.span(profiled) <= profiled
        and rule.span(longest) <= longest
        and rule.span(shortest) > 0
    ]
    return sorted(found, key=lambda rule: rule.span(longest))


def candidates(profiled: int, longest: int, shortest: int, step: int = 1024) -> list[Rule]:
    """The search space of the paper: α from -shortest to profiled, β in eighths.

    Args:
        profiled, longest, shortest: see :func:`rules`.
        step: about the distance of two α.
    """
    count = max(2, round((profiled + shortest) / step) + 1)
    alphas = torch.linspace(-shortest, profiled, count, dtype=torch.float64).tolist()
    if 0.0 not in alphas:
        alphas.append(0.0)
    return rules(sorted(alphas), [i / 8 for i in range(9)], profiled, longest, shortest)


def layout(rule: Rule, length: int, block: int, causal: bool = True) -> Tensor:
    """(n, n) bool, the blocks that a rule keeps: the sink column and a band on top of it.

    Args:
        rule: of a head.
        length: of the input in tokens.
        block: side of a block in tokens; n = length // block.
        causal: else the band is symmetric.
    """
    count = length // block
    place = torch.arange(count)
    distance = place[:, None] - place
    kept = (distance.abs() < rule.blocks(length, block)) | (place == 0)
    return kept & (distance >= 0) if causal else kept


def lost(importance: Tensor, kept: Tensor, causal: bool = True) -> Tensor:
    """Influence of what layouts drop.

    Args:
        importance: (H, n, n) sums of |E|.
        kept: (R, n, n) bool.
        causal: whether blocks above the diagonal do not count.

    Returns:
        (H, R).
    """
    dropped = (~kept).to(importance.dtype)
    dropped = dropped.tril() if causal else dropped
    return torch.einsum("hij,rij->hr", importance, dropped)


def density(kept: Tensor) -> Tensor:
    """(R,) largest part of all keys that a query of a layout (R, n, n) attends to."""
    return kept.sum(-1).amax(-1) / kept.shape[-1]


@dataclass(frozen=True)
class Cut:
    """How spans become caches and windows.

    Attributes:
        block: side of a block of the prompt, and what cache sizes are rounded up to, in tokens.
        sink: tokens at the start that every head keeps.
        minimum: of a cache, in tokens.
        room: tokens to be generated, counted into the length of a prompt.
    """

    block: int = 64
    sink: int = 64
    minimum: int = 128
    room: int = 1024

    def __post_init__(self) -> None:
        if self.block < 1 or self.sink < 0 or self.room < 0:
            raise SettingsError(
                f"block {self.block}, sink {self.sink} and room {self.room}; expected block of at "
                "least 1, and no negative number"
            )
        if self.minimum <= self.sink:
            raise SettingsError(
                f"minimum is {self.minimum}, but {self.sink} tokens are the sink; a cache needs "
                "at least one more"
            )

    def size(self, rule: Rule, prompt: int) -> int:
        """Tokens in the cache of a head with this rule."""
        total = prompt + self.room
        size = max(min(int(rule.span(total)), total), self.minimum)
        return -(-size // self.block) * self.block


@dataclass(frozen=True)
class Plan:
    """A rule for every head of every layer.

    Attributes:
        alphas, betas: (layers, heads).
    """

    alphas: tuple[tuple[float, ...], ...]
    betas: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        for name in ("alphas", "betas"):
            rows = tuple(tuple(float(x) for x in row) for row in getattr(self, name))
            object.__setattr__(self, name, rows)
            if any(not math.isfinite(x) for row in rows for x in row):
                raise SettingsError(f"a plan has {name} that are not finite")
        heads = {len(row) for row in (*self.alphas, *self.betas)}
        if len(self.alphas) != len(self.betas) or len(heads) != 1 or not self.alphas or 0 in heads:
            raise SettingsError(
                f"a plan has alphas of {[len(r) for r in self.alphas]} heads and betas of "
                f"{[len(r) for r in self.betas]}; expected layers x heads numbers of each"
            )

    @classmethod
    def of(cls, layers: Sequence[Sequence[Rule]]) -> Plan:
        """From rules by layer and head."""
        return cls(
            tuple(tuple(rule.alpha for rule in heads) for heads in layers),
            tuple(tuple(rule.beta for rule in heads) for heads in layers),
        )

    @classmethod
    def uniform(cls, layers: int, heads: int, alpha: float = 0.0, beta: float = 0.5) -> Plan:
        """The same rule everywhere."""
        return cls.of([[Rule(alpha, beta)] * heads] * layers)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """From a JSON file with "alphas" and "betas", as published or as written by `save`.

        Raises:
            CheckpointError: it is no plan.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(content["alphas"], content["betas"])
        except FileNotFoundError:
            raise CheckpointError(f"there is no file {os.fspath(path)!r}") from None
        except (ValueError, KeyError, TypeError, SettingsError) as error:
            raise CheckpointError(
                f"{os.fspath(path)!r} is no plan: expected JSON with 'alphas' and 'betas', a list "
                f"of heads for each layer ({error})"
            ) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON."""
        content = {"format": FORMAT, "alphas": self.alphas, "betas": self.betas}
        Path(path).write_text(json.dumps(content) + "\n", encoding="utf-8")

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads."""
        return len(self.alphas), len(self.alphas[0])

    def rules(self, layer: int) -> list[Rule]:
        """Of the heads of a layer."""
        pairs = zip(self.alphas[layer], self.betas[layer], strict=True)
        return [Rule(a, b) for a, b in pairs]

    def order(self, layer: int) -> list[int]:
        """Heads of a layer so that equal rules are neighbours: by α, then β; stable."""
        found = self.rules(layer)
        return sorted(range(len(found)), key=lambda head: found[head])

    def sizes(self, prompt: int, cut: Cut | None = None) -> Tensor:
        """(layers, heads) int64: tokens in the cache of each head."""
        cut = Cut() if cut is None else cut
        return torch.tensor(
            [[cut.size(rule, prompt) for rule in self.rules(i)] for i in range(self.shape[0])]
        )

    def sinks(self, prompt: int, cut: Cut | None = None) -> Tensor:
        """(layers, heads) int64: of these, the tokens that stay for ever."""
        cut = Cut() if cut is None else cut
        return self.sizes(prompt, cut).clamp(max=cut.sink)

    def density(self, length: int) -> float:
        """Mean part of all keys that a head keeps at this length."""
        spans = [min(r.span(length), length) for i in range(self.shape[0]) for r in self.rules(i)]
        return sum(max(s, 0.0) for s in spans) / (len(spans) * length)
