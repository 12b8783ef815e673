"""Settings that meet a budget of floating point operations, found by measuring.

A method is turned up along a :class:`Dial`, from mild to strong. Methods that can be told how many
tokens to remove in which block are turned by the part of the patches they remove, evenly over the
blocks, when their own number is an integer, which would be too coarse; all others along the
straight line through the settings of their own grid, from the neutral ones on and beyond its end
for as long as the method takes them. :func:`meet` bisects on the dial; each try is one fitted
model whose operations are counted while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from transom import registry
from transom.errors import SettingsError
from transom.registry import Method

NEAR = 0.002  # of the plain host's operations below the budget is near enough
TRIES = 14
BEYOND = 8.0  # steps of the grid that are tried behind its ends


@dataclass(frozen=True)
class Dial:
    """Settings of one method from mild to strong.

    Attributes:
        low, high: the ends.
        at: place between them -> settings; SettingsError where the method takes none.
    """

    low: float
    high: float
    at: Callable[[float], dict[str, Any]]


class Met(NamedTuple):
    """What a search found.

    settings: the mildest ones found that meet the budget; None when none does.
    reason: why there are none.
    """

    settings: dict[str, Any] | None
    reason: str = ""


def check(budget: float) -> None:
    """Refuse what is no part of the plain host's operations.

    Raises:
        SettingsError: It is not above 0 and below 1.
    """
    if not 0 < budget < 1:
        raise SettingsError(
            f"budget is {budget!r}; expected a part of the plain host's GFLOPs: above 0, below 1"
        )


def dial(cls: type[Method], fixed: Mapping[str, Any], depth: int, patches: int) -> Dial | str:
    """The dial of a method on a host; in words why there is none.

    Args:
        cls: the method.
        fixed: settings that stay as they are.
        depth: blocks of the host.
        patches: patch tokens of the host.
    """
    points = [{**_defaults(cls), **point} for point in cls.grid(depth, patches)]
    turned = sorted({name for p in points for name in p if p[name] != points[0][name]})
    taken = [name for name in turned if name in fixed]
    if taken:
        return f"{taken[0]} is set, and it is what would be searched"
    if not turned:
        return "it has no setting that changes how many tokens stay"
    if not all(_numeric([p[name] for p in points]) for name in turned):
        return f"{', '.join(turned)} cannot be searched along a line"
    even = [1.0 / depth] * depth
    whole = all(isinstance(p[name], int) for p in points for name in turned)
    if whole and cls.removing([0] * depth, patches) is not None:

        def removed(t: float) -> dict[str, Any]:
            settings = cls.removing(removals(even, patches, t), patches)
            return {**(settings or {}), **fixed}

        return Dial(0.0, depth / 2, removed)  # at its end every block gives up half of its patches
    neutral = cls.neutral()
    zero = neutral is not None and set(turned) <= set(neutral)
    if zero:
        points.insert(0, {**points[0], **(neutral or {})})
    line = [{name: point[name] for name in turned} for point in points]
    rest = {k: v for k, v in cls.grid(depth, patches)[0].items() if k not in turned}

    def along(t: float) -> dict[str, Any]:
        return {**rest, **{n: _between([p[n] for p in line], t) for n in turned}, **fixed}

    return Dial(0.0 if zero else -BEYOND, len(line) - 1 + BEYOND, along)


def meet(
    cls: type[Method],
    knob: Dial,
    budget: float,
    ratio: Callable[[Method], float],
    *,
    build: Callable[[dict[str, Any]], Method] | None = None,
) -> Met:
    """The mildest setting on a dial that meets a budget, by bisection.

    Args:
        cls: the method.
        knob: its dial.
        budget: wished part of the plain host's operations.
        ratio: measures that part for a method. It raises SettingsError for settings that the host
            does not take.
        build: settings -> method; by default from the registry.

    Returns:
        Settings whose measured ratio is at most the budget, or why there are none.
    """
    make = build or (lambda settings: registry.build(cls.slug, settings))
    seen: dict[Method, float] = {}
    best: tuple[float, dict[str, Any]] | None = None
    least: tuple[float, dict[str, Any]] | None = None
    low, high = knob.low, knob.high
    middle = max(low, 0.0)  # where settings are sure to be taken, so that both ends can close in
    for tried in range(TRIES + 1):
        at = _first(middle, high) if tried == 0 else (low + high) / 2
        try:
            settings = knob.at(at)
            method = make(settings)
            if method not in seen:
                seen[method] = ratio(method)
            found = seen[method]
        except SettingsError:
            # nothing lies there: too mild in front of the grid, too strong behind it
            low, high = (at, high) if at < middle else (low, at)
            continue
        if least is None or found < least[0]:
            least = (found, settings)
        if found > budget:
            low = at
            continue
        high = at
        if best is None or found > best[0]:
            best = (found, settings)
        if found >= budget - NEAR:
            break
    if best is not None:
        return Met(best[1])
    if least is None:
        return Met(None, "none of its settings is taken by this host")
    label = ", ".join(f"{name}={value}" for name, value in least[1].items())
    return Met(
        None,
        f"does not reach {budget:g} of the plain host's GFLOPs: the strongest setting found "
        f"({label}) takes {least[0]:.3f} of them",
    )


def removals(weights: Sequence[float], patches: int, part: float) -> list[int]:
    """Tokens to remove in each block; never more than half of those there.

    Args:
        weights: shares by block, summing to one.
        patches: patch tokens that enter.
        part: of them to remove in all.
    """
    removed, owed, left = [], 0.0, patches
    for weight in weights:
        owed += weight * part * patches
        now = min(int(owed + 0.5), left // 2) if weight else 0
        removed.append(now)
        owed -= now
        left -= now
    return removed


def _first(middle: float, high: float) -> float:
    """Where to begin: on the grid, whose settings are known to be taken."""
    return middle + min(1.0, (high - middle) / 2)


def _defaults(cls: type[Method]) -> dict[str, Any]:
    """The defaults of what the grid names, so that every point of it names the same."""
    return {f.name: f.default for f in fields(cls)}


def _numeric(values: list[Any]) -> bool:
    """Whether these are numbers, or tuples of as many numbers each."""
    if all(isinstance(v, tuple) for v in values):
        if len({len(v) for v in values}) != 1:
            return False
        return all(_numeric(list(column)) for column in zip(*values, strict=True))
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _between(values: list[Any], t: float) -> Any:
    """The value at place t of a line through values at 0, 1, 2 ...; beyond the ends it goes on."""
    if isinstance(values[0], tuple):
        return tuple(_between(list(column), t) for column in zip(*values, strict=True))
    i = min(max(int(t // 1), 0), max(len(values) - 2, 0))
    step = values[i + 1] - values[i] if len(values) > 1 else 0
    found = values[i] + (t - i) * step
    return round(found) if all(isinstance(v, int) for v in values) else round(found, 4) + 0.0
