"""Fit methods to a host in place, and take them out again."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from torch import Tensor, nn

import transom
from transom import hosts, registry
from transom.check import example_output, verify
from transom.errors import CheckpointError, FitError, HostError, SettingsError
from transom.front import Front, FrontView
from transom.hosts import Change, Host
from transom.hosts.front import front_of
from transom.registry import Method
from transom.slots import (
    BlockFlow,
    Fill,
    FittedStack,
    Part,
    Restore,
    StackState,
)
from transom.watching import Trace, tracing

Where = int | slice | Sequence[int] | None

_log = logging.getLogger(__name__)

_KEY = "_transom"
_PREFIX = "transom"
_FORMAT = "transom-fittings-1"


@dataclass
class Fitting:
    """What :func:`apply` put into one host.

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

    def __repr__(self) -> str:
        return f"Fitting({self.method!r} on {self.host.family})"


@dataclass
class _Installation:
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


def apply(
    model: nn.Module,
    method: str | Method,
    *,
    where: Where = None,
    restore: Restore | None = None,
    check: bool = True,
    checked: bool = False,
    schedule: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> nn.Module:
    """Fit a method to a model, in place.

    Args:
        model: a supported host, or a model that contains one.
        method: slug ("tome") or instance (ToMe(r=8)).
        where: blocks to fit: an index, several, or a slice; all when None.
        restore: when tokens are restored to the full sequence: "never", at the "end" of the
            stack, or after "every" block. Merged tokens become copies; dropped ones keep the
            features they last had. By default the host decides: never where only the class token
            is read, at the end where tokens are averaged or returned, after every block where
            they are used as maps.
        check: run one small input through the model before and after the neutral fitting, and
            once with its tokens in another order, and refuse the host if the outputs differ.
        checked: look for NaN and infinity before every reduction (slower).
        schedule: JSON file that ``transom compare --schedule auto`` wrote for this method.
        **settings: hyperparameters of the method.

    Returns:
        The same model.

    Raises:
        HostError: the model is no supported host, or a part of it is not known.
        FitError: the host lacks what the method needs, or a slot is taken.
        SettingsError: a setting is unknown or out of range.

    In every case of an error the model is left as it was.
    """
    if schedule is not None:
        settings = {**_scheduled(schedule, method), **settings}
    built = registry.build(method, settings)
    if restore not in (None, "never", "end", "every"):
        raise SettingsError(f"restore is {restore!r}; expected 'never', 'end', 'every' or None")
    decodes = built.takes == "decoder"
    installation = next((i for i in _installations(model) if i.host.decodes == decodes), None)
    host = hosts.find(model, decodes) if installation is None else installation.host
    fitting = _fitting(host, built, where, restore)
    if installation is not None:
        _refuse_taken(installation, fitting)
        installation.fittings.append(fitting)
        try:
            _install_front(installation, fitting)
            _add_modules(installation, fitting)
        except BaseException:
            installation.fittings.remove(fitting)
            raise
        installation.state.checked |= checked
        installation.refresh()
        _warn_untrained(built)
        return model
    # a model without data cannot be run; it is checked when somebody can run it
    empty = all(p.is_meta for p in host.root.parameters())
    expected = example_output(host) if check and not empty else None
    installation = _install(host)
    try:
        if expected is not None:
            installation.refresh()
            verify(host, installation.flows, installation.state, expected)
        installation.state.settled = True
        installation.fittings.append(fitting)
        _install_front(installation, fitting)
        _add_modules(installation, fitting)
    except BaseException:
        _uninstall(installation)
        raise
    installation.state.checked = checked
    installation.refresh()
    _warn_untrained(built)
    return model


def _warn_untrained(method: Method) -> None:
    if method.needs_training:
        _log.warning(
            "%s brings parameters that have no meaning before training; train the model, or load "
            "a trained fitting with transom.load",
            method.slug,
        )


def _scheduled(path: str | os.PathLike[str], method: str | Method) -> dict[str, Any]:
    """The settings in a schedule file, if it is one and for this method."""
    slug = method if isinstance(method, str) else getattr(method, "slug", None)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        kind, wanted, settings = content["format"], content["slug"], content["settings"]
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {os.fspath(path)!r}") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{os.fspath(path)!r} is no schedule of transom") from None
    if kind != "transom-schedule-1" or wanted != slug:
        raise CheckpointError(f"{os.fspath(path)!r} is a schedule for {wanted!r}, not for {slug!r}")
    return _tuples(settings)


