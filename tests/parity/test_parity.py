"""Numerical parity with the official implementations, one test a golden case."""

from __future__ import annotations

import importlib
import importlib.util

import pytest

from .golden import Golden


def test_parity(golden: Golden) -> None:
    name = f"{__package__}.runners.{golden.slug.replace('-', '_')}"
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"not implemented: {golden.slug}")
    kinds = importlib.import_module(name).KINDS
    if golden.kind not in kinds:
        pytest.skip(f"not implemented: kind {golden.kind!r} of {golden.slug}")
    golden.run(kinds[golden.kind])
