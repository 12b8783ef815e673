"""Fold norms that are a scale and a shift at inference into the linear maps beside them.

Batch norm and what is built on it (PRepBN, Unified Normalization) compute ``a · x + b`` per channel
once training is over. In front of a linear map that is another linear map, so the norm need not be
run at all. Which maps a norm feeds is not guessed from names: an example runs through the model
once, and what every norm's output meets on its way is written down. A norm is folded

- into the linear maps (or unpadded convolutions) behind it, if nothing else gets its output;
- else into the linear map or convolution in front of it, if nothing else gets that one's output;
- else it becomes a plain scale and shift, which is exact as well.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from transom import hosts
from transom.errors import FitError, HostError
from transom.installation import (
    PREFIX,
    Installation,
    add_modules,
    drop_modules,
    installations,
    uninstall,
)
from transom.ops import token_norm
from transom.slots import Part

_log = logging.getLogger(__name__)

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_PARTS: tuple[Part, Part] = ("norm1", "norm2")
_CONVS: dict[Any, int] = {F.conv1d: 3, F.conv2d: 4, F.conv3d: 5}
# with these, every channel of the output is the same channel of the input, or a mean of it
_PASSING = {
    *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "contiguous", "clone"),
    *("to", "type_as", "float", "double", "roll", "unbind", "chunk", "split", "expand", "squeeze"),
    *("unsqueeze", "index_select", "narrow", "select", "mean", "dropout", "movedim", "swapaxes"),
    *("__getitem__", "__get__", "t", "_to_copy", "repeat", "view_as", "expand_as", "detach"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "avg_pool1d", "flip", "__iter__"),
}


def fold(model: nn.Module, example: Any = None) -> nn.Module:
    """A copy of a model in evaluation mode without the norms that can be folded.

    The model itself is not touched. The copy computes the same up to rounding, which is tried on
    the example. Folding cannot be undone: :func:`transom.remove` on a copy takes out what is left
    of a method, such as a token step, but a norm that was folded does not come back; and it
    refuses where the fold went into parameters of the method itself.

    Args:
        model: a host, with or without fittings, a backbone, or any module with norms of these
            kinds: PRepBN, RepBN, Unified Normalization, torch's batch norms, and modules that have
            a method `as_affine() -> (scale (C,), shift (C,))`.
        example: an input to trace the model with: a tensor, a tuple of arguments or a mapping of
            them by name. By default that of the host, or a random image of the model's own size.

    Returns:
        The folded copy.

    Raises:
        FitError: there is nothing to fold, or the folded copy computes something else.
        HostError: the model needs an example.
    """
    folded = copy.deepcopy(model).eval()
    norms = list(_norms(folded))
    if not norms:
        raise FitError(
            f"this {type(model).__name__} has no norm that could be folded; expected batch norms "
            "or modules with as_affine, such as transom.apply(model, 'slab') puts in"
        )
    call = _caller(folded, example) if example is not None else _own_call(folded)
    trace = _Trace(folded, norms)
    with torch.no_grad():
        expected = _tensors(trace.run(call))
        sealed = _own_parameters(folded)
        touched: set[int] = set()
        substitutes: dict[nn.Module, nn.Module] = {}
        for norm in norms:
            substitutes[norm] = _folded(norm, trace, touched)
        _substitute(folded, substitutes)
        _settle(folded, substitutes, bool(sealed & touched))
        _compare(expected, _tensors(call()))
    kept = sum(isinstance(new, Scale) for new in substitutes.values())
    if kept:
        _log.info("%d of %d norms stay as a scale and a shift", kept, len(norms))
    return folded


class Scale(nn.Module):
    """What is left of a norm that no neighbour can take in: scale · x + shift per channel."""

    def __init__(self, scale: Tensor, shift: Tensor, channel: int) -> None:
        """Build it.

        Args:
            scale, shift: (C,).
            channel: dimension of the channels.
        """
        super().__init__()
        self.channel = channel
        self.scale = nn.Parameter(scale)
        self.shift = nn.Parameter(shift)

    def forward(self, x: Tensor) -> Tensor:
        """Of the same shape as x."""
        over = [1] * x.dim()
        over[self.channel] = -1
        return x * self.scale.view(over) + self.shift.view(over)


def _norms(model: nn.Module) -> Any:
    """Modules that are a scale and a shift, outermost ones only."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module in inside or not _is_affine(module):
            continue
        inside.update(module.modules())
        yield module