def remove(model: nn.Module, slug: str | None = None) -> nn.Module:
    """Take a method out of a model, or all of them.

    Args:
        model: that :func:`apply` was called on.
        slug: of the method; None removes everything.

    Returns:
        The same model; bit for bit as it was when nothing is left fitted.

    Raises:
        FitError: nothing is fitted, or not this method.
    """
    installations = _expect_all(model)
    if slug is not None:
        fitted = [f.slug for f in fittings(model)]
        installations = [i for i in installations if slug in [f.slug for f in i.fittings]]
        if not installations:
            raise FitError(f"{slug!r} is not fitted; fitted are {fitted}")
    for installation in installations:
        _take_out(installation, slug)
    return model


def _take_out(installation: _Installation, slug: str | None) -> None:
    if installation.sealed:
        raise FitError(
            "this is a folded copy: norms of the host went into parameters of what is fitted, so "
            "the host cannot be given back; remove from the model that transom.fold got"
        )
    rest = [f for f in installation.fittings if slug is not None and f.slug != slug]
    _drop_modules(installation, [f for f in installation.fittings if f not in rest])
    installation.fittings = rest
    if rest:
        installation.refresh()
    else:
        _uninstall(installation)


def fittings(model: nn.Module) -> tuple[Fitting, ...]:
    """What is fitted to a model, in the order it was applied; empty when nothing is."""
    return tuple(fitting for i in _installations(model) for fitting in i.fittings)


class Adjustment(contextlib.AbstractContextManager["Adjustment"]):
    """Returned by :func:`adjust`; leaving it as a context puts the settings back."""

    def __init__(self, installation: _Installation, before: Fitting) -> None:
        self._installation, self._before = installation, before

    def __exit__(self, *exc: object) -> None:
        fittings = self._installation.fittings
        for i, fitting in enumerate(fittings):  # it may have moved or gone meanwhile
            if fitting.slug == self._before.slug:
                fittings[i] = self._before
                self._installation.refresh()


def adjust(model: nn.Module, slug: str | None = None, **settings: Any) -> Adjustment:
    """Change settings of a fitted method, for good or for the length of a `with` block.

    The change concerns the model, not one call: other threads see it too.

    Args:
        model: that the method is fitted to.
        slug: of the method; may be left out when only one is fitted.
        **settings: hyperparameters to change.

    Returns:
        A context manager that puts the earlier settings back when it is left; as a plain call the
        change stays.

    Raises:
        FitError: nothing is fitted, or it is not clear what is meant.
        SettingsError: a setting is unknown or out of range.
    """
    found = [
        (installation, i)
        for installation in _expect_all(model)
        for i, f in enumerate(installation.fittings)
        if slug in (None, f.slug)
    ]
    if len(found) != 1:
        raise FitError(
            f"{slug or 'no slug'} names {len(found)} of the fitted methods "
            f"{[f.slug for f in fittings(model)]}; expected exactly one"
        )
    installation, place = found[0]
    before = installation.fittings[place]
    changed = registry.build(before.method, settings)
    if any(isinstance(part, nn.Module) for part in _parts(before)):
        raise FitError(
            f"{before.slug} has parameters of its own, which new settings would discard; remove "
            "it and apply it again"
        )
    installation.fittings[place] = _fitting(before.host, changed, before.where, before.restore)
    installation.refresh()
    return Adjustment(installation, before)


