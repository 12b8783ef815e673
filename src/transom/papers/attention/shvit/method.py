"""Single-head attention in place of the attention of a host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from transom.errors import FitError, SettingsError
from transom.hosts.base import Host
from transom.papers.attention.shvit.attention import SHSA
from transom.registry import Method
from transom.slots import Ask, Fill


class Mixer(nn.Module):
    """SHSA over a sequence of tokens."""

    def __init__(self, shsa: SHSA) -> None:
        super().__init__()
        self.shsa = shsa

    def forward(self, h: Tensor, ask: Ask) -> Tensor:
        """Mixed tokens (B, N, D) of normed ones."""
        return self.shsa.tokens(h, ask.bias, None if ask.record is None else ask.record.valid)


@dataclass(frozen=True)
class SingleHead(Method):
    """Single-head attention on a part of the channels of a host.

    Attributes:
        partial_ratio: part of the channels that attends; 3 of 14 in the paper's largest network.
        qk_dim: width of queries and keys.
    """

    partial_ratio: float = 3 / 14
    qk_dim: int = 16
    needs_training = True

    def __post_init__(self) -> None:
        if not 0 < self.partial_ratio <= 1:
            raise SettingsError(
                f"partial_ratio is {self.partial_ratio!r}; expected above 0, at most 1"
            )
        if self.qk_dim < 1:
            raise SettingsError(f"qk_dim is {self.qk_dim!r}; expected an integer of at least 1")

    def fit(self, host: Host) -> list[Fill]:
        if host.decodes:
            raise FitError(
                f"{self.slug} lets every token see every other and norms over all of them, which "
                f"this {host.family} must not: it decodes token by token"
            )
        like = next(host.root.parameters())
        partial = max(1, round(self.partial_ratio * host.width))
        return [
            Fill(mixer=Mixer(SHSA(host.width, self.qk_dim, partial)).to(like))
            for _ in range(host.depth)
        ]

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        return [{"partial_ratio": 0.75}, {"partial_ratio": 0.5}, {}]
