"""Check hyperparameters: against the annotations of a method's dataclass, and against a host."""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from transom.errors import SettingsError

T = TypeVar("T")


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


def freeze(method: Any) -> None:
    """Make tuples of the sequences among a method's fields, so that it can be compared and hashed.

    Args:
        method: an instance of a frozen dataclass.
    """
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if _listed(value):
            object.__setattr__(method, field.name, _frozen(value))


def _listed(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if _listed(value) else value


def named_blocks(layers: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """The blocks that a setting `layers` names.

    Args:
        layers: blocks counted from 0; None for those behind a quarter, a half and three quarters
            of the depth (3, 6, 9 of 12).
        depth: blocks of the host.

    Raises:
        SettingsError: the host has no such block.
    """
    if layers is None:
        return tuple(sorted({depth * part // 4 for part in (1, 2, 3)}))
    outside = [i for i in layers if not 0 <= i < depth]
    if outside:
        raise SettingsError(
            f"layers names block {outside[0]}, but the host has blocks 0 to {depth - 1}"
        )
    return tuple(layers)


def one_a_block(values: Sequence[T], depth: int, name: str, rest: T | None = None) -> list[T]:
    """The values of a setting that lists one for each block.

    Args:
        values: as given.
        depth: blocks of the host.
        name: of the setting, for the message.
        rest: value of the blocks behind the end of the list; None if all must be listed.

    Raises:
        SettingsError: the list is too long, or too short where nothing fills it up.
    """
    missing = depth - len(values)
    if missing < 0 or (missing and rest is None):
        raise SettingsError(f"{name} lists {len(values)} blocks, but the host has {depth}")
    return [*values, *([] if rest is None else [rest] * missing)]


def removals(r: int | Sequence[int]) -> None:
    """Refuse negative numbers of tokens to remove.

    Args:
        r: for every block, or one a block.

    Raises:
        SettingsError: one of them is negative.
    """
    if any(n < 0 for n in (r if isinstance(r, Sequence) else (r,))):
        raise SettingsError(
            f"r is {r!r}; expected tokens to remove a block: an integer >= 0 or a sequence of them"
        )


def counts_left(counts: Sequence[int], prefix: int) -> None:
    """Refuse numbers of tokens that leave no patch.

    Args:
        counts: tokens left behind each block, prefix included.
        prefix: prefix tokens of the host, which always stay.

    Raises:
        SettingsError: names the first number that is too small.
    """
    low = [n for n in counts if n <= prefix]
    if low:
        raise SettingsError(
            f"counts holds {low[0]}, but this host has {prefix} prefix tokens that always stay; "
            "expected more"
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
