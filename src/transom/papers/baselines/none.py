"""The neutral method: the fitted flow with every slot as the host has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transom.hosts.base import Host
from transom.registry import Method
from transom.slots import Fill


@dataclass(frozen=True)
class NoOp(Method):
    """Nothing is filled. What it costs is what the engine costs."""

    def fit(self, host: Host) -> list[Fill]:
        return [Fill()] * host.depth

    @classmethod
    def neutral(cls) -> dict[str, Any]:
        return {}
