"""See what the blocks of a model hold, and change it, by name.

    with transom.capture(model, "blocks.3.attention.key", "blocks.*.residual.post") as seen:
        model(images)
    seen["blocks.3.attention.key"]        # (B, H, N, d)

    with transom.intervene(model, {"blocks.5.attention.head_output": ablate(heads=[2])}):
        model(images)

Names are `blocks.I.` and one of :data:`transom.watching.NAMES`; `*` stands for any block, negative
numbers count from the end. Shapes: residual, attention.output, ffn: (B, N, D); query, key, value,
head_output: (B, H, N, d); probabilities: (B, H, N, N). Where a method brings tokens of its own into
a block, they stand last in all of these but the residual in front and behind, and `guests` names
them alone, (B, G, D). Nothing but what is asked for is computed
or kept, attention stays fused (probabilities are computed beside it), and everything is as before
when the context is left, also by an exception. Works on top of fitted methods.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from transom import api
from transom.errors import FitError, HostError, SettingsError
from transom.hosts import Host
from transom.installation import Installation, installations
from transom.registry import Method, Takes
from transom.slots import Fill
from transom.watching import GUESTS, NAMES, Edit, Watch, watching


@dataclass(frozen=True)
class Watched(Method):
    """Fills nothing; lets an encoder be watched to which nothing is fitted."""

    slug: ClassVar[str] = "watched"

    def fit(self, host: Host) -> list[Fill]:
        return [Fill()] * host.depth


@dataclass(frozen=True)
class WatchedDecoder(Watched):
    """The same for a decoder."""

    slug: ClassVar[str] = "watched-decoder"
    takes: ClassVar[Takes] = "decoder"


@contextlib.contextmanager
def capture(
    model: nn.Module,
    *names: str,
    detach: bool = True,
    decoder: bool | None = None,
    check: bool = True,
) -> Iterator[Mapping[str, Tensor]]:
    """Keep activations of calls of `model` inside this context.

    Args:
        model: a supported host, with or without fitted methods.
        *names: of activations, for example "blocks.3.attention.probabilities" or
            "blocks.*.residual.post".
        detach: whether what is kept is cut off from the graph.
        decoder: whether the decoder of the model is meant; None takes the encoder if there is one.
        check: as in :func:`transom.apply`, when nothing is fitted yet.

    Yields:
        The activations of the latest call by full name, in the order in which they came to be.

    Raises:
        HostError: the model is no supported host.
        SettingsError: a name is unknown, or no block has that number.
    """
    with _watched(model, names, {}, detach, decoder, check) as watch:
        yield watch.seen


@contextlib.contextmanager
def intervene(
    model: nn.Module,
    edits: Mapping[str, Edit | Tensor | float],
    *,
    decoder: bool | None = None,
    check: bool = True,
) -> Iterator[nn.Module]:
    """Change activations of calls of `model` inside this context.

    Args:
        model: as in :func:`capture`.
        edits: by name: a function of the activation that returns another one of the same shape, a
            tensor to put in its place, or a factor. Contexts inside others see what those left.
        decoder, check: as in :func:`capture`.

    Yields:
        The model.

    Raises:
        HostError: the model is no supported host.
        SettingsError: a name is unknown, no block has that number, or an edit is none of these.
        TokensError: at the call, if an edit returns another shape.
    """
    functions = {name: _edit(name, edit) for name, edit in edits.items()}
    with _watched(model, (), functions, True, decoder, check):
        yield model


def ablate(
    *, heads: Sequence[int] | None = None, tokens: Sequence[int] | None = None
) -> Callable[[Tensor], Tensor]:
    """An edit that sets heads, tokens, or everything to zero.

    Args:
        heads: of an activation (B, H, N, d or N); all when None.
        tokens: positions N, the last but one dimension; all when None.
    """

    def edit(x: Tensor) -> Tensor:
        if heads is not None and x.dim() != 4:
            raise SettingsError(
                f"ablate got heads for an activation of shape {tuple(x.shape)}, which has none"
            )
        places = list(range(x.shape[-2])) if tokens is None else list(tokens)
        rows = x.clone()
        if x.dim() == 4:
            chosen = list(range(x.shape[1])) if heads is None else list(heads)
            for head in chosen:
                rows[:, head, places] = 0
        else:
            rows[:, places] = 0
        return rows

    return edit


@contextlib.contextmanager
def _watched(
    model: nn.Module,
    names: Sequence[str],
    edits: Mapping[str, Edit],
    detach: bool,
    decoder: bool | None,
    check: bool,
) -> Iterator[Watch]:
    own = _fit_watched(model, decoder, check)
    try:
        installation = _chosen(model, decoder)
        depth = installation.host.depth
        wanted = frozenset(full for name in names for full in _full(name, depth))
        by_name = {full: edit for name, edit in edits.items() for full in _full(name, depth)}
        with watching(Watch(installation.state, wanted, by_name, detach)) as watch:
            yield watch
    finally:
        if own is not None:
            api.remove(model, own)


def _fit_watched(model: nn.Module, decoder: bool | None, check: bool) -> str | None:
    """Fit something that fills nothing if nothing is fitted; its slug."""
    there = [i.host.decodes for i in installations(model)]
    if decoder in there or (decoder is None and there):
        return None
    kinds: list[Method] = [Watched(), WatchedDecoder()]
    if decoder is not None:
        kinds = [kinds[int(decoder)]]
    refused: HostError | None = None
    for kind in kinds:
        try:
            api.apply(model, kind, check=check)
            return kind.slug
        except HostError as error:
            refused = refused or error  # the encoder's reason tells more
    assert refused is not None
    raise refused


def _chosen(model: nn.Module, decoder: bool | None) -> Installation:
    found = installations(model)
    if decoder is not None:
        return next(i for i in found if i.host.decodes == decoder)
    if len(found) > 1:
        raise FitError(
            "methods are fitted to the encoder and to the decoder of this model; say which one is "
            "meant with decoder=False or decoder=True"
        )
    return found[0]


def _full(pattern: str, depth: int) -> list[str]:
    """Full names that a pattern stands for."""
    match = re.fullmatch(r"blocks\.(\*|-?\d+)\.(.+)", pattern)
    if match is None or match[2] not in (*NAMES, GUESTS):
        tail = match[2] if match else pattern
        close = difflib.get_close_matches(tail, NAMES, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise SettingsError(
            f"there is no activation {pattern!r}; expected blocks.I. and one of {list(NAMES)}{hint}"
        )
    if match[1] == "*":
        return [f"blocks.{i}.{match[2]}" for i in range(depth)]
    block = int(match[1])
    if not -depth <= block < depth:
        raise SettingsError(
            f"{pattern!r} names block {block}, but there are blocks 0 to {depth - 1}"
        )
    return [f"blocks.{block % depth}.{match[2]}"]


def _edit(name: str, edit: Edit | Tensor | float) -> Edit:
    if isinstance(edit, Tensor):
        value = edit
        return lambda x: value.to(x).expand_as(x)
    if isinstance(edit, int | float) and not isinstance(edit, bool):
        factor = edit
        return lambda x: x * factor
    if not callable(edit):
        raise SettingsError(
            f"the edit at {name} is {edit!r}; expected a function, a tensor or a factor"
        )
    return edit
