"""Which methods meet which hosts, with which settings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import transom
from tests.common.hosts import DEPTH, HOSTS, call, images
from transom import registry
from transom.errors import FitError

# Methods for decoders meet their hosts in tests/zoo/test_decoders.py.
METHODS = sorted(slug for slug, cls in registry.methods().items() if cls.takes == "encoder")

# Every method meets these, and every host meets the two methods below; the rest of the cross
# product is slow by its sheer number.
CORE = ("timm-class", "timm-registers", "timm-average", "hf-vit", "hf-dinov2")
# One that merges, asks for keys and counts sizes, and one that drops.
MERGES, DROPS = "tome", "random"


def pairs() -> list[Any]:
    """Every (method, host)."""
    return [
        pytest.param(
            method,
            host,
            marks=() if host in CORE or method in (MERGES, DROPS) else pytest.mark.slow,
            id=f"{method}-{host}",
        )
        for method in METHODS
        for host in HOSTS
    ]


def strongest(method: str, depth: int = DEPTH, patches: int = 16) -> dict[str, Any]:
    """The settings of a method that change a small host most."""
    return registry.methods()[method].grid(depth, patches)[-1]


def fitted(model: nn.Module, method: str, **options: Any) -> nn.Module:
    """`model` with a method at its strongest; skips where the method has a need the host lacks."""
    torch.manual_seed(0)  # new parameters may be drawn
    try:
        return transom.apply(model, method, **{**strongest(method), **options})
    except FitError as error:
        pytest.skip(str(error))


def bites(model: nn.Module) -> bool:
    """Whether anything fills a slot of a fitted model."""
    fitted = transom.fittings(model)
    return any(fill.slots() for f in fitted for fill in (*f.fills, f.front))


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether two outputs are the same bit for bit."""
    return len(got) == len(expected) and all(
        torch.equal(a, b) for a, b in zip(got, expected, strict=True)
    )


def close(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    """Assert that two outputs have the same shapes and nearly the same values."""
    assert [t.shape for t in got] == [t.shape for t in expected]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def anatomy(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Everything a model consists of: classes, attributes, parameters, children, hooks.

    Two anatomies are equal when every name is there in both and stands for the same object.
    """
    found: dict[tuple[str, str], Any] = {}
    for name, module in model.named_modules():
        found[name, "class"] = type(module)
        for key, value in vars(module).items():
            inner = value.items() if isinstance(value, dict) else ()
            found[name, key] = tuple((k, Same(v)) for k, v in inner) or Same(value)
    return found


class Same:
    """Equal when it is the same object; keeps it alive, so that its id is not used again."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and (
            self.value is other.value or (_plain(self.value) and self.value == other.value)
        )

    def __hash__(self) -> int:
        return hash(type(self.value))

    def __repr__(self) -> str:
        return repr(self.value)


def _plain(value: Any) -> bool:
    return isinstance(value, int | float | str | tuple | dict | None)


@contextlib.contextmanager
def unchanged(model: nn.Module, x: Tensor | None = None) -> Iterator[None]:
    """Assert that nothing about a model, nor what it makes of x, changes in this context."""
    x = images("timm-class") if x is None else x
    before, keys = anatomy(model), list(model.state_dict())
    with torch.no_grad():
        out = call(model, x)
    yield
    assert anatomy(model) == before
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert same(call(model, x), out)
