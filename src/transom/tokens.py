"""The travelling record: features, sizes and origins of the tokens between two blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transom.errors import TokensError
from transom.ops import merging, rows
from transom.ops.matching import Matching


@dataclass(frozen=True)
class Layout:
    """How the original sequence is laid out.

    Attributes:
        prefix: leading tokens that are no patches (class, distillation, registers).
        grid: (h, w) of the patches behind them; None when it is not known.
        count: tokens of the original sequence, prefix included.
    """

    prefix: int
    grid: tuple[int, int] | None
    count: int


@dataclass(frozen=True)
class Record:
    """What is known of the tokens beside their features.

    Attributes:
        layout: of the original sequence.
        size: (B, N, 1) float32, how many original tokens each one stands for; None when all are
            one.
        index: (B, N0) int64, current position of every original token, -1 once dropped; None
            when nobody asked for it.
        valid: (B, N) bool, False for padding; None when there is none.
        home: (B, N) int64, original position at which each token stands (a merged token where
            its destination stood); None when the host's positions need not follow.
        visual: (B, N) bool, which tokens stand for pieces of images in a sequence with text; None
            when unknown.
        words: (B, N) int64, ids of the words the tokens were made from; None when unknown.
        voice: (B, N) how much each token still sends, which a fitted attention passes on from block
            to block; None when none does.
    """

    layout: Layout
    size: Tensor | None = None
    index: Tensor | None = None
    valid: Tensor | None = None
    home: Tensor | None = None
    visual: Tensor | None = None
    words: Tensor | None = None
    voice: Tensor | None = None

    def sources(self, count: int) -> Tensor:
        """0/1 membership (B, count, N0): which original tokens each current one stands for.

        Args:
            count: number of current tokens.

        Raises:
            ValueError: provenance was not recorded.
        """
        if self.index is None:
            raise ValueError("where tokens went was not recorded: run inside transom.trace(model)")
        places = torch.arange(count, device=self.index.device)[None, :, None]
        return (self.index[:, None] == places).float()

    def images(self, slug: str) -> Tensor | None:
        """(B, N) bool: the tokens of images that are there; None if the prompts hold none.

        Args:
            slug: of the method that needs them.

        Raises:
            TokensError: there were some, but they left in an earlier block.
        """
        if self.visual is None:
            return None
        seen = self.visual if self.valid is None else self.visual & self.valid
        if seen.any():
            return seen
        # they left, or they are hidden
        if self.visual.shape[1] < self.layout.count or self.visual.any():
            raise TokensError(
                f"{slug} needs image tokens in a block behind the one where another method let "
                f"all of them leave; fit {slug} to earlier blocks, or let them leave later"
            )
        return None

    def as_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split x (B, N, D) into its prefix and a map, for what needs the grid.

        Returns:
            The prefix (B, P, D) and the patches (B, h, w, D).

        Raises:
            TokensError: the grid is not known, or the tokens are no longer the original ones.
        """
        prefix, grid = self.layout.prefix, self.layout.grid
        if grid is None or x.shape[1] != self.layout.count or self.size is not None:
            state = f"{x.shape[1]} tokens" if grid else "a grid that is not known"
            raise TokensError(
                f"a fitted method works on the grid of the patches, but this block has {state} "
                f"where {self.layout.count} in their original places were expected; fit it "
                "without a method that reduces tokens, or in the blocks before one"
            )
        return x[:, :prefix], x[:, prefix:].unflatten(1, grid)


