"""Fit methods to a host in place, and take them out again."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

import transom
from transom import hosts, registry
from transom.check import example_output, verify
from transom.errors import CheckpointError, FitError, SettingsError
from transom.fitting import Fitting, Where, fit
from transom.hosts import Host
from transom.installation import (
    PREFIX,
    Installation,
    add_modules,
    drop_modules,
    expect,
    expect_all,
    install,
    install_front,
    installations,
    refuse_taken,
    uninstall,
)
from transom.registry import Method
from transom.slots import FittedStack, Restore
from transom.watching import Trace, tracing

_log = logging.getLogger(__name__)

_FORMAT = "transom-fittings-1"


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
    installation = next((i for i in installations(model) if i.host.decodes == decodes), None)
    host = hosts.find(model, decodes) if installation is None else installation.host
    fitting = fit(host, built, where, restore)
    if installation is not None:
        refuse_taken(installation, fitting)
        installation.fittings.append(fitting)
        try:
            install_front(installation, fitting)
            add_modules(installation, fitting)
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
    installation = install(host)
    try:
        if expected is not None:
            installation.refresh()
            verify(host, installation.flows, installation.state, expected)
        installation.state.settled = True
        installation.fittings.append(fitting)
        install_front(installation, fitting)
        add_modules(installation, fitting)
    except BaseException:
        uninstall(installation)
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
    return settings


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
    found = expect_all(model)
    if slug is not None:
        fitted = [f.slug for f in fittings(model)]
        found = [i for i in found if slug in [f.slug for f in i.fittings]]
        if not found:
            raise FitError(f"{slug!r} is not fitted; fitted are {fitted}")
    for installation in found:
        _take_out(installation, slug)
    return model


def _take_out(installation: Installation, slug: str | None) -> None:
    if installation.sealed:
        raise FitError(
            "this is a folded copy: norms of the host went into parameters of what is fitted, so "
            "the host cannot be given back; remove from the model that transom.fold got"
        )
    rest = [f for f in installation.fittings if slug is not None and f.slug != slug]
    drop_modules(installation, [f for f in installation.fittings if f not in rest])
    installation.fittings = rest
    if rest:
        installation.refresh()
    else:
        uninstall(installation)


def fittings(model: nn.Module) -> tuple[Fitting, ...]:
    """What is fitted to a model, in the order it was applied; empty when nothing is."""
    return tuple(fitting for i in installations(model) for fitting in i.fittings)


class Adjustment(contextlib.AbstractContextManager["Adjustment"]):
    """Returned by :func:`adjust`; leaving it as a context puts the settings back."""

    def __init__(self, installation: Installation, before: Fitting) -> None:
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
        for installation in expect_all(model)
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
    if any(isinstance(part, nn.Module) for part in before.parts()):
        raise FitError(
            f"{before.slug} has parameters of its own, which new settings would discard; remove "
            "it and apply it again"
        )
    installation.fittings[place] = fit(before.host, changed, before.where, before.restore)
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
    stack = expect(model).host.stack
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

    installation = expect(model)
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
    own = getattr(installation.host.root, PREFIX, None)
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
        methods = [registry.build(e["slug"], e["settings"]) for e in entries]
    except SettingsError as error:
        raise CheckpointError(f"{os.fspath(path)!r} does not fit its method: {error}") from error
    decodes = [method.takes == "decoder" for method in methods]
    wanted, have = json.loads(metadata["host"]), _description(hosts.find(model, any(decodes)))
    if wanted != have:
        raise CheckpointError(f"the fitting was saved for a host {wanted}, but this one is {have}")
    try:
        for entry, method in zip(entries, methods, strict=True):
            apply(model, method, where=entry["where"], restore=entry["restore"], check=check)
        own = getattr(expect(model).host.root, PREFIX, nn.Module())
        own.load_state_dict(tensors)
    except (SettingsError, RuntimeError) as error:
        if fittings(model):
            remove(model)
        raise CheckpointError(f"{os.fspath(path)!r} does not fit its method: {error}") from error
    return model


def _description(host: Host) -> dict[str, Any]:
    return {"family": host.family, "depth": host.depth, "width": host.width}
