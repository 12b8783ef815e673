"""Post-training quantisation of a whole model, to see what its outliers cost."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.papers.compression.quantizable.quantizers import (
    ErrorRange,
    Grid,
    RunningRange,
    grid,
    span,
)


@dataclass
class Simulated:
    """A model whose linear layers, norms and embeddings pass through integers; undo with `close`.

    Attributes:
        grids: of the activations behind each layer, by its name.
        weights: of each weight.
    """

    grids: dict[str, Grid]
    weights: dict[str, Grid]
    _undo: list[Callable[[], None]]

    def close(self) -> None:
        """Give the weights back and take the hooks out; the model is as before, bit for bit."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()


@contextmanager
def quantised(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    weight_bits: int = 8,
    activation_bits: int = 8,
    weight_range: str = "minmax",
    per_channel: bool = False,
    momentum: float = 0.9,
    percentile: float = 100.0,
    skip: Sequence[str] = (),
) -> Iterator[Simulated]:
    """Run `model` inside this context as if its weights and activations were integers.

    Weights are symmetric, activations asymmetric with one range a tensor, from a running minimum
    and maximum. Layers are linear, convolution, embedding and LayerNorm: their weights and what
    leaves them. What is inside an attention (scores, weights, context) stays as it is, unlike in
    the official code.

    Args:
        model: in evaluation mode.
        batches: inputs that the ranges of the activations come from; a dictionary is passed by
            names.
        weight_bits, activation_bits: 32 leaves them as they are.
        weight_range: "minmax", or "mse" for the range with the smallest error.
        per_channel: one range for each output channel of a weight ("minmax" only).
        momentum, percentile: of :class:`RunningRange`.
        skip: beginnings of the names of layers to leave out, such as the head.

    Yields:
        The grids.

    Raises:
        SettingsError: there are no inputs, no layers, or a setting is unknown.
    """
    made = _prepare(
        model,
        batches,
        weight_bits,
        activation_bits,
        (weight_range, per_channel),
        (momentum, percentile),
        tuple(skip),
    )
    try:
        yield made
    finally:
        made.close()


KINDS = (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm)


def int8(model: nn.Module) -> nn.Module:
    """A copy whose linear layers compute in integers, by torch's own dynamic quantisation.

    Weights are symmetric with one range a tensor, activations asymmetric with one range a call.
    For CPUs and inference; layers in fitted slots are converted like any other.

    Args:
        model: in evaluation mode, in float32 on a CPU.
    """
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.ao as a whole
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
        made: nn.Module = quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)
    return made


def _prepare(
    model: nn.Module,
    batches: Sequence[Any],
    weight_bits: int,
    activation_bits: int,
    weights: tuple[str, bool],
    running: tuple[float, float],
    skip: tuple[str, ...],
) -> Simulated:
    layers = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, KINDS) and not any(name.startswith(s) for s in skip)
    }
    if not layers or not batches or weights[0] not in ("minmax", "mse"):
        raise SettingsError(
            f"quantised got {len(layers)} layers, {len(batches)} inputs and weight_range "
            f"{weights[0]!r}; expected at least one of both, and 'minmax' or 'mse'"
        )
    if model.training:
        raise SettingsError("quantised got a model in training mode; call model.eval() first")
    ranges = {name: RunningRange(*running) for name in layers}
    grids: dict[str, Grid] = {}
    undo: list[Callable[[], None]] = []
    if activation_bits < 32:
        hooks = [m.register_forward_hook(_see(ranges[name])) for name, m in layers.items()]
        try:
            with torch.no_grad():
                for batch in batches:
                    _call(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        for name, seen in ranges.items():
            if seen.low is not None:  # a layer that no call reached has no activations
                grids[name] = grid(*seen.seen, activation_bits)
        for name, made in grids.items():
            undo.append(layers[name].register_forward_hook(_round(made)).remove)
    found: dict[str, Grid] = {}
    if weight_bits < 32:
        for name, layer in layers.items():
            weight = layer.weight
            if not isinstance(weight, nn.Parameter):
                continue
            found[name] = _weight_grid(weight.detach(), weight_bits, *weights)
            undo.append(_swap(weight, found[name](weight.detach())))
    return Simulated(grids, found, undo)


def _call(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def _see(seen: RunningRange) -> Any:
    def hook(module: nn.Module, given: Any, output: Tensor) -> None:
        seen.see(output)

    return hook


def _round(made: Grid) -> Any:
    def hook(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        return made(output)

    return hook


def _swap(weight: nn.Parameter, value: Tensor) -> Callable[[], None]:
    old = weight.data
    weight.data = value.to(old)

    def undo() -> None:
        weight.data = old

    return undo


def _weight_grid(weight: Tensor, bits: int, how: str, per_channel: bool) -> Grid:
    if how == "mse":
        search = ErrorRange(bits)
        search.see(weight)
        low, high = (weight.new_tensor(end) for end in search.seen)
        return grid(low, high, bits, symmetric=True)
    channel = 0 if per_channel and weight.dim() > 1 else None
    return grid(*span(weight, channel), bits, symmetric=True)