@dataclass(frozen=True)
class Tokens:
    """Features (B, N, D) and their record. Every change returns a new object."""

    x: Tensor
    record: Record

    @property
    def prefix(self) -> int:
        """Number of leading tokens that no method touches."""
        return self.record.layout.prefix

    @property
    def count(self) -> int:
        """Number of tokens now, prefix included."""
        return self.x.shape[1]

    @property
    def size(self) -> Tensor | None:
        """(B, N, 1) float32, or None when every token stands for itself."""
        return self.record.size

    def _after(
        self, x: Tensor, matching: Matching, size: Tensor | None, lead: Tensor | None = None
    ) -> Tokens:
        """New features and sizes, with origins, padding and places moved along.

        A token beyond those kept takes the place of `lead` (B, 1).
        """
        index, valid, home = self.record.index, self.record.valid, self.record.home
        visual, words, voice = self.record.visual, self.record.words, self.record.voice
        stays = matching.keep if lead is None else torch.cat([matching.keep, lead], 1)
        if home is not None:
            home = home.gather(1, stays)
        if visual is not None:
            visual = visual.gather(1, stays)
        if words is not None:
            words = words.gather(1, stays)
        if voice is not None:
            voice = voice.gather(1, stays)
        if index is not None:
            target = matching.target(self.count)
            index = torch.where(index < 0, index, target.gather(1, index.clamp(min=0)))
        if valid is not None:
            # a token is padding only if all it stands for is
            stays = valid.gather(1, matching.keep).float()
            joins = valid.gather(1, matching.source).float()
            fresh = stays.new_zeros(stays.shape[0], x.shape[1] - stays.shape[1])
            total = torch.cat([stays, fresh], 1).scatter_add(1, matching.into, joins)
            valid = total > 0
        record = replace(
            self.record,
            size=size,
            index=index,
            valid=valid,
            home=home,
            visual=visual,
            words=words,
            voice=voice,
        )
        return Tokens(x, record)

    def merge(
        self, matching: Matching, *, weighted: bool = True, shares: Tensor | None = None
    ) -> Tokens:
        """Sources flow into the tokens that stay.

        Args:
            matching: of the current tokens.
            weighted: by size; else the plain mean of each group, and sizes are still counted.
            shares: (B, R, 2) of each source and of its destination, see
                :func:`transom.ops.merging.ensemble`; None for the mean.

        Returns:
            The tokens that stay, in the order of `matching.keep`.
        """
        size, valid = self.size, self.record.valid
        if shares is not None:
            return self._ensemble(matching, shares)
        weight = size if weighted else None
        if valid is not None:
            # padding stands for nothing and weighs next to nothing: a group of padding has a mean
            one = valid.to(torch.float32)[..., None]
            weight = (one if weight is None else weight * one).clamp(min=1e-30)
            size = one if size is None else size * one
        if weight is size:
            x, total = merging.merge_by_size(self.x, matching, size)
            return self._after(x, matching, total)
        total = merging.merged_size(size, matching, torch.float32)
        x = merging.merge(self.x, matching, "mean", weight)
        return self._after(x, matching, total)

    def _ensemble(self, matching: Matching, shares: Tensor) -> Tokens:
        """Merge with new weights in each pair; padding neither adds nor corrects anything."""
        size, valid = self.size, self.record.valid
        if valid is not None:
            one = valid.to(torch.float32)[..., None]
            size = one if size is None else size * one
            real = valid.gather(1, matching.source)[..., None]
            shares = torch.where(real, shares, 0.5)
        total = merging.merged_size(size, matching, torch.float32)
        x = merging.ensemble(self.x, matching, shares, size, total.clamp(min=1))
        return self._after(x, matching, total)

    def keep(self, index: Tensor) -> Tokens:
        """Only the tokens at `index` (B, K) stay, in that order; the others are dropped."""
        size = None if self.size is None else rows.take(self.size, index)
        nothing = index[:, :0]
        return self._after(rows.take(self.x, index), Matching(index, nothing, nothing), size)

    def fuse(self, index: Tensor, rest: Tensor, fused: Tensor, lead: Tensor) -> Tokens:
        """The tokens at `index` stay, and those at `rest` become one token behind them.

        Args:
            index: (B, K) positions that stay.
            rest: (B, R) positions that are condensed.
            fused: (B, 1, D) features of the new token.
            lead: (B, 1) position of the token whose place the new one takes.

        Returns:
            K + 1 tokens.
        """
        size = self.size
        if size is not None:
            gone = rows.take(size, rest).sum(1, keepdim=True)
            size = torch.cat([rows.take(size, index), gone], 1)
        last = torch.full_like(rest, index.shape[1])
        x = torch.cat([rows.take(self.x, index), fused], 1)
        return self._after(x, Matching(index, rest, last), size, lead)


def with_guests(record: Record, count: int) -> Record:
    """The record of the same tokens with `count` guests behind them.

    A guest is real, stands for itself alone, and belongs behind the original sequence.
    """

    def longer(x: Tensor | None, value: float) -> Tensor | None:
        if x is None:
            return None
        return torch.cat([x, x.new_full((x.shape[0], count, *x.shape[2:]), value)], 1)

    home = record.home
    if home is not None:
        behind = torch.arange(count, device=home.device) + record.layout.count
        home = torch.cat([home, behind.expand(len(home), -1)], 1)
    return replace(
        record,
        size=longer(record.size, 1),
        valid=longer(record.valid, True),
        home=home,
        visual=longer(record.visual, False),
        words=longer(record.words, 0),
        voice=longer(record.voice, 1),
    )


def without_guests(record: Record, count: int) -> Record:
    """The record without the last `count` tokens, which are guests."""

    def shorter(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:, :-count]

    return replace(
        record,
        size=shorter(record.size),
        valid=shorter(record.valid),
        home=shorter(record.home),
        visual=shorter(record.visual),
        words=shorter(record.words),
        voice=shorter(record.voice),
    )


def restore(x: Tensor, record: Record, missing: Tensor | None = None) -> Tensor:
    """The full sequence again: every original token gets the features it now lives in.

    Args:
        x: (B, N, D) features of the current tokens.
        record: with provenance (see :func:`transom.trace`).
        missing: (B, N0, D) features for dropped tokens; zeros when None.

    Returns:
        (B, N0, D) in the original order.

    Raises:
        ValueError: provenance was not recorded.
    """
    if record.index is None:
        raise ValueError("where tokens went was not recorded: run inside transom.trace(model)")
    return merging.spread(x, record.index, missing)


def representatives(index: Tensor, count: int) -> Tensor:
    """One original token of each current one, so that a restored sequence can be reduced again.

    Args:
        index: (B, N0) current position of every original token, -1 where dropped.
        count: number of current tokens.

    Returns:
        (B, count) int64 positions in the original sequence.
    """
    batch, total = index.shape
    places = torch.arange(total, device=index.device).expand(batch, -1)
    # dropped tokens write into a spare column that is cut off
    home = torch.where(index < 0, count, index)
    out = index.new_zeros(batch, count + 1)
    return out.scatter_reduce(1, home, places, "amax", include_self=True)[:, :count]
