"""Does a host compute the same with transom in between? Asked before anything is fitted.

One small input runs through the host as it is, through the neutral fitting, and through a fitting
that only puts the tokens in another order. Hooks that users registered on modules of the host do
not see these runs.
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transom.errors import HostError
from transom.hosts import Change, Host, put
from transom.slots import Ask, BlockFlow, Fill, StackState
from transom.tokens import Tokens

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def example_output(host: Host) -> list[Tensor]:
    """Every tensor that the host returns for its own example, in evaluation mode.

    Raises:
        HostError: the host does not run on it.
    """
    modes = {module: module.training for module in host.root.modules()}
    host.root.eval()
    example = host.example()
    try:
        with torch.no_grad(), unobserved(host.root):
            if isinstance(example, Mapping):
                return _tensors(host.root(**example))
            return _tensors(host.root(example))
    except HostError:
        raise
    except Exception as error:
        raise HostError(
            f"this {host.family} ({type(host.root).__name__}) does not run on the example that "
            f"apply tests it with: {error}. Nothing was fitted; check=False skips the test"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def unobserved(root: nn.Module) -> Iterator[None]:
    """No forward hook of a user fires in calls of `root` or its parts inside this context.

    Hooks of torch and transformers stay, because they belong to the model: weight norm, pruning
    and sharding make its parameters, and hidden states are collected by hooks. So do hooks
    registered for all modules of the process, which other threads may be using.
    """
    seen: list[tuple[OrderedDict[int, Any], Change]] = []
    try:
        for module in root.modules():
            for name in _HOOKS:
                hooks = module.__dict__.get(name)
                if hooks:
                    part = OrderedDict((k, h) for k, h in hooks.items() if _of_library(h))
                    seen.append((part, put(module, name, part)))
        yield
    finally:
        for part, change in seen:
            change.undo()
            for key, hook in part.items():  # a library may have registered more of its own
                change.old.setdefault(key, hook)


def _of_library(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    place = getattr(hook, "__module__", None) or type(hook).__module__
    return place.split(".")[0] in ("torch", "transformers")


def _tensors(output: Any) -> list[Tensor]:
    """Every tensor in a model's output: a tensor, a mapping, or a nest of sequences."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output
    return [t for part in parts if part is not None for t in _tensors(part)]


@dataclass(frozen=True)
class _Reverse:
    """Token step that loses nothing: the same tokens in another order."""

    def __call__(self, tokens: Tokens, attended: Ask) -> Tokens:
        order = torch.arange(tokens.count, device=tokens.x.device)
        order[tokens.prefix :] = order[tokens.prefix :].flip(0)
        return tokens.keep(order.expand(len(tokens.x), -1))


def verify(
    host: Host, flows: Sequence[BlockFlow], state: StackState, expected: Sequence[Tensor]
) -> None:
    """Hold a fitted host against its plain output, once untouched and once out of order.

    Attention does not care for the order of its tokens as long as positions and masks go with
    them, so the second test shows whatever would not follow a reduction.

    Args:
        host: in which the flows are installed, with nothing in their slots.
        flows: of its blocks; the first one's slots and `state.restore` are left filled.
        state: of its stack.
        expected: what :func:`example_output` gave before.

    Raises:
        HostError: the outputs differ.
    """
    for a, b in zip(expected, example_output(host), strict=True):
        tolerance = 32 * torch.finfo(a.dtype).eps if a.is_floating_point() else 0
        if a.shape != b.shape or not torch.allclose(a, b, tolerance, tolerance, equal_nan=True):
            raise HostError(
                f"the neutral fitting of this {host.family} ({type(host.root).__name__}) changes "
                "its output, so its blocks are not what they look like; nothing was fitted. "
                "Please report the model; check=False skips this test"
            )
    if "tokens" in host.closed:
        return
    flows[0].fill = Fill(tokens=_Reverse(), drops=True)
    state.restore = "every"
    got = example_output(host)
    for a, b in zip(expected, got, strict=True):
        if not a.is_floating_point() or not a.isfinite().all():
            continue
        # sums in another order differ by rounding, and by much more if something did not follow
        limit = torch.finfo(a.dtype).eps ** 0.5
        if a.shape != b.shape or (a - b).double().norm() > limit * (1e-3 + a.double().norm()):
            raise HostError(
                f"the output of this {host.family} ({type(host.root).__name__}) depends on the "
                "order in which its tokens stand, so some position or mask does not follow them "
                "and a reduction would be wrong; nothing was fitted. Please report the model; "
                "check=False skips this test"
            )
