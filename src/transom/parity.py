"""What the last recorded parity run said of every paper.

The record is `data/parity.json`, written by `pytest tests/parity --record` in a checkout: for each
slug how many golden cases of the official implementation passed and how many failed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True)
class Parity:
    """Outcome of the golden cases of one paper.

    Attributes:
        passed: cases that agree within their tolerance.
        failed: cases that do not.
    """

    passed: int
    failed: int

    def __str__(self) -> str:
        total = self.passed + self.failed
        return f"{self.passed} of {total} golden cases of the official implementation pass"


@cache
def parity() -> dict[str, Parity]:
    """The record, by slug; papers without golden cases are not in it."""
    text = resources.files("transom").joinpath("data/parity.json").read_text(encoding="utf-8")
    return {slug: Parity(**counts) for slug, counts in json.loads(text).items()}


def is_red(slug: str) -> bool:
    """Whether a golden case of this method fails, so that no speed may be shown for it."""
    found = parity().get(slug)
    return found is not None and found.failed > 0
