"""Uniform fake quantisation, and how its range is found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transom.errors import SettingsError

LEAST = 1e-8


@dataclass(frozen=True)
class Grid:
    """Integers that stand for scale · (code - zero).

    Attributes:
        scale, zero: scalars, or one a channel, shaped to broadcast.
        low, high: the smallest and largest code.
    """

    scale: Tensor
    zero: Tensor
    low: int
    high: int

    def codes(self, x: Tensor) -> Tensor:
        """Codes of x, as floating point; rounding (half to even) passes gradients straight on."""
        y = x / self.scale
        return (y + (y.round() - y).detach() + self.zero).clamp(self.low, self.high)

    def __call__(self, x: Tensor) -> Tensor:
        """The values that the codes of x stand for."""
        return self.scale * (self.codes(x) - self.zero)


def grid(low: Tensor, high: Tensor, bits: int = 8, symmetric: bool = False) -> Grid:
    """The grid for values between `low` and `high`.

    Asymmetric codes begin at 0. Symmetric ones are signed if any value is negative; the lowest
    of them is legal although the scale comes from the highest.

    Args:
        low, high: scalars, or one a channel, shaped to broadcast.
        bits: b, at least 2.
        symmetric: whether 0 stands for 0 and both sides have the same range.

    Raises:
        SettingsError: too few bits.
    """
    if bits < 2:
        raise SettingsError(f"bits is {bits}; expected at least 2")
    low, high = low.clamp(max=0), high.clamp(min=LEAST)
    if not symmetric:
        top = 2**bits - 1
        scale = ((high - low) / top).clamp(min=LEAST)
        return Grid(scale, (-low / scale).round().clamp(0, top), 0, top)
    signed = bool((low < 0).any())
    bottom, top = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    scale = torch.maximum(low.abs(), high) / top
    return Grid(scale.clamp(min=LEAST), torch.zeros_like(scale), bottom, top)


def span(x: Tensor, channel: int | None = None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value, of all or of each index of an axis (kept to broadcast)."""
    if channel is None:
        return x.min(), x.max()
    axes = [i for i in range(x.dim()) if i != channel % x.dim()]
    return x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)


class RunningRange:
    """Smallest and largest value, averaged over batches: m ← momentum · m + (1 - momentum) · new.

    Args:
        momentum: weight of what was there; the first batch sets it.
        percentile: of the values that are inside; 100 for all. The official code takes it the
            other way round here than for weights, and this does not.
    """

    def __init__(self, momentum: float = 0.9, percentile: float = 100.0) -> None:
        if not 0 <= momentum < 1 or not 50 < percentile <= 100:
            raise SettingsError(
                f"momentum is {momentum} and percentile {percentile}; expected momentum from 0 to "
                "below 1 and a percentile above 50, up to 100"
            )
        self.momentum, self.percentile = momentum, percentile
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def see(self, x: Tensor) -> None:
        """Take notice of a batch."""
        x = x.detach()
        if self.percentile < 100:
            low, high = quantile(x, 1 - self.percentile / 100), quantile(x, self.percentile / 100)
        else:
            low, high = span(x)
        if self.low is None or self.high is None:
            self.low, self.high = low, high
            return
        self.low = self.momentum * self.low + (1 - self.momentum) * low
        self.high = self.momentum * self.high + (1 - self.momentum) * high

    @property
    def seen(self) -> tuple[Tensor, Tensor]:
        """The range.

        Raises:
            SettingsError: no batch was seen.
        """
        if self.low is None or self.high is None:
            raise SettingsError("no batch was seen, so there is no range; call see(x) first")
        return self.low, self.high


def quantile(x: Tensor, part: float) -> Tensor:
    """Of all values, by linear interpolation; without a limit of their number."""
    flat = x.flatten()
    place = part * (flat.numel() - 1)
    below = int(place)
    values = flat.sort().values
    above = min(below + 1, flat.numel() - 1)
    return torch.lerp(values[below], values[above], place - below)


class ErrorRange:
    """The range with the smallest squared error, from a search over candidates.

    Losses add up over batches, and the smallest index wins. Symmetric grids, and values that all
    have one sign, are searched along one line: R i / n for i = 1 … n, R = max |x| + 0.5. Other
    values are searched over these widths and over shifts of the whole range by steps of its grid,
    up to a quarter of the codes in both directions.

    Args:
        bits, symmetric: of the grid.
        candidates: n.
    """

    def __init__(self, bits: int = 8, symmetric: bool = True, candidates: int = 100) -> None:
        self.bits, self.symmetric, self.candidates = bits, symmetric, candidates
        self.ranges: list[tuple[float, float]] = []
        self.losses: list[float] = []

    def see(self, x: Tensor) -> None:
        """Take notice of a batch; the first one fixes the candidates."""
        x = x.detach()
        if not self.ranges:
            self.ranges = self._candidates(x)
            self.losses = [0.0] * len(self.ranges)
        for i, (low, high) in enumerate(self.ranges):
            made = grid(x.new_tensor(low), x.new_tensor(high), self.bits, self.symmetric)
            self.losses[i] += float((x - made(x)).square().sum())

    def _candidates(self, x: Tensor) -> list[tuple[float, float]]:
        low, high = float(x.min()), float(x.max())
        reach = max(abs(low), high) + 0.5
        widths = [reach * i / self.candidates for i in range(1, self.candidates + 1)]
        if low >= 0:
            return [(0.0, width) for width in widths]
        if self.symmetric:
            return [(-width, width) for width in widths]
        if high <= 0:
            return [(-width, 0.0) for width in widths]
        found = []
        for width in widths:
            step = 2 * width / (2**self.bits - 1)
            for shift in range(2**self.bits // 4 + 1):
                for sign in (1, -1) if shift else (1,):
                    moved = sign * shift * step
                    found.append((-width + moved, width + moved))
        return found

    @property
    def seen(self) -> tuple[float, float]:
        """The range.

        Raises:
            SettingsError: no batch was seen.
        """
        if not self.ranges:
            raise SettingsError("no batch was seen, so there is no range; call see(x) first")
        return self.ranges[min(range(len(self.losses)), key=self.losses.__getitem__)]
