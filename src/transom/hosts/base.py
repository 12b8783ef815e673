"""What every host adapter hands to the engine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from transom.errors import HostError
from transom.slots import BlockView, RestoringStack

Reads = Literal["class token", "pooled", "tokens", "maps"]
Modality = Literal["image", "video", "audio", "text"]


@dataclass
class Change:
    """One edit of an object, with what is needed to take it back."""

    target: Any
    name: str
    present: bool
    old: Any

    def undo(self) -> None:
        """Put the old value back, or remove the attribute if there was none."""
        if self.name == "__class__":
            self.target.__class__ = self.old
        elif self.present:
            self.target.__dict__[self.name] = self.old
        else:
            self.target.__dict__.pop(self.name, None)


def put(target: Any, name: str, value: Any) -> Change:
    """Set an instance attribute (or the class) of `target`; parameters and modules stay as is."""
    if name == "__class__":
        change = Change(target, name, True, target.__class__)
        target.__class__ = value
        return change
    own = target.__dict__
    change = Change(target, name, name in own, own.get(name))
    own[name] = value
    return change


@dataclass
class Host:
    """One view of a model's family.

    Attributes:
        family: name for messages and tables.
        root: the module that turns pixels into features; its own forward is called in checks.
        name: path of `root` inside the user's model; "" for the model itself.
        stack: the container of blocks.
        stack_name: its path inside `root`.
        more_stacks: further containers of blocks with their paths, in the order in which they
            run; tokens do not travel from one to the next.
        views: one adapter a block, of all stacks.
        width: channels D.
        prefix: leading tokens that are no patches.
        class_token: whether token 0 is a class token that collects the image.
        grid: (h, w) of the patches at the host's own image size; None when unknown.
        reads: what is made of the tokens behind the stack: only the "class token" is read, the
            patches are "pooled", the "tokens" themselves are shown, or the features between the
            blocks are used as "maps".
        architecture: the host's own name, e.g. of the timm model; "" when unknown.
        example: makes an input for `root`: one tensor (1, ...), or its arguments by name.
        install: family-specific edits beside the block flow.
        follows: whether positions enter each attention and have to follow their tokens.
        parallel: whether attention and ffn of a block run side by side; a block's token step then
            comes behind the sum of both.
        closed: slots that cannot be filled here, each with the reason.
        modality: what the tokens are pieces of.
        decodes: whether it is a decoder: tokens see only those before them.
        causal: whether tokens of this encoder see only those before them, and the last real one
            is read.
    """

    family: str
    root: nn.Module
    name: str
    stack: nn.Module
    stack_name: str
    views: list[BlockView]
    width: int
    prefix: int
    class_token: bool
    grid: tuple[int, int] | None
    reads: Reads
    architecture: str
    example: Callable[[], Tensor | Mapping[str, Tensor]]
    install: Callable[[], Iterable[Change]] = field(default=tuple)
    follows: bool = False
    parallel: bool = False
    closed: Mapping[str, str] = field(default_factory=dict)
    modality: Modality = "image"
    decodes: bool = False
    causal: bool = False
    more_stacks: tuple[tuple[str, nn.Module], ...] = ()

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.views)

    @property
    def stacks(self) -> tuple[tuple[str, nn.Module], ...]:
        """Every container of blocks with its path."""
        return ((self.stack_name, self.stack), *self.more_stacks)


def parts(module: nn.Module, known: Iterable[str], name: str, *, parameters: bool = False) -> None:
    """Refuse a module that has children nobody knows.

    Args:
        module: whose direct children are looked at.
        known: names of children the adapter understands.
        name: of the module, for the message.
        parameters: whether parameters of the module itself have to be known as well.

    Raises:
        HostError: a child is not known; its name is in the message.
    """
    found = {child for child, _ in module.named_children()}
    if parameters:
        found |= {own for own, _ in module.named_parameters(recurse=False)}
    unknown = sorted(found - set(known))
    if unknown:
        raise HostError(
            f"{name} ({type(module).__name__}) has a part {unknown[0]!r} that transom does not "
            f"know, so fitting would skip it silently; known parts are {sorted(known)}"
        )


def example_pixels(root: nn.Module, channels: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """A random image (1, C, H, W) in the dtype and on the device of `root`."""
    parameter = next(root.parameters())
    noise = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(seed))
    return noise.to(device=parameter.device, dtype=parameter.dtype)


class RestoredIntermediates:
    """forward_intermediates over blocks whose outputs are restored to the grid.

    Attributes:
        owner: the module that has the method.
        stack: path of the module below it that holds the blocks.
    """

    def __init__(self, owner: nn.Module, stack: str) -> None:
        self.owner = owner
        self.stack = stack

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner: Any = self.owner
        # a shallow view that exists for this call only; the model itself is not touched
        view = _with(owner, self.stack)
        view.__dict__.pop("forward_intermediates")
        return type(owner).forward_intermediates(view, *args, **kwargs)


def _with(module: nn.Module, path: str) -> Any:
    """A shallow copy of a module in which the stack at this path restores."""
    view = copy.copy(module)
    name, _, below = path.partition(".")
    child: Any = getattr(module, name)
    new = _with(child, below) if below else RestoringStack(child)
    view.__dict__["_modules"] = {**module._modules, name: new}
    return view
