"""Twins with every grid anchored: put over a model of timm in place, or a model of its own."""

from __future__ import annotations

from typing import Any

from timm.models.twins import Twins
from torch import Tensor, nn

from transom.errors import FitError, HostError
from transom.hosts.base import Change, put
from transom.papers.attention.shift_equivariance.polyphase import anchor, anchor_tokens

_KEY = "_transom_anchors"


class AnchoredEmbed:
    """Forward of a patch embedding: anchors the image at its own stride first."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def __call__(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        return type(self.module).forward(self.module, anchor(x, self.module.patch_size))


class AnchoredBlock:
    """Forward of a block: anchors the whole stream at the stride of its attention first."""

    def __init__(self, module: nn.Module, stride: int) -> None:
        self.module: Any = module
        self.stride = stride

    def __call__(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return type(self.module).forward(self.module, anchor_tokens(x, size, self.stride), size)


def stride_of(block: nn.Module) -> int:
    """Side of the windows of a block of Twins, or of what its keys are made of; 1 for neither."""
    attn: Any = getattr(block, "attn", None)
    if attn is not None and hasattr(attn, "ws"):
        return int(attn.ws)
    if attn is not None and hasattr(attn, "sr_ratio"):
        return int(attn.sr_ratio)
    raise HostError(
        f"a block ({type(block).__name__}) attends with {type(attn).__name__}; expected a windowed "
        "or a sub-sampled attention of timm's Twins"
    )


def anchor_twins(model: Twins) -> Twins:
    """Anchor every grid of a Twins model, in place: its logits no longer see circular shifts.

    The weights stay what they are. Twins has no table of positions, so a trained model goes on
    working; its convolutions see the other border instead of zeros. What lies between the stages
    (features, maps) comes out shifted by a multiple of the strides, image by image.

    Args:
        model: of timm, windowed (SVT) or not (PCPVT).

    Returns:
        The same model.

    Raises:
        HostError: no Twins of timm, or a part of it is not known.
        FitError: it is anchored already, or a stage ends at a stride that the next patch
            embedding is not at home on.
    """
    if not isinstance(model, Twins):
        raise HostError(f"got a {type(model).__name__}; expected a Twins of timm")
    if _KEY in model.__dict__:
        raise FitError("this Twins is anchored already; release_twins(model) first")
    parts: Any = model
    strides = [[stride_of(block) for block in stage] for stage in parts.blocks]
    for i, embed in enumerate(parts.patch_embeds[1:], 1):
        step, last = int(embed.patch_size[0]), strides[i - 1][-1]
        if last % step:
            raise FitError(
                f"stage {i - 1} ends with an attention of stride {last}, so the patch embedding of "
                f"stage {i} (stride {step}) would not begin where a shifted image lets it begin"
            )
    for module in model.modules():
        if "forward" in module.__dict__:
            raise HostError(
                f"a {type(module).__name__} has a forward of its own put over it; remove that "
                "first, it would be switched off"
            )
    journal: list[Change] = []
    first = parts.patch_embeds[0]
    journal.append(put(first, "forward", AnchoredEmbed(first)))
    for stage, steps in zip(parts.blocks, strides, strict=True):
        for block, step in zip(stage, steps, strict=True):
            if step > 1:
                journal.append(put(block, "forward", AnchoredBlock(block, step)))
    for position in parts.pos_block:
        for part in position.modules():
            if isinstance(part, nn.Conv2d):
                journal.append(put(part, "padding_mode", "circular"))
    model.__dict__[_KEY] = journal
    return model


def release_twins(model: Twins) -> Twins:
    """Take back what :func:`anchor_twins` did.

    Returns:
        The same model, as it was.

    Raises:
        FitError: it is not anchored.
    """
    journal = model.__dict__.pop(_KEY, None)
    if journal is None:
        raise FitError("this model is not anchored; call anchor_twins first")
    for change in reversed(journal):
        change.undo()
    return model


class PolyTwins(Twins):
    """A Twins that is anchored from the start; takes timm's arguments, by timm's names."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        anchor_twins(self)
