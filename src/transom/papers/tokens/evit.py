"""EViT: in a few blocks, keep the patches the class token attends to and condense the rest.

In a reducing block, between attention and ffn,

    a = mean over heads of softmax(q_cls Kᵀ / sqrt(d)), without the class token itself
    k = ceil(keep_rate · (N - 1)) tokens with the largest a stay, in that order
    f = sum of a_j x_j over the others, appended as one token (fuse_token)

x: (B, N, D) becomes (B, 1 + k, D), or (B, 2 + k, D) with the fused token. A fused token is an
ordinary token for later blocks. No new parameter; needs a class token. Works on an untouched
checkpoint, and better after training with the keep-rate schedule.

Source: Liang et al., Not All Patches are What You Need, ICLR 2022, sec. 3; official code
youweiliang/evit@5ca95a7 (Apache-2.0; this file is our own).

The row a is computed from q_cls·Kᵀ alone, so the block stays on its fused attention. It is taken
before attention dropout (the official code takes it after). Distillation and register tokens are
protected; in the official code the path with a distillation token does not run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.hosts.base import Host
from transom.ops import matching, padded, rows
from transom.registry import Method, Training
from transom.settings import named_blocks, one_a_block
from transom.slots import Ask, Fill
from transom.tokens import Tokens


@dataclass(frozen=True)
class KeepAttended:
    """Token step: keep what the class token attends to.

    Attributes:
        keep_rate: part of the patch tokens that stays.
        tokens: their number instead of a rate.
        fuse: condense the rest into one token.
    """

    keep_rate: float
    tokens: int | None
    fuse: bool

    def __call__(self, tokens: Tokens, attended: Ask) -> Tokens:
        prefix, count = tokens.prefix, tokens.count - tokens.prefix
        k = kept(count, self.keep_rate, self.tokens)
        if k >= count:
            return tokens
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.fuse):
            attention = attended.class_row()[:, prefix:]  # (B, T)
        stay, rest, lead = self._chosen(attention.detach(), tokens.record.valid, k, prefix)
        if not self.fuse:
            return tokens.keep(stay)
        weight = attention.gather(1, rest - prefix)[:, None]  # (B, 1, R)
        return tokens.fuse(stay, rest, weight @ rows.take(tokens.x, rest), lead)

    def _chosen(
        self, attention: Tensor, valid: Tensor | None, k: int, prefix: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Positions that stay, positions of the others, and the best of the others."""
        if valid is not None:
            amount = valid[:, prefix:].sum(-1)
            some = padded.quota(amount, self.keep_rate)
            some = some if self.tokens is None else amount.clamp(max=k)
            return padded.highest(attention, valid, some, k, prefix)
        order = matching.descending(attention)
        front = torch.arange(prefix, device=order.device).expand(order.shape[0], -1)
        stay = torch.cat([front, order[:, :k] + prefix], 1)
        return stay, order[:, k:].sort(-1).values + prefix, order[:, k : k + 1] + prefix


def kept(count: int, keep_rate: float, tokens: int | None = None) -> int:
    """How many of `count` patch tokens stay."""
    return math.ceil(keep_rate * count) if tokens is None else tokens


def keep_rate_schedule(
    iteration: int, base: float, start_epoch: int, end_epoch: int, iterations_per_epoch: int
) -> float:
    """Keep rate while training from scratch: 1, then a cosine down to the base rate.

    Args:
        iteration: counted from 0 over the whole training.
        base: rate after the schedule.
        start_epoch: first epoch with a rate below 1.
        end_epoch: first epoch with the base rate.
        iterations_per_epoch: steps of one epoch.

    Returns:
        The rate at this iteration, for ``transom.adjust(model, keep_rate=...)``.
    """
    epoch = iteration // iterations_per_epoch
    if epoch < start_epoch:
        return 1.0
    if epoch >= end_epoch:
        return base
    passed = iteration - start_epoch * iterations_per_epoch
    total = (end_epoch - start_epoch) * iterations_per_epoch
    return base + (1 - base) * (1 + math.cos(math.pi * passed / total)) / 2