def _is_affine(module: nn.Module) -> bool:
    if type(module) in _BATCH_NORMS:
        return getattr(module, "running_mean", None) is not None
    return callable(getattr(module, "as_affine", None))


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) in float64."""
    exact = copy.deepcopy(norm).double()
    if type(norm) in _BATCH_NORMS:
        return token_norm.batch_norm_affine(
            exact.running_mean, exact.running_var, exact.weight, exact.bias, exact.eps
        )
    scale, shift = exact.as_affine()
    return scale, shift


@dataclass(eq=False)
class _Map:
    """A linear map or convolution: whose parameters, and what it was seen to do."""

    owner: nn.Module
    weight: str
    bias: str
    calls: int = 0
    spoilt: bool = False
    outlets: _Flow | None = None


@dataclass(eq=False)
class _Flow:
    """Everything that a norm or a map put out: who reads it, how often, and whether all is known.

    Attributes:
        channels: C.
        readers: maps that got it as their input, once for each call.
        norms: norms that did.
        leaks: whether something else did.
    """

    channels: int
    readers: list[_Map] = field(default_factory=list)
    norms: list[nn.Module] = field(default_factory=list)
    leaks: bool = False


class _Trace(TorchFunctionMode):
    """Follows tensors through one call of a model."""

    def __init__(self, model: nn.Module, norms: list[nn.Module]) -> None:
        super().__init__()
        self.maps: dict[int, _Map] = {}
        for module in model.modules():
            for weight, bias in (("weight", "bias"), ("in_proj_weight", "in_proj_bias")):
                parameter = module._parameters.get(weight)
                if parameter is not None and parameter.dim() > 1:
                    found = self.maps.setdefault(id(parameter), _Map(module, weight, bias))
                    found.spoilt |= found.owner is not module
        self.flows = {norm: _Flow(_affine(norm)[0].numel()) for norm in norms}
        self.fed: dict[nn.Module, _Flow | None] = {}
        self.rank: dict[nn.Module, int] = {}
        self.seen: dict[int, tuple[Tensor, _Flow]] = {}
        self.inside = False

    def run(self, call: Callable[[], Any]) -> Any:
        """Call the model and follow."""
        hooks = []
        for norm in self.flows:
            hooks.append(norm.register_forward_pre_hook(self._enter))
            hooks.append(norm.register_forward_hook(self._leave))
        try:
            with self:
                out = call()
        finally:
            for hook in hooks:
                hook.remove()
        for tensor in _tensors(out):
            self._leak(tensor)
        self.seen.clear()
        return out

    def _flow(self, value: Any) -> _Flow | None:
        found = self.seen.get(id(value))
        return None if found is None else found[1]

    def _mark(self, value: Any, flow: _Flow) -> None:
        if isinstance(value, Tensor):
            self.seen[id(value)] = (value, flow)  # kept alive, so that its id is not used again
        elif isinstance(value, list | tuple):
            for part in value:
                self._mark(part, flow)

    def _leak(self, value: Any) -> None:
        flow = self._flow(value)
        if flow is not None:
            flow.leaks = True

    def _enter(self, norm: nn.Module, args: Any) -> None:
        flow = self._flow(args[0])
        if len(args) > 1 or norm in self.fed:
            self._leak(args[0])
            flow = None
        self.fed[norm] = flow
        self.rank[norm] = args[0].dim()
        if flow is not None:
            flow.norms.append(norm)
        self.inside = True

    def _leave(self, norm: nn.Module, args: Any, out: Tensor) -> None:
        self.inside = False
        self._mark(out, self.flows[norm])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.inside or not any(isinstance(part, Tensor) for part in _flat(out)):
            return out
        operands = [*_flat(args), *_flat(list(kwargs.values()))]
        if func is F.linear or func in _CONVS:
            self._through(func, args, kwargs, out)
            return out
        if func is F.multi_head_attention_forward and self._packed(args, operands):
            return out
        for value in operands:
            if id(value) in self.maps:
                self.maps[id(value)].spoilt = True
        flows = [flow for flow in map(self._flow, operands) if flow is not None]
        if len(flows) == 1 and getattr(func, "__name__", "") in _PASSING:
            self._mark(out, flows[0])
        else:
            for flow in flows:
                flow.leaks = True
        return out

    def _packed(self, args: Any, operands: list[Any]) -> bool:
        """A call of packed attention on one input, as `nn.MultiheadAttention` makes it."""
        flow = self._flow(args[0])
        packed = (self.maps.get(id(value)) for value in operands)
        found = next((m for m in packed if m is not None and m.weight == "in_proj_weight"), None)
        if flow is None or found is None or not args[0] is args[1] is args[2]:
            return False
        bias = getattr(found.owner, found.bias)
        found.spoilt |= bias is not None and not any(value is bias for value in operands)
        found.calls += 1
        flow.readers.append(found)
        for value in operands:  # the output projection is used in a way that is not followed
            if id(value) in self.maps and self.maps[id(value)] is not found:
                self.maps[id(value)].spoilt = True
        return True

    def _through(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        """A call of a linear map or a convolution."""
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, weight, bias = given["input"], given["weight"], given.get("bias")
        for value in (x, bias):
            if id(value) in self.maps:
                self.maps[id(value)].spoilt = True
        found, flow = self.maps.get(id(weight)), self._flow(x)
        if found is None:
            self._leak(x)
            self._leak(weight)
            return
        found.calls += 1
        if getattr(found.owner, found.bias, None) is not bias:
            found.spoilt = True
        if found.outlets is None:
            found.outlets = _Flow(weight.shape[0])
        self._mark(out, found.outlets)
        if flow is None:
            return
        channel, padding = -1, given.get("padding", 0)
        if func in _CONVS:
            channel = 1 - _CONVS[func]
        plain = func is F.linear or (given.get("groups", 1) == 1 and not any(_flat([padding])))
        fits = plain and weight.shape[1] == flow.channels and x.dim() >= -channel
        if fits and x.shape[channel] == flow.channels:
            flow.readers.append(found)
        else:
            flow.leaks = True


def _tensors(output: Any) -> list[Tensor]:
    """Every tensor in a model's output."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    parts = output if isinstance(output, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _flat(values: Any) -> list[Any]:
    """The leaves of a nest of lists and tuples."""
    if not isinstance(values, list | tuple):
        return [values]
    return [leaf for value in values for leaf in _flat(value)]


