"""The random control of decoders: a seeded random subset of the image tokens stays.

What chooses which image tokens a decoder goes on with has to beat it at equal token counts. The
draw depends on the seed, the layer and the number of image tokens of a prompt, not on what they
hold or on the rest of the batch. Text is never touched, positions stay what they were.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from transom.papers.baselines.random import Random
from transom.registry import Takes
from transom.slots import Ask, Fill
from transom.tokens import Tokens


@dataclass(frozen=True)
class KeepSome:
    """Token step behind a layer: a random subset of the image tokens of each prompt stays.

    Attributes:
        keep_rate: part of the image tokens that stays.
        count: tokens of the whole sequence that stay, instead of a rate.
        seed: of the draw.
    """

    keep_rate: float
    count: int | None
    seed: int

    def __call__(self, tokens: Tokens, attended: Ask) -> Tokens:
        visual = tokens.record.visual
        if visual is None:
            return tokens
        if tokens.record.valid is not None:
            visual = visual & tokens.record.valid
        gone = torch.zeros_like(visual)
        for row, seen in zip(gone, visual, strict=True):
            places = seen.nonzero()[:, 0]
            keep = self._kept(len(places), tokens.count)
            generator = torch.Generator().manual_seed(self.seed * 100003 + len(places))
            order = torch.randperm(len(places), generator=generator).to(places.device)
            row[places[order[keep:]]] = True
        return self._without(tokens, gone)

    def _kept(self, images: int, total: int) -> int:
        if self.count is None:
            return math.ceil(self.keep_rate * images)
        return min(max(images - (total - self.count), 0), images)

    def _without(self, tokens: Tokens, gone: Tensor) -> Tokens:
        left = (~gone).sum(1)
        if int(left.min()) == tokens.count:
            return tokens
        if tokens.record.valid is None and int(left.min()) == int(left.max()):
            order = gone.long().argsort(dim=1, stable=True)
            return tokens.keep(order[:, : int(left[0])])
        # prompts that lose different numbers stay side by side: what is gone is hidden
        valid = ~gone if tokens.record.valid is None else tokens.record.valid & ~gone
        return Tokens(tokens.x, replace(tokens.record, valid=valid))


@dataclass(frozen=True)
class RandomVisual(Random):
    """Random pruning of the image tokens inside a decoder.

    Attributes:
        keep_rate: part of the image tokens that stays behind a reducing layer; 0 lets all leave.
        layers: reducing layers, counted from 0; by default those at a quarter, a half and three
            quarters of the depth.
        counts: tokens left behind each layer, text included, instead of rates: the control of a
            method that ran with these counts.
        seed: of the draw.
    """

    may_empty: ClassVar[bool] = True
    takes: ClassVar[Takes] = "decoder"

    def _fill(self, block: int, count: int | None) -> Fill:
        step = KeepSome(self.keep_rate, count, self.seed * 1000 + block)
        return Fill(after=step, asks=False, drops=True)
