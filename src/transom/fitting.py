"""What a method fills in one host, and what stands against it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from transom.errors import FitError, HostError, SettingsError
from transom.front import Front
from transom.hosts import Host
from transom.registry import Method
from transom.slots import Fill, Part, Restore

Where = int | slice | Sequence[int] | None


@dataclass
class Fitting:
    """What a method fills in one host; :func:`transom.apply` puts it there.

    Attributes:
        method: the hyperparameters.
        host: the adapter's view of the model.
        where: blocks the method was restricted to; None for all.
        restore: what was asked for; None lets the host decide.
        fills: what fills the slots of each block.
        front: what fills the slots in front of them.
    """

    method: Method
    host: Host
    where: list[int] | None
    restore: Restore | None
    fills: list[Fill]
    front: Front = field(default_factory=Front)

    @property
    def slug(self) -> str:
        """Registry key of the method."""
        return self.method.slug

    def parts(self) -> list[object]:
        """Everything that fills a slot, in a fixed order."""
        return [*(part for fill in self.fills for part in fill.parts()), *self.front.parts()]

    def __repr__(self) -> str:
        return f"Fitting({self.method!r} on {self.host.family})"


def fit(host: Host, method: Method, where: Where, restore: Restore | None) -> Fitting:
    """What a method fills in a host.

    Args:
        host: to fit.
        method: with its hyperparameters.
        where: blocks; all when None.
        restore: when tokens are restored; None lets the host decide.

    Raises:
        FitError: the host lacks what the method needs, or `where` leaves nothing to fit.
        HostError: the method fills a slot that is closed in this host.
        SettingsError: `where` names no block of the host.
    """
    if method.needs_class_token and not host.class_token:
        raise FitError(
            f"{method.slug} needs a class token, and this {host.family} has none; 'tome', "
            "'pitome' and 'random' do without"
        )
    if method.needs_grid and host.grid is None:
        raise FitError(
            f"{method.slug} needs the patches on a known grid, and this {host.family} has none"
        )
    chosen = _chosen(where, host.depth)
    fills = method.fit(host)
    for slot in sorted({slot for fill in fills for slot in fill.slots()} & set(host.closed)):
        raise HostError(
            f"{method.slug} fills the slot {slot!r}, which is closed in this {host.family}: "
            f"{host.closed[slot]}"
        )
    _refuse_missing_parts(host, fills, method.slug)
    if host.causal and not method.keeps_order and any(fill.slots() for fill in fills):
        raise FitError(
            f"in this {host.family} a token sees only those before it and the last one is read, so "
            f"tokens have to stay in order, which {method.slug} does not see to; 'crossget' does"
        )
    if host.decodes and any(fill.size_bias for fill in fills):
        raise FitError(
            f"{method.slug} counts tokens by size, which the cache of a decoder does not keep"
        )
    if chosen is not None:
        # outside the chosen blocks nothing is filled, but keys still count by their size
        rest = [Fill(size_bias=fill.size_bias) for fill in fills]
        fills = [fill if i in chosen else rest[i] for i, fill in enumerate(fills)]
    front = method.front(host)
    if front.slots() and chosen is not None:
        raise FitError(
            f"{method.slug} fills the slots {sorted(front.slots())} in front of the blocks, which "
            f"where={where!r} cannot restrict; leave it out"
        )
    return Fitting(method, host, chosen, restore, fills, front)


def _refuse_missing_parts(host: Host, fills: list[Fill], slug: str) -> None:
    for i, (fill, view) in enumerate(zip(fills, host.views, strict=True)):
        replaced = (fill.norms[0], fill.mixer, fill.norms[1], fill.ffn)
        for name, new in zip(get_args(Part), replaced, strict=True):
            if new is not None and view.part(name) is None:
                raise FitError(
                    f"{slug} replaces the {name} of a block, but block {i} of this {host.family} "
                    f"({type(view.module).__name__}) has no single module there that transom can "
                    "replace"
                )


def _chosen(where: Where, depth: int) -> list[int] | None:
    if where is None:
        return None
    if isinstance(where, slice):
        chosen = list(range(depth))[where]
    else:
        given: Any = [where] if isinstance(where, int) else where
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise SettingsError(
                f"where is {where!r}; expected an index, a sequence of them, a slice, or None"
            )
        given = list(given)
        wrong = [i for i in given if not isinstance(i, int) or not -depth <= i < depth]
        if wrong:
            raise SettingsError(
                f"where names block {wrong[0]!r}, but the host has blocks 0 to {depth - 1}"
            )
        chosen = sorted({i % depth for i in given})
    if not chosen:
        raise FitError(f"where={where!r} leaves no block of {depth}, so nothing would be fitted")
    return chosen
