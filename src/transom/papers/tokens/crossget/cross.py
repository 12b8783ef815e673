"""Cross tokens on fitted hosts: a guest in each block, and the loss that draws two towers together.

    cross_i = stopgrad(cross as it left block i - 1) + p_i        p_i learned, zero at first

In front of the first block the guest is a copy of the class token (of the mean where there is
none). In a text that is read from its end it is a copy of the end in front of every block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transom import api
from transom.errors import FitError, HostError, TokensError
from transom.hosts.base import Host
from transom.lens.capture import capture
from transom.papers.tokens.crossget.towers import alignment_loss, normed
from transom.tokens import Record
from transom.watching import GUESTS


def refuse_without_room(host: Host) -> None:
    """Refuse a host in whose attention a guest has no place.

    Raises:
        FitError: positions enter the attention, or the tokens go through several stacks.
    """
    if host.follows and not host.causal:
        raise FitError(
            f"cross tokens have no position, and in this {host.family} positions enter the "
            "attention; crossget without cross=True fits it"
        )
    if host.more_stacks:
        raise FitError(
            f"cross tokens go through one stack of blocks, and this {host.family} has "
            f"{len(host.stacks)}; crossget without cross=True fits it"
        )


class CrossToken(nn.Module):
    """The guest of one block.

    Attributes:
        learned: (1, 1, D), p_i.
        origin: what is copied: the "class" token, the "mean" of the real tokens, both in front of
            the first block only, or the "end" of a text in front of every block.
    """

    def __init__(self, width: int, origin: str) -> None:
        super().__init__()
        self.learned = nn.Parameter(torch.zeros(1, 1, width))
        self.origin = origin

    def forward(
        self, x: Tensor, guests: Tensor | None, record: Record
    ) -> tuple[Tensor, Tensor | None]:
        if self.origin == "end":
            guests = end_of(x, record.valid)
        elif guests is None and self.origin == "class":
            guests = x[:, :1]
        elif guests is None:
            guests = mean_of(x, record.valid)
        return x, guests.detach() + self.learned


def end_of(x: Tensor, valid: Tensor | None) -> Tensor:
    """(B, 1, D): the last real token of x (B, N, D)."""
    if valid is None:
        return x[:, -1:]
    return x[torch.arange(len(x), device=x.device), valid.sum(-1) - 1][:, None]


def mean_of(x: Tensor, valid: Tensor | None) -> Tensor:
    """(B, 1, D): mean of the real tokens of x (B, N, D)."""
    if valid is None:
        return x.mean(1, keepdim=True)
    real = valid[..., None].to(x.dtype)
    return (x * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)


@dataclass(frozen=True)
class Tower:
    """One tower of a two-tower model.

    Attributes:
        module: the host.
        norm: with whose parameters cross tokens are normed on their way to the joint space; None
            where the blocks end with a norm.
        project: to the joint space; None when the tower lives in it.
    """

    module: nn.Module
    norm: nn.LayerNorm | None
    project: nn.Module | None

    def shown(self, cross: Tensor) -> Tensor:
        """Cross tokens (..., D) in the joint space (..., E); no gradient to norm and projection."""
        if self.norm is not None:
            norm = self.norm
            cross = normed(cross, norm.weight.detach(), norm.bias.detach(), norm.eps)
        if self.project is None:
            return cross
        fixed = {name: p.detach() for name, p in self.project.named_parameters()}
        return torch.func.functional_call(self.project, fixed, (cross,))


# Where models of transformers keep their towers, the norm in front of the joint space (of the
# image tower of CLIP that before the blocks, as in the released code), and the projections.
_PAIRS = (
    ("vision_model", "pre_layrnorm", "visual_projection"),
    ("vision_model", "post_layernorm", "visual_projection"),
    ("vision_model", "post_layernorm", "vision_proj"),
    ("text_model", "final_layer_norm", "text_projection"),
    ("text_model", None, "text_projection"),
    ("text_encoder", None, "text_proj"),
)


def towers_of(model: nn.Module) -> tuple[Tower, Tower]:
    """The image and the text tower of a model of transformers.

    Args:
        model: CLIPModel, BlipForImageTextRetrieval, BlipModel or one with the same parts.

    Raises:
        HostError: it has other parts.
    """
    found: dict[str, Tower] = {}
    for name, norm, project in _PAIRS:
        module, to_joint = getattr(model, name, None), getattr(model, project, None)
        if not isinstance(module, nn.Module) or not isinstance(to_joint, nn.Linear):
            continue
        if norm is None or hasattr(module, norm):
            kind = "image" if name == "vision_model" else "text"
            own = None if norm is None else getattr(module, norm)
            found.setdefault(kind, Tower(module, own, to_joint))
    if len(found) < 2:
        raise HostError(
            f"{type(model).__name__} has no two towers with projections into one space that "
            "CrossGET knows; expected transformers' CLIPModel, BlipForImageTextRetrieval or "
            "BlipModel"
        )
    return found["image"], found["text"]


def fit_towers(
    model: nn.Module, r_image: int = 16, r_text: int = 0, *, check: bool = True, **settings: Any
) -> nn.Module:
    """Fit crossget with cross tokens to both towers of a model, in place.

    In CLIP the towers do not meet before the end, and the cross tokens learn of the other tower by
    the loss alone (:func:`aligning`). In BLIP the cross token of the text looks at the image with
    the text, so its query is guided by that image; the image tower runs first and has the loss.

    Args:
        model: see :func:`towers_of`.
        r_image, r_text: tokens to remove in each block of a tower.
        check: as in :func:`transom.apply`.
        **settings: of the method.

    Returns:
        The same model; :func:`transom.remove` takes both out again.

    Raises:
        HostError, FitError, SettingsError: as :func:`transom.apply`; nothing is fitted then.
    """
    image, text = towers_of(model)
    api.apply(image.module, "crossget", r=r_image, cross=True, check=check, **settings)
    try:
        api.apply(text.module, "crossget", r=r_text, cross=True, check=check, **settings)
    except BaseException:
        api.remove(image.module, "crossget")
        raise
    return model


class Alignment:
    """What :func:`aligning` yields."""

    def __init__(
        self, towers: tuple[Tower, Tower], seen: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
    ) -> None:
        self._towers, self._seen = towers, seen

    def crosses(self) -> tuple[Tensor, Tensor]:
        """Cross tokens (L, B, E) of both towers in the joint space, of the latest call.

        The layers of the shorter tower are repeated to the depth of the other one.

        Raises:
            TokensError: a tower was not called, or the batches differ.
        """
        shown = []
        for tower, seen in zip(self._towers, self._seen, strict=True):
            if not seen:
                raise TokensError(
                    "no cross tokens were seen: call the model, not compiled, with images and "
                    "texts inside the context before asking for the loss"
                )
            # of a language model all tokens were kept, and its first one is the cross token
            shown.append(torch.stack([tower.shown(cross[:, 0]) for cross in seen.values()]))
        depth = max(len(x) for x in shown)
        place = torch.arange(depth)
        image, text = (x[place * len(x) // depth] for x in shown)
        if image.shape != text.shape:
            raise TokensError(
                f"cross tokens are {tuple(image.shape)} and {tuple(text.shape)}; give as many "
                "texts as images, each with its own"
            )
        return image, text

    def loss(self) -> Tensor:
        """The alignment loss of the latest call, a scalar."""
        image, text = self.crosses()
        return alignment_loss(image.flatten(0, 1), text.flatten(0, 1))


@contextlib.contextmanager
def aligning(model: nn.Module) -> Iterator[Alignment]:
    """Keep the cross tokens of calls inside this context for the alignment loss.

        with aligning(model) as alignment:
            output = model(input_ids=ids, pixel_values=pixels, return_loss=True)
        loss = (1 - w) * output.loss + w * alignment.loss()          # w = 0.5 in the paper

    Args:
        model: that :func:`fit_towers` was called on.

    Yields:
        The cross tokens and their loss.

    Raises:
        FitError: a tower has no cross tokens.
    """
    towers = towers_of(model)
    for tower in towers:
        own = [f for f in api.fittings(tower.module) if f.slug == "crossget"]
        if not any(isinstance(fill.enter, CrossToken) for f in own for fill in f.fills):
            raise FitError(
                f"no cross tokens are fitted to the {type(tower.module).__name__} of this model; "
                "call fit_towers first"
            )
    names = f"blocks.*.{GUESTS}"
    with (
        capture(towers[0].module, names, detach=False) as image,
        capture(towers[1].module, names, detach=False) as text,
    ):
        yield Alignment(towers, (image, text))