def _folded(norm: nn.Module, trace: _Trace, touched: set[int]) -> nn.Module:
    """Fold one norm where it can go; what takes its place."""
    scale, shift = _affine(norm)
    flow, fed = trace.flows[norm], trace.fed.get(norm)
    if fed is None and norm not in trace.rank:
        return norm  # it was not run, so nothing is known of it
    readers = set(flow.readers)
    complete = all(not m.spoilt and flow.readers.count(m) == m.calls for m in readers)
    if readers and complete and not flow.leaks and not flow.norms:
        for found in readers:
            _rewrite(found, token_norm.into_next, scale, shift, touched)
        return nn.Identity()
    source = next((m for m in trace.maps.values() if m.outlets is fed and fed is not None), None)
    if source is not None and fed is not None and not source.spoilt and source.calls == 1:
        alone = fed.norms == [norm] and not fed.readers and not fed.leaks
        if alone and fed.channels == scale.numel():
            _rewrite(source, token_norm.into_previous, scale, shift, touched)
            return nn.Identity()
    like = next(norm.parameters())
    channels_last = type(norm) not in _BATCH_NORMS or trace.rank[norm] == 2
    return Scale(scale.to(like), shift.to(like), -1 if channels_last else 1)


def _rewrite(
    found: _Map, how: Callable[..., Any], scale: Tensor, shift: Tensor, touched: set[int]
) -> None:
    weight, bias = getattr(found.owner, found.weight), getattr(found.owner, found.bias, None)
    touched.add(id(weight))
    exact = None if bias is None else bias.double()
    new, moved = how(weight.double(), exact, scale, shift)
    weight.data = new.to(weight.dtype)
    if bias is None:
        setattr(found.owner, found.bias, nn.Parameter(moved.to(weight.dtype)))
    else:
        bias.data = moved.to(bias.dtype)


