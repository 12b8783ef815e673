"""Reversed attention and leaf pruning in the blocks of a host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from transom.errors import FitError, SettingsError, TokensError
from transom.hosts.base import Host
from transom.hosts.projected import Projected, expect
from transom.ops import padded
from transom.papers.tokens.dependency_vit.attention import (
    Heads,
    Senders,
    receive,
    scale_of,
    sending,
)
from transom.papers.tokens.dependency_vit.pruning import kept, loudest, schedule
from transom.projections import Projections
from transom.registry import Method
from transom.slots import Ask, Fill
from transom.tokens import Record, Tokens


class ReversedMixer(Senders):
    """Fills the slot `attention`: the host's projections, turned around.

    Prefix tokens and padding receive, but send nothing.

    Args:
        given: what the host projects with; it is copied.
        temperature: of the head selector.
        rng: what the head selector and the message controller are drawn from.
    """

    def __init__(self, given: Projections, temperature: float, rng: torch.Generator) -> None:
        super().__init__(given.q[0].shape[1], given.heads, temperature)
        self.to(given.q[0])
        for weight in self.parameters():
            with torch.no_grad():
                weight.copy_(0.02 * torch.randn(weight.shape, generator=rng))
        self.own = Projected(given)

    def split(self, x: Tensor) -> Heads:
        return Heads(*self.own.split(x))

    def forward(self, h: Tensor, ask: Ask) -> Tensor:
        """Mixed tokens (B, N, D); what each token still says is left in the record."""
        if h.dim() != 3 or ask.record is None:
            raise TokensError(
                f"dependency-vit sends between tokens (B, N, D), and got {tuple(h.shape)}"
            )
        m = self.control(h, voices(h, ask.record))
        ask.record = replace(ask.record, voice=m)
        strength = self.select(h) * m[:, None]

        def reverse(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            *,
            bias: Tensor | None,
            scale: float,
            record: Record | None,
        ) -> Tensor:
            return receive(sending(q, k, scale, bias), v, strength)

        ask.operator = reverse
        q, k, v = self.split(h)
        return self.own.join(ask.attend(q, k, v, dropout=0.0, scale=scale_of(q)))


def voices(h: Tensor, record: Record) -> Tensor:
    """How much each token of h (B, N, D) may send before this block: (B, N)."""
    if record.voice is not None:
        return record.voice
    speaks = torch.arange(h.shape[1], device=h.device) >= record.layout.prefix
    said = speaks.to(h.dtype).expand(h.shape[:2])
    return said if record.valid is None else said * record.valid.to(h.dtype)


@dataclass(frozen=True)
class PruneLeaves:
    """Token step: the quietest patches go.

    Attributes:
        fraction: part of the patches that stays.
    """

    fraction: float

    def __call__(self, tokens: Tokens, attended: Ask) -> Tokens:
        record, prefix = tokens.record, tokens.prefix
        count = tokens.count - prefix
        keep = kept(count, self.fraction)
        if keep >= count:
            return tokens
        if record.voice is None:
            raise TokensError(
                "dependency-vit prunes tokens by how much they send, but the attention of this "
                "block has not said so; fit both to the same blocks"
            )
        voice = record.voice[:, prefix:].detach()
        if record.valid is not None:
            amount = record.valid[:, prefix:].sum(-1)
            stay = (amount.double() * self.fraction).floor().long().clamp(1, keep)
            chosen, _, _ = padded.highest(voice, record.valid, stay, keep, prefix)
            return tokens.keep(chosen)
        front = torch.arange(prefix, device=voice.device).expand(voice.shape[0], -1)
        return tokens.keep(torch.cat([front, loudest(voice, keep) + prefix], 1))


@dataclass(frozen=True)
class Dependency(Method):
    """Reversed attention, and with a prune_ratio the Lite form.

    Attributes:
        prune_ratio: part of the original patches that each pruning layer removes; 0 prunes
            nothing. The Lite model has 0.16.
        prune_layers: blocks behind whose attention patches go, counted from 1 as in the paper; by
            default 2, 5, 8 and 11 of 12, and the same parts of other depths.
        temperature: of the softmax that selects one head for each sender.
        seed: of what the head selector and the message controller begin with.
    """

    prune_ratio: float = 0.0
    prune_layers: tuple[int, ...] | None = None
    temperature: float = 0.1
    seed: int = 0
    needs_training = True

    def __post_init__(self) -> None:
        if not 0 <= self.prune_ratio < 1:
            raise SettingsError(
                f"prune_ratio is {self.prune_ratio}; expected a part of the patches, at least 0 "
                "and below 1"
            )
        if not self.temperature > 0:
            raise SettingsError(f"temperature is {self.temperature}; expected above 0")

    def fit(self, host: Host) -> list[Fill]:
        instead = "use one of its backbones, such as dependencyvit_tiny_patch16_224"
        if host.follows or host.decodes:
            raise FitError(
                f"dependency-vit rebuilds attention from its projections, but positions or a "
                f"causal order enter every attention of this {host.family} host; {instead}"
            )
        layers: Sequence[int] = ()
        if self.prune_ratio:
            layers = self.prune_layers if self.prune_layers is not None else usual(host.depth)
        shares = schedule(layers, self.prune_ratio, host.depth)
        rng = torch.Generator().manual_seed(self.seed)
        fills = []
        for i, view in enumerate(host.views):
            mixer = ReversedMixer(expect(view, "dependency-vit", instead), self.temperature, rng)
            step = PruneLeaves(shares[i]) if i in shares else None
            fills.append(Fill(mixer=mixer, tokens=step, asks=False, drops=step is not None))
        return fills

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        return [{}, {"prune_ratio": 0.08}, {"prune_ratio": 0.16}]


def usual(depth: int) -> tuple[int, ...]:
    """Layers 2, 5, 8 and 11 of 12, for another depth."""
    return tuple(sorted({math.ceil(depth * part / 12) for part in (2, 5, 8, 11)}))


def mixers(model: nn.Module) -> list[ReversedMixer]:
    """What :class:`Dependency` has put into a model, in the order of its blocks."""
    return [module for module in model.modules() if isinstance(module, ReversedMixer)]
