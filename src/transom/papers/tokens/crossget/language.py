"""CrossGET in front of and inside a language model (LLaVA).

The vision tower merges with importance from received attention; the language model loses nothing,
but while it reads a prompt its first token is replaced in front of every layer:

    x_0 <- stopgrad(x_0) + p_i        p_i learned, zero at first

and the cross tokens of the vision tower, through the projector, are drawn towards these. As in the
release, the first token of the sequence is meant: pad texts on the right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from transom import api
from transom.errors import FitError, HostError
from transom.hosts.base import Host
from transom.lens.capture import capture
from transom.papers.tokens.crossget.cross import Alignment, CrossToken, Tower
from transom.registry import Method, Takes
from transom.slots import Fill
from transom.tokens import Record
from transom.watching import GUESTS


class CrossFirst(nn.Module):
    """Replaces the first token in front of a layer.

    Attributes:
        learned: (1, 1, D), p_i.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.learned = nn.Parameter(torch.zeros(1, 1, width))

    def forward(
        self, x: Tensor, guests: Tensor | None, record: Record
    ) -> tuple[Tensor, Tensor | None]:
        return torch.cat([x[:, :1].detach() + self.learned, x[:, 1:]], 1), guests


@dataclass(frozen=True)
class CrossLanguage(Method):
    """Cross tokens in a decoder. No room of its own: :func:`fit_llava` brings it."""

    slug: ClassVar[str] = "crossget-language"
    takes: ClassVar[Takes] = "decoder"

    def fit(self, host: Host) -> list[Fill]:
        return [Fill(enter=CrossFirst(host.width)) for _ in range(host.depth)]


def _projector(model: nn.Module) -> nn.Module:
    owners = (module for module in model.modules() if hasattr(module, "multi_modal_projector"))
    owner: Any = next(owners, None)
    if owner is None:
        raise HostError(
            f"{type(model).__name__} has no multi_modal_projector; expected LLaVA of transformers, "
            "with a vision tower, a projector and a decoder"
        )
    projector: nn.Module = owner.multi_modal_projector
    return projector


def fit_llava(model: nn.Module, r: int = 13, *, check: bool = True) -> nn.Module:
    """Fit crossget to a LLaVA, in place: merging in the vision tower, cross tokens in both parts.

    The parameters are in the model's state dict. :func:`transom.save` does not take them, because
    they belong to two hosts.

    Args:
        model: LlavaForConditionalGeneration of transformers, or one with the same parts.
        r: tokens to remove in each block of the vision tower. As many image tokens as the language
            model expects are restored; with `transom.apply(model, "crossget", cross=True,
            importance="received", restore="never")` the prompt has to hold fewer.
        check: as in :func:`transom.apply`.

    Returns:
        The same model; :func:`transom.remove` takes everything out again.

    Raises:
        HostError, FitError, SettingsError: as :func:`transom.apply`; nothing is fitted then.
    """
    _projector(model)
    api.apply(model, "crossget", r=r, cross=True, importance="received", check=check)
    try:
        api.apply(model, CrossLanguage(), check=check)
    except BaseException:
        api.remove(model, "crossget")
        raise
    return model


@contextlib.contextmanager
def aligning_llava(model: nn.Module) -> Iterator[Alignment]:
    """Keep the cross tokens of both parts for the loss, as :func:`~.cross.aligning` does.

    The loss of the release is that of the language model + 0.001 (7B) or 0.1 (13B) times this one.

    Args:
        model: that :func:`fit_llava` was called on.

    Yields:
        The cross tokens and their loss.

    Raises:
        FitError: a part has no cross tokens.
    """
    roots = {
        type(fill.enter): fitting.host.root
        for fitting in api.fittings(model)
        for fill in fitting.fills
    }
    if not {CrossToken, CrossFirst} <= set(roots):
        raise FitError(
            f"no cross tokens are fitted to both parts of this {type(model).__name__}; call "
            "fit_llava first"
        )
    towers = (
        Tower(roots[CrossToken], None, _projector(model)),
        Tower(roots[CrossFirst], None, None),
    )
    with (
        capture(model, f"blocks.*.{GUESTS}", detach=False, decoder=False) as image,
        capture(model, "blocks.*.residual.pre", detach=False, decoder=True) as text,
    ):
        yield Alignment(towers, (image, text))
