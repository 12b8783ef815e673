"""What stands in front of the blocks: the slots `tokenizer` and `position`, one of each a host.

A method that fills them returns a :class:`Front`. The adapter's :class:`FrontView` is put over the
host's patch embedding and over the place where positions are added when the first such method is
fitted, and runs the host's own code for every slot that is empty.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

Embed = Callable[[Tensor], Tensor]


class Tokenizer(Protocol):
    """Fills the slot `tokenizer`."""

    def __call__(self, pixels: Tensor, embed: Embed, patch: tuple[int, int]) -> Tensor:
        """Patches, channels last: a map (B, h, w, D), or laid out as `embed` lays them out.

        Args:
            pixels: (B, C, H, W).
            embed: the host's own patch embedding, pixels -> (B, N, D) or (B, h, w, D).
            patch: height and width of its patches in pixels.
        """


class Position(Protocol):
    """Fills the slot `position`: what the host adds to its patches is left out."""

    def __call__(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches (B, h·w, D), row by row, with positions.

        Args:
            x: patches without any.
            grid: (h, w).
        """


@dataclass(frozen=True)
class Front:
    """What one method puts in front of the blocks; None leaves a slot empty."""

    tokenizer: Tokenizer | None = None
    position: Position | None = None

    def slots(self) -> set[str]:
        """Names of the slots that are filled."""
        taken = {"tokenizer": self.tokenizer, "position": self.position}
        return {name for name, part in taken.items() if part is not None}

    def parts(self) -> tuple[object, ...]:
        """What fills a slot, in a fixed order; None where nothing does."""
        return (self.tokenizer, self.position)

    def joined(self, other: Front) -> Front:
        """Both; their slots differ."""
        return Front(self.tokenizer or other.tokenizer, self.position or other.position)


class FrontView(ABC):
    """An adapter's view of what stands in front of the blocks.

    Attributes:
        fill: what is in the slots now.
    """

    def __init__(self) -> None:
        self.fill = Front()

    @abstractmethod
    def install(self) -> Iterable[Any]:
        """Put this view over the host, as a sequence of :class:`transom.hosts.base.Change`.

        Raises:
            FitError: the host's embedding is not made so that it could be replaced.
        """