@contextlib.contextmanager
def trace(model: nn.Module) -> Iterator[Trace]:
    """Record where the tokens go in calls of `model` inside this context.

    Args:
        model: with a fitted method.

    Yields:
        A :class:`~transom.watching.Trace` that holds the latest call's records. Compiled calls are
        not traced.

    Raises:
        FitError: nothing is fitted.
    """
    stack = _expect(model).host.stack
    assert isinstance(stack, FittedStack)
    with tracing(stack) as record:
        yield record


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write what is fitted to a model, and the parameters that came with it.

    Args:
        model: with at least one fitted method.
        path: of a safetensors file. The host's own parameters are not in it.

    Raises:
        FitError: nothing is fitted.
    """
    from safetensors.torch import save_file

    installation = _expect(model)
    described = [
        {"slug": f.slug, "settings": f.method.settings(), "where": f.where, "restore": f.restore}
        for f in installation.fittings
    ]
    metadata = {
        "format": _FORMAT,
        "transom": transom.__version__,
        "fittings": json.dumps(described),
        "host": json.dumps(_description(installation.host)),
    }
    own = getattr(installation.host.root, _PREFIX, None)
    tensors: dict[str, Tensor] = {} if own is None else own.state_dict()
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary = f"{os.fspath(path)}.part"
    save_file(contiguous, temporary, metadata)
    os.replace(temporary, path)  # a broken-off write never replaces a good file


def load(model: nn.Module, path: str | os.PathLike[str], *, check: bool = True) -> nn.Module:
    """Fit to a fresh host what :func:`save` wrote.

    Args:
        model: a host of the same family, depth and width with nothing fitted.
        path: of the file.
        check: as in :func:`apply`.

    Returns:
        The same model.

    Raises:
        CheckpointError: the file is no fitting, or it belongs to another host or method.
        FitError: something is fitted already.
    """
    from safetensors import SafetensorError, safe_open

    if fittings(model):
        raise FitError("the model has fitted methods already; transom.remove(model) first")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {os.fspath(path)!r}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{os.fspath(path)!r} is no safetensors file: {error}") from None
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(
            f"{os.fspath(path)!r} holds tensors but no transom fitting; expected a file that "
            "transom.save wrote"
        )
    entries = json.loads(metadata["fittings"])
    try:
        methods = [registry.build(e["slug"], _tuples(e["settings"])) for e in entries]
    except SettingsError as error:
        raise CheckpointError(f"{os.fspath(path)!r} does not fit its method: {error}") from error
    decodes = [method.takes == "decoder" for method in methods]
    wanted, have = json.loads(metadata["host"]), _description(hosts.find(model, any(decodes)))
    if wanted != have:
        raise CheckpointError(f"the fitting was saved for a host {wanted}, but this one is {have}")
    try:
        for entry, method in zip(entries, methods, strict=True):
            apply(model, method, where=entry["where"], restore=entry["restore"], check=check)
        own = getattr(_expect(model).host.root, _PREFIX, nn.Module())
        own.load_state_dict(tensors)
    except (SettingsError, RuntimeError) as error:
        if fittings(model):
            remove(model)
        raise CheckpointError(f"{os.fspath(path)!r} does not fit its method: {error}") from error
    return model


def _tuples(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}


def _description(host: Host) -> dict[str, Any]:
    return {"family": host.family, "depth": host.depth, "width": host.width}


def _installations(model: nn.Module) -> list[_Installation]:
    """What is fitted to a model: one installation for its encoder, one for its decoder."""
    if not isinstance(model, nn.Module):
        raise HostError(f"got a {type(model).__name__}; expected a torch.nn.Module")
    return [m.__dict__[_KEY] for m in model.modules() if _KEY in m.__dict__]


def _installed(model: nn.Module) -> _Installation | None:
    found = _installations(model)
    if len(found) > 1:
        parts = [i.host.name or type(i.host.root).__name__ for i in found]
        raise FitError(
            f"methods are fitted to {len(found)} parts of this {type(model).__name__}; pass the "
            f"one you mean, of {parts}"
        )
    return found[0] if found else None


def _expect_all(model: nn.Module) -> list[_Installation]:
    found = _installations(model)
    if not found:
        raise FitError(
            f"nothing is fitted to this {type(model).__name__}; call transom.apply first"
        )
    return found


def _expect(model: nn.Module) -> _Installation:
    _expect_all(model)
    installation = _installed(model)
    assert installation is not None
    return installation


def _fitting(host: Host, method: Method, where: Where, restore: Restore | None) -> Fitting:
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
    _refuse_parts_missing(host, fills, method.slug)
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


def _refuse_parts_missing(host: Host, fills: list[Fill], slug: str) -> None:
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


def _refuse_taken(installation: _Installation, new: Fitting) -> None:
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


def _install(host: Host) -> _Installation:
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
    installation = _Installation(host, flows, state)
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
        _uninstall(installation)
        raise
    return installation


def _uninstall(installation: _Installation) -> None:
    _drop_modules(installation, installation.fittings)
    for change in reversed(installation.journal):
        change.undo()
    installation.journal.clear()


def _install_front(installation: _Installation, fitting: Fitting) -> None:
    """Put the host's view of its front in place when the first method wants to fill a slot."""
    if not fitting.front.slots() or installation.front is not None:
        return
    view = front_of(installation.host)
    for change in view.install():
        installation.journal.append(change)
    installation.front = view


def _parts(fitting: Fitting) -> list[object]:
    """Everything that a fitting puts into slots, in a fixed order."""
    return [*(part for fill in fitting.fills for part in fill.parts()), *fitting.front.parts()]


def _add_modules(installation: _Installation, fitting: Fitting) -> None:
    """Register parameters that come with a method under one prefix of the host."""
    new = [part for part in _parts(fitting) if isinstance(part, nn.Module)]
    if not new:
        return
    root = installation.host.root
    if not hasattr(root, _PREFIX):
        root.add_module(_PREFIX, nn.ModuleDict())
    like = next(root.parameters())
    owned: Any = getattr(root, _PREFIX)
    owned[fitting.slug] = nn.ModuleList(new).to(device=like.device, dtype=like.dtype)
    owned.train(root.training)  # a fresh module would take batch statistics of a served model


def _drop_modules(installation: _Installation, gone: Iterable[Fitting]) -> None:
    owned: Any = getattr(installation.host.root, _PREFIX, None)
    if owned is None:
        return
    for fitting in gone:
        if fitting.slug in owned:
            del owned[fitting.slug]
    if not len(owned):
        delattr(installation.host.root, _PREFIX)
