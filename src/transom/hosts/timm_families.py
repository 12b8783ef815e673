"""Finding transformers of timm by class."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import cache

from torch import nn

Families = tuple[tuple[str, str], ...]


@cache
def classes(families: Families) -> dict[type[nn.Module], str]:
    """The classes that the installed timm has.

    Args:
        families: module below `timm.models` and name of the class, for each.

    Returns:
        Name of the family by class.
    """
    found = {}
    for module, name in families:
        try:
            found[getattr(importlib.import_module(f"timm.models.{module}"), name)] = name
        except (ImportError, AttributeError):
            continue  # an earlier timm has fewer of them
    return found


def members(model: nn.Module, families: Families) -> Iterator[tuple[str, nn.Module, str]]:
    """Path, module and family of every such transformer in `model`."""
    known = classes(families)
    for name, module in model.named_modules():
        family = next((f for cls, f in known.items() if isinstance(module, cls)), None)
        if family is not None:
            yield name, module, family
