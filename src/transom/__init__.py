"""transom: published ideas about attention and tokens, fitted to the transformer you run."""

from __future__ import annotations

__version__ = "0.1.0"

from transom import registry
from transom.api import adjust, apply, fittings, load, remove, save, trace
from transom.errors import TransomError
from transom.fitting import Fitting
from transom.fold import fold
from transom.lens.capture import capture, intervene
from transom.tokens import restore

__all__ = [
    "Fitting",
    "TransomError",
    "adjust",
    "apply",
    "capture",
    "compare",
    "fittings",
    "fold",
    "intervene",
    "load",
    "look",
    "registry",
    "remove",
    "restore",
    "save",
    "trace",
]

registry.rooms()  # backbones register with timm when their rooms are imported


def __getattr__(name: str) -> object:
    # measuring needs matplotlib and friends, fitting does not
    if name == "compare":
        from transom.measure.compare import compare

        return compare
    if name == "look":
        from transom.lens.look import look

        return look
    raise AttributeError(f"module 'transom' has no attribute {name!r}")
