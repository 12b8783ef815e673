"""Check hyperparameters against the annotations of a method's dataclass."""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Sequence
from typing import Any

from transom.errors import SettingsError


def check(method: Any, slug: str) -> None:
    """Refuse values of another type than a method's fields are annotated with.

    A list stands for a tuple and an integer for a float; True is no number, and no number may be
    NaN or infinite. Annotations other than numbers, bool, str, None, Literal, tuples and unions of
    these are not looked into.

    Args:
        method: a dataclass instance.
        slug: for the message.

    Raises:
        SettingsError: names the first field with a wrong value.
    """
    hints = typing.get_type_hints(type(method))
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if not _fits(value, hints[field.name]):
            raise SettingsError(
                f"{slug}: {field.name} is {value!r}; expected {_words(hints[field.name])}"
            )


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is typing.Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            return False
        if inner[-1] is Ellipsis:
            return all(_fits(one, inner[0]) for one in value)
        return len(value) == len(inner) and all(map(_fits, value, inner))
    if hint is type(None):
        return value is None
    if hint in (int, float):
        if isinstance(value, bool):
            return False
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and math.isfinite(value)
    return isinstance(value, hint) if hint in (bool, str) else True


NAMES = {int: "an integer", float: "a number", bool: "True or False", str: "a word"}


def _words(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        words = [_words(one) for one in inner]
        return f"{', '.join(words[:-1])} or {words[-1]}"
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return f"a sequence of which each is {_words(inner[0])}"
        return f"({', '.join(map(_words, inner))})"
    return NAMES.get(hint, "None" if hint is type(None) else str(hint))
