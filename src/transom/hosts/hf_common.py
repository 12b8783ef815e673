"""What the adapters for Hugging Face transformers share: to find encoders and to read modules."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from transom.errors import HostError
from transom.hosts.base import Change, put
from transom.slots import FittedStack

# Names under which a block keeps its attention.
ATTENTION = ("attention", "self_attn")


def encoders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of transformers that have a configuration of their own, with their paths."""
    from transformers import PreTrainedConfig

    for name, module in model.named_modules():
        if isinstance(module.__dict__.get("config"), PreTrainedConfig):
            yield name, module


def stack(root: nn.Module) -> tuple[str, nn.Module]:
    """The one container of layers with attention in an encoder, and its path.

    Raises:
        HostError: there is none, or more than one.
    """
    stacks = [
        (name, module)
        for name, module in root.named_modules()
        if isinstance(module, nn.ModuleList | FittedStack)
        and len(module._modules)
        and all(
            any(n in dict(layer.named_children()) for n in ATTENTION)
            for layer in module._modules.values()
            if layer is not None
        )
    ]
    if len(stacks) != 1:
        raise HostError(
            f"{type(root).__name__} has {len(stacks)} stacks of layers with attention "
            f"({[name for name, _ in stacks]}); expected exactly one nn.ModuleList. Encoders with "
            "stages or windows are not supported"
        )
    return stacks[0]


def reason(model: nn.Module) -> str | None:
    """Why a model of transformers in which no encoder was found is no host; None for others."""
    from transformers import PreTrainedModel

    inside = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not inside:
        return None
    return (
        f"{type(model).__name__} is not a supported host: in {type(inside[0]).__name__} there is "
        "no module whose `embeddings` hold patch embeddings or word embeddings beside one "
        f"nn.ModuleList of layers with {' or '.join(map(repr, ATTENTION))}. Of transformers, "
        "encoders of images, video, sound and text with plain global attention are supported; "
        "decoders, windows and stages are not"
    )


def arguments(module: nn.Module) -> tuple[tuple[str, ...], bool]:
    """Names of a module's arguments beside the hidden states, and whether it takes any others."""
    found = inspect.signature(type(module).forward).parameters.values()
    names = [p.name for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return tuple(names[2:]), any(p.kind == p.VAR_KEYWORD for p in found)


def role(
    children: Mapping[str, nn.Module],
    names: tuple[str, ...],
    what: str,
    name: str,
    block: nn.Module,
) -> str:
    """The one child that plays a role.

    Args:
        children: of the block.
        names: that the role may have.
        what: the role, for the message.
        name: of the block, for the message.
        block: itself.

    Raises:
        HostError: there is none, or more than one.
    """
    found = [n for n in names if n in children]
    if len(found) != 1:
        raise HostError(
            f"{name} ({type(block).__name__}) has {len(found)} parts that could be its {what}; "
            f"expected exactly one of {list(names)} among {sorted(children)}"
        )
    return found[0]


def first(output: Any) -> Tensor:
    """The features in what an attention returns: alone, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]


def _unpadded(root: Any, *args: Any, **kwargs: Any) -> Any:
    """Forward of an encoder that says there is no padding when it is exported without a mask.

    The library would make a mask of all tokens then, because it cannot look into one, and every
    reduction would have to go the long way that padding needs. One number that masks nothing is
    handed on as it is.
    """
    if torch.compiler.is_exporting():
        place = arguments(root)[0].index("attention_mask") + 1
        if len(args) <= place and kwargs.get("attention_mask") is None:
            like = next(root.parameters())
            one = torch.zeros(1, 1, 1, 1, dtype=like.dtype, device=like.device)
            fused = root.config._attn_implementation == "sdpa"
            kwargs["attention_mask"] = one == 0 if fused else one
    return type(root).forward(root, *args, **kwargs)


class UnpaddedForward(partial[Any]):
    """:func:`_unpadded` of one encoder, with the signature of the encoder's own forward.

    Of all callables that are no functions, torch.export takes only a partial for a forward.
    """

    @property
    def __signature__(self) -> inspect.Signature:
        (root,) = self.args
        return inspect.signature(partial(type(root).forward, root))


def unpadded(root: nn.Module) -> Iterator[Change]:
    """Put :class:`UnpaddedForward` over an encoder that takes a mask."""
    if "attention_mask" in arguments(root)[0] and "forward" not in root.__dict__:
        yield put(root, "forward", UnpaddedForward(_unpadded, root))
