"""Which keys a query sees: the neighbour rule of one axis, in plain integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from transom.errors import SettingsError

T = TypeVar("T", int, bool)
Ints = int | Sequence[int]
Bools = bool | Sequence[bool]


@dataclass(frozen=True)
class Axis:
    """The window along one axis.

    Attributes:
        length: positions of the axis.
        kernel: keys that a query sees.
        stride: neighbouring queries that share the window of their leader.
        dilation: distance between the keys of a window; positions with the same remainder form
            a group, and a query sees keys of its own group only.
        causal: no key behind the query; the window is cut at the start instead of shifted.
    """

    length: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def __post_init__(self) -> None:
        if self.kernel < 2:
            raise SettingsError(f"kernel_size is {self.kernel}; expected at least 2 on every axis")
        if self.dilation < 1 or not 1 <= self.stride <= self.kernel:
            raise SettingsError(
                f"stride {self.stride} and dilation {self.dilation} do not go with kernel_size "
                f"{self.kernel}; expected 1 <= stride <= kernel_size and dilation >= 1"
            )
        if self.kernel * self.dilation > self.length:
            raise SettingsError(
                f"a window of kernel_size {self.kernel} and dilation {self.dilation} spans "
                f"{self.kernel * self.dilation} positions, but the axis has {self.length}; use a "
                "smaller window or dilation, or more tokens"
            )

    def group(self, remainder: int) -> int:
        """Positions in the group of this remainder."""
        return -(-(self.length - remainder) // self.dilation)

    def window(self, i: int, n: int) -> tuple[int, int]:
        """First key and the one behind the last that query i of a group of n sees.

        Both count inside the group. Neither ever falls as i grows.
        """
        first = i // self.stride * self.stride
        if self.causal:
            leader = min(first + self.stride - 1, n - 1)
            return max(leader - self.kernel + 1, 0), i + 1
        left, right = self.kernel // 2, (self.kernel - 1) // 2
        leader = min(first + self.stride // 2, n - 1)
        start = max(leader - left, 0)
        if leader + right >= n:
            start += n - right - leader - 1
        return start, start + self.kernel


def axes(
    shape: Sequence[int],
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
) -> tuple[Axis, ...]:
    """The window along every axis of a grid.

    Args:
        shape: of the grid, one to three lengths.
        kernel_size, stride, dilation, is_causal: one value, or one an axis.

    Raises:
        SettingsError: a value is out of range or the numbers of axes differ.
    """
    rank = len(shape)
    if not 1 <= rank <= 3:
        raise SettingsError(f"a grid of shape {tuple(shape)} has {rank} axes; expected 1, 2 or 3")
    kernels = per_axis("kernel_size", kernel_size, rank)
    strides = per_axis("stride", stride, rank)
    dilations = per_axis("dilation", dilation, rank)
    causals = per_axis("is_causal", is_causal, rank)
    return tuple(map(Axis, shape, kernels, strides, dilations, causals))


def per_axis(name: str, value: T | Sequence[T], rank: int) -> tuple[T, ...]:
    """One value an axis."""
    if isinstance(value, int):
        return (value,) * rank
    if len(value) != rank:
        raise SettingsError(
            f"{name} is {tuple(value)}, which is {len(value)} values for {rank} axes; expected one "
            "value, or one an axis"
        )
    return tuple(value)


def mask(axis: Axis, device: torch.device | None = None) -> Tensor:
    """(L, L) bool: does the query of a row see the key of a column?"""
    key = torch.arange(axis.length, device=device)
    rows = []
    for x in range(axis.length):
        remainder = x % axis.dilation
        start, stop = axis.window(x // axis.dilation, axis.group(remainder))
        place = (key - remainder) // axis.dilation
        inside = (place >= start) & (place < stop)
        rows.append(inside & (key % axis.dilation == remainder))
    return torch.stack(rows)
