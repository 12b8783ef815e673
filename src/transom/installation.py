"""How fittings get into a host, and out of it again."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from transom import hosts
from transom.errors import FitError, HostError
from transom.fitting import Fitting
from transom.front import Front, FrontView
from transom.hosts import Change, Host
from transom.hosts.front import front_of
from transom.slots import BlockFlow, Fill, FittedStack, Restore, StackState

_KEY = "_transom"
PREFIX = "transom"
"""Name under which a host's root holds the modules that came with methods."""


@dataclass
class Installation:
    """Everything that is fitted to one host, and the journal that undoes it."""

    host: Host
    flows: list[BlockFlow]
    state: StackState
    journal: list[Change] = field(default_factory=list)
    fittings: list[Fitting] = field(default_factory=list)
    sealed: bool = False
    """Whether norms of the host were folded into parameters that came with a method."""
    front: FrontView | None = None
    """Of what stands before the blocks, once a method has filled a slot there."""

    def refresh(self) -> None:
        """Bring the flows in line with the fittings."""
        fills = [Fill()] * self.host.depth
        for fitting in self.fittings:
            fills = [a.joined(b) for a, b in zip(fills, fitting.fills, strict=True)]
        for flow, fill in zip(self.flows, fills, strict=True):
            flow.fill = fill
        if self.front is not None:
            self.front.fill = functools.reduce(Front.joined, (f.front for f in self.fittings))
        # a text may be too short to lose a token, an image may not
        self.state.reduces = self.host.modality != "text" and any(
            "tokens" in fill.slots() for fill in fills
        )
        self.state.restore = self._restore(fills)

    def _restore(self, fills: list[Fill]) -> Restore:
        asked = [f.restore for f in self.fittings if f.restore is not None]
        drops = any(fill.drops for fill in fills)
        if asked:
            restore: Restore = max(asked, key=["never", "end", "every"].index)
        elif self.host.reads == "maps":
            restore = "every"
        elif self.host.reads == "tokens" or (self.host.reads == "pooled" and not drops):
            restore = "end"
        else:
            restore = "never"
        # features of dropped tokens travel in the sequence that the host's loop carries
        return "every" if restore == "end" and drops else restore


def installations(model: nn.Module) -> list[Installation]:
    """What is fitted to a model: one installation for its encoder, one for its decoder."""
    if not isinstance(model, nn.Module):
        raise HostError(f"got a {type(model).__name__}; expected a torch.nn.Module")
    return [m.__dict__[_KEY] for m in model.modules() if _KEY in m.__dict__]


def expect_all(model: nn.Module) -> list[Installation]:
    """The installations in a model; FitError when nothing is fitted."""
    found = installations(model)
    if not found:
        raise FitError(
            f"nothing is fitted to this {type(model).__name__}; call transom.apply first"
        )
    return found


def expect(model: nn.Module) -> Installation:
    """The one installation in a model; FitError for none and for several."""
    found = expect_all(model)
    if len(found) > 1:
        parts = [i.host.name or type(i.host.root).__name__ for i in found]
        raise FitError(
            f"methods are fitted to {len(found)} parts of this {type(model).__name__}; pass the "
            f"one you mean, of {parts}"
        )
    return found[0]


def refuse_taken(installation: Installation, new: Fitting) -> None:
    """Raise FitError if a fitting wants a slot that another one has."""
    for old in installation.fittings:
        before = sorted(old.front.slots() & new.front.slots())
        if before:
            raise FitError(
                f"slot {before[0]!r} is taken by {old.slug}; transom.remove(model, {old.slug!r}) "
                "first"
            )
        for i, (a, b) in enumerate(zip(old.fills, new.fills, strict=True)):
            taken = a.clashes(b)
            if taken or old.slug == new.slug:
                slot = f"slot {sorted(taken)[0]!r} of block {i}" if taken else "this host"
                raise FitError(
                    f"{slot} is taken by {old.slug}; transom.remove(model, {old.slug!r}) first"
                )


def install(host: Host) -> Installation:
    """Put flows over the blocks of a host, which run as before until something fills a slot."""
    state = StackState(
        host.prefix,
        host.grid,
        follows=host.follows,
        parallel=host.parallel,
    )
    names = [(i, f"{name}.{i}") for name, stack in host.stacks for i in range(len(stack._modules))]
    flows = [
        BlockFlow(view, state, i, name, number)
        for number, (view, (i, name)) in enumerate(zip(host.views, names, strict=True))
    ]
    installation = Installation(host, flows, state)
    expected = {nn.Sequential, nn.ModuleList}
    for name, stack in host.stacks:
        if type(stack) not in expected:
            raise HostError(
                f"{name} is a {type(stack).__name__}; expected a plain nn.Sequential or "
                "nn.ModuleList"
            )
    for view in host.views:
        own = view.module.__dict__.get("forward")
        # some libraries leave the class's own forward there, bound
        if own is not None and getattr(own, "__func__", None) is not type(view.module).forward:
            raise HostError(
                f"a block ({type(view.module).__name__}) has a forward of its own put over it, "
                "for example by accelerate; remove that first, transom would switch it off"
            )
    journal = installation.journal
    try:
        journal.append(hosts.put(host.root, _KEY, installation))
        for _, stack in host.stacks:
            journal.append(hosts.put(stack, "fitted", state))
            journal.append(hosts.put(stack, "__class__", FittedStack))
        for flow in flows:
            journal.append(hosts.put(flow.view.module, "forward", flow))
        for change in host.install():
            journal.append(change)
    except BaseException:
        uninstall(installation)
        raise
    return installation


def uninstall(installation: Installation) -> None:
    """Take everything out of a host: bit for bit as it was."""
    drop_modules(installation, installation.fittings)
    for change in reversed(installation.journal):
        change.undo()
    installation.journal.clear()


def install_front(installation: Installation, fitting: Fitting) -> None:
    """Put the host's view of its front in place when the first method wants to fill a slot."""
    if not fitting.front.slots() or installation.front is not None:
        return
    view = front_of(installation.host)
    for change in view.install():
        installation.journal.append(change)
    installation.front = view


def add_modules(installation: Installation, fitting: Fitting) -> None:
    """Register parameters that come with a method under one prefix of the host."""
    new = [part for part in fitting.parts() if isinstance(part, nn.Module)]
    if not new:
        return
    root = installation.host.root
    if not hasattr(root, PREFIX):
        root.add_module(PREFIX, nn.ModuleDict())
    like = next(root.parameters())
    owned: Any = getattr(root, PREFIX)
    owned[fitting.slug] = nn.ModuleList(new).to(device=like.device, dtype=like.dtype)
    owned.train(root.training)  # a fresh module would take batch statistics of a served model


def drop_modules(installation: Installation, gone: Iterable[Fitting]) -> None:
    """Take parameters that came with these fittings out of the host again."""
    owned: Any = getattr(installation.host.root, PREFIX, None)
    if owned is None:
        return
    for fitting in gone:
        if fitting.slug in owned:
            del owned[fitting.slug]
    if not len(owned):
        delattr(installation.host.root, PREFIX)
