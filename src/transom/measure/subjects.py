"""What is measured: copies of a host that share its weights, each with one method fitted."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar, TypeVar

import torch
from torch import nn

import transom
from transom.errors import HostError
from transom.hosts import Host
from transom.papers.baselines.none import NoOp
from transom.papers.baselines.slice import Slice
from transom.registry import Method, Takes
from transom.slots import Ask, Fill, Restore, TokenStep
from transom.tokens import Tokens

M = TypeVar("M", bound=nn.Module)


def shared_copy(model: M) -> M:
    """A copy with modules of its own whose parameters and buffers are the model's.

    It can be fitted, and its modes changed, without a trace in the model; it costs no memory for
    weights. Moving it to another device or type would move the model too: copy it whole for that.

    Raises:
        HostError: If the model holds something that cannot be copied.
    """
    memo = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return _copied(model, memo)


def placed_copy(model: M, device: torch.device, dtype: torch.dtype | None) -> M:
    """A copy in evaluation mode on a device, in a type; shares the weights if they fit already.

    Args:
        model: Stays as it is.
        device: Where the copy shall be.
        dtype: Of its floating point weights; None keeps them.

    Raises:
        HostError: If the model holds something that cannot be copied.
    """
    tensors = list(chain(model.parameters(), model.buffers()))
    fits = all(
        t.device == device and (dtype is None or not t.is_floating_point() or t.dtype == dtype)
        for t in tensors
    )
    if fits:
        return shared_copy(model).eval()
    return _copied(model, {}).to(device=device, dtype=dtype).eval()


def _copied(model: M, memo: dict[int, torch.Tensor]) -> M:
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        raise HostError(
            f"{type(model).__name__} cannot be copied, which measuring it side by side needs: "
            f"{error}. Take hooks, compiled parts or open files out of it first"
        ) from error


@dataclass(frozen=True)
class Twin(Slice):
    """The free twin, also where the full sequence is wanted back.

    A token that slicing gives up counts as merged into token 0. Its features would have to travel
    along otherwise, and a twin that carries them would not be free. Never a way to choose tokens.
    """

    def fit(self, host: Host) -> list[Fill]:
        return [
            fill if fill.tokens is None else replace(fill, tokens=_Fold(fill.tokens), drops=False)
            for fill in super().fit(host)
        ]


@dataclass(frozen=True)
class _Fold:
    """Token step: slice, and let what is gone point at token 0."""

    step: TokenStep

    def __call__(self, tokens: Tokens, attended: Ask) -> Tokens:
        kept = self.step(tokens, attended)
        index = kept.record.index
        if index is None:
            return kept
        return Tokens(kept.x, replace(kept.record, index=index.clamp(min=0)))


@dataclass(frozen=True)
class DecoderTwin(Twin):
    """The same behind the layers of a decoder, where its methods let tokens go."""

    takes: ClassVar[Takes] = "decoder"

    def fit(self, host: Host) -> list[Fill]:
        return [replace(fill, tokens=None, after=fill.tokens) for fill in super().fit(host)]


@dataclass(frozen=True)
class DecoderNoOp(NoOp):
    """The neutral method on a decoder."""

    takes: ClassVar[Takes] = "decoder"


def idle(takes: Takes) -> Method:
    """What fills nothing, for an encoder or a decoder."""
    return NoOp() if takes == "encoder" else DecoderNoOp()


def fitted(
    model: M, method: Method, target: str, restore: Restore | None, *, check: bool = False
) -> M:
    """A copy that shares the model's weights, with the method fitted to the part at `target`.

    Args:
        model: With nothing fitted.
        method: To fit.
        target: Path of the part inside the model; "" for the model itself.
        restore: As in `transom.apply`.
        check: As in `transom.apply`.

    Raises:
        HostError: If there is no host, or it cannot be copied.
        FitError: If the method does not fit it.
    """
    subject = shared_copy(model)
    with _unwarned():
        transom.apply(part(subject, target), method, restore=restore, check=check)
    return subject


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without a warning a copy that its method is not trained: the comparison says so once."""
    log = logging.getLogger("transom.api")
    log.addFilter(_tells)
    try:
        yield
    finally:
        log.removeFilter(_tells)


def _tells(record: logging.LogRecord) -> bool:
    return record.levelno != logging.WARNING


def part(model: nn.Module, target: str) -> nn.Module:
    """The part of a model at a path such as "backbone"; the model itself for "".

    Raises:
        HostError: If there is no such part.
    """
    try:
        return model.get_submodule(target)
    except AttributeError:
        names = [name for name, _ in model.named_children()]
        raise HostError(
            f"{type(model).__name__} has no part {target!r} to fit methods to; its parts are "
            f"{names}"
        ) from None