@dataclass(frozen=True)
class EViT(Method):
    """Token reorganisation by class attention.

    Attributes:
        keep_rate: part of the patch tokens that stays in a reducing block; a sequence gives one
            rate a block, and blocks with rate 1 do not reduce.
        layers: reducing blocks when keep_rate is one number; by default those behind a quarter,
            a half and three quarters of the depth (3, 6, 9 of 12).
        fuse_token: condense the other tokens into one.
        override: rate that replaces keep_rate in the blocks that reduce (one number, or one a
            block): the call-time rate of the official model, set with transom.adjust.
        tokens: number of patch tokens that stay in a reducing block instead of a rate.
    """

    keep_rate: float | tuple[float, ...] = 0.7
    layers: tuple[int, ...] | None = None
    fuse_token: bool = False
    override: float | tuple[float, ...] | None = None
    tokens: int | None = None
    needs_class_token = True

    def __post_init__(self) -> None:
        for name in ("keep_rate", "override"):
            value = getattr(self, name)
            if value is not None and any(not 0 < rate <= 1 for rate in _many(value)):
                raise SettingsError(
                    f"{name} is {value!r}; expected the part of patch tokens that stays: above 0, "
                    "at most 1"
                )
        if self.tokens is not None and self.tokens < 1:
            raise SettingsError(f"tokens is {self.tokens!r}; expected an integer of at least 1")

    def fit(self, host: Host) -> list[Fill]:
        rates = self._rates(host.depth)
        calls = [1.0 if r >= 1 else o for r, o in zip(rates, self._overrides(rates), strict=True)]
        fills = []
        for built, rate in zip(rates, calls, strict=True):
            reduces = built < 1 and (rate < 1 or self.tokens is not None)
            step = KeepAttended(rate, self.tokens, self.fuse_token) if reduces else None
            fills.append(Fill(tokens=step, drops=reduces and not self.fuse_token))
        return fills

    def _rates(self, depth: int) -> list[float]:
        if isinstance(self.keep_rate, tuple):
            return one_a_block(self.keep_rate, depth, "keep_rate")
        layers = named_blocks(self.layers, depth)
        return [self.keep_rate if i in layers else 1.0 for i in range(depth)]

    def _overrides(self, rates: list[float]) -> list[float]:
        if self.override is None:
            return rates
        if isinstance(self.override, tuple):
            return one_a_block(self.override, len(rates), "override")
        return [self.override] * len(rates)

    def training(self, start: float = 0.0, end: float = 1 / 3, **options: Any) -> Training:
        """The keep-rate schedule of the paper.

        Args:
            start: part of the training before the rate begins to fall.
            end: part of the training at which it has reached keep_rate (the paper: 1/3).
            **options: none.

        Raises:
            SettingsError: an option is unknown, or the parts are out of order.
        """
        if options:
            raise SettingsError(f"evit's training has no {list(options)}; it has start and end")
        if not 0 <= start <= end <= 1:
            raise SettingsError(
                f"evit's training has start {start!r} and end {end!r}; expected 0 <= start <= end "
                "<= 1"
            )
        return Shrink(self, start, end)

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        return [{"keep_rate": rate} for rate in (0.9, 0.7, 0.5)]

    @classmethod
    def removing(cls, removed: Sequence[int], patches: int) -> dict[str, Any]:
        rates = []
        for r in removed:
            # ceil(rate·T) is T - r for any rate a little below (T - r)/T
            rates.append(1.0 if not r else (patches - r - 0.25) / patches)
            patches -= r
        return {"keep_rate": tuple(rates)}

    @classmethod
    def neutral(cls) -> dict[str, Any]:
        return {"keep_rate": 1.0}


@dataclass(frozen=True)
class Shrink(Training):
    """Keep rate from 1 down to that of the method, step by step.

    Attributes:
        method: with the final rates.
        start: part of the training before the rate begins to fall.
        end: part of the training at which it has arrived.
    """

    method: EViT
    start: float
    end: float

    def at_step(self, model: nn.Module, step: int, total: int) -> Mapping[str, Any]:
        if self.method.tokens is not None:  # a number of tokens has no rate to shrink
            return {}
        final = self.method.keep_rate if self.method.override is None else self.method.override
        first, last = round(self.start * total), round(self.end * total)
        rates = [keep_rate_schedule(step, rate, first, last, 1) for rate in _many(final)]
        return {"override": tuple(rates) if isinstance(final, tuple) else rates[0]}


def _many(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)