def _substitute(model: nn.Module, substitutes: Mapping[nn.Module, nn.Module]) -> None:
    """Put what takes the place of each norm wherever the norm is registered."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in substitutes:
                parent._modules[name] = substitutes[child]


def _own_parameters(model: nn.Module) -> set[int]:
    """Parameters that came with a method."""
    found: set[int] = set()
    for installation in installations(model):
        own = getattr(installation.host.root, PREFIX, None)
        found |= set() if own is None else {id(p) for p in own.parameters()}
    return found


def _settle(model: nn.Module, substitutes: Mapping[nn.Module, nn.Module], sealed: bool) -> None:
    """Make what a fitting's norms became a part of the host, and drop empty fittings."""
    for installation in installations(model):
        _settle_one(installation, substitutes, sealed)


def _settle_one(
    installation: Installation, substitutes: Mapping[nn.Module, nn.Module], sealed: bool
) -> None:
    host = installation.host
    for fitting in installation.fittings:
        for i, fill in enumerate(fitting.fills):
            norms = list(fill.norms)
            for place, name in enumerate(_PARTS):
                filled = norms[place]
                new = substitutes.get(filled) if isinstance(filled, nn.Module) else None
                own = host.views[i].part(name)
                if new is not None and own is not None:
                    _substitute(host.root, {own: new})
                    norms[place] = None
            fitting.fills[i] = replace(fill, norms=(norms[0], norms[1]))
    empty = [f for f in installation.fittings if not any(fill.slots() for fill in f.fills)]
    drop_modules(installation, installation.fittings)
    installation.fittings = [f for f in installation.fittings if f not in empty]
    if not installation.fittings:
        uninstall(installation)
        return
    for fitting in installation.fittings:
        add_modules(installation, fitting)
    installation.refresh()
    installation.sealed = sealed


def _caller(model: nn.Module, example: Any) -> Callable[[], Any]:
    if isinstance(example, Mapping):
        return lambda: model(**example)
    arguments = example if isinstance(example, tuple) else (example,)
    return lambda: model(*arguments)


def _own_call(model: Any) -> Callable[[], Any]:
    """A call of the host in a model, or of the model on a random image as large as its own."""
    for installation in installations(model):
        return _caller(installation.host.root, installation.host.example())
    try:
        host = hosts.find(model)
        return _caller(host.root, host.example())
    except HostError:
        pass
    config = getattr(model, "pretrained_cfg", None) or {}
    size = config.get("input_size")
    own = getattr(getattr(model, "patch_embed", None), "img_size", None)
    own = getattr(model, "img_size", own)
    if size is None:
        raise HostError(
            f"fold has to run this {type(model).__name__} once and does not know what on; give it "
            "an input: transom.fold(model, example=images)"
        )
    return _caller(model, hosts.base.example_pixels(model, size[0], tuple(own or size[1:])))


def _compare(expected: list[Tensor], got: list[Tensor]) -> None:
    for a, b in zip(expected, got, strict=True):
        if not a.is_floating_point() or not a.isfinite().all():
            continue
        limit = torch.finfo(a.dtype).eps ** 0.5
        if a.shape != b.shape or (a - b).double().norm() > limit * (1e-3 + a.double().norm()):
            raise FitError(
                "the folded copy does not compute what the model computes, so a norm is used in a "
                "way that the trace does not see; please report the model. Nothing was changed"
            )
