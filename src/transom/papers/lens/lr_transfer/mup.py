"""muP for networks with ordinary initialisation, against a narrow base model of the same kind."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from transom.errors import FitError, SettingsError

Ratios = dict[str, tuple[float, ...]]


class Readout(nn.Linear):
    """The last layer: its input is multiplied by output_mult over the width ratio.

    Args:
        inputs, outputs: features.
        bias: whether there is one.
        output_mult: a multiplier to tune on the base model.
    """

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool = True, output_mult: float = 1.0
    ) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.output_mult = output_mult
        self.ratio: float | None = None

    def forward(self, input: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return super().forward(input * (self.output_mult / (self.ratio or 1.0)))


def width_ratios(model: nn.Module, base: nn.Module) -> Ratios:
    """How many times wider each axis of each parameter is than in the base model.

    Args:
        model: any width.
        base: the same architecture, narrow.

    Returns:
        One ratio an axis, by the parameter's name; 1 where the axis does not scale.

    Raises:
        FitError: the models have other parameters.
    """
    ours, theirs = dict(model.named_parameters()), dict(base.named_parameters())
    odd = sorted(ours.keys() ^ theirs.keys()) or [n for n in ours if ours[n].ndim != theirs[n].ndim]
    if odd:
        raise FitError(
            f"the base model is of another architecture: parameters {odd[:4]} differ; build it "
            "with the same code and a smaller width"
        )
    return {
        name: tuple(a / b for a, b in zip(p.shape, theirs[name].shape, strict=True))
        for name, p in ours.items()
    }


@torch.no_grad()
def rescale(model: nn.Module, base: nn.Module) -> Ratios:
    """Turn ordinary initialisation (1/sqrt(fan in)) into that of muP, in place, once.

    With m the ratio of the fan in: weight and bias of a :class:`Readout` times sqrt(m), biases of
    linear and convolution layers times sqrt(m); hidden weights are right as they are.

    Args:
        model: with at least one :class:`Readout`, freshly initialised.
        base: the same architecture, narrow.

    Returns:
        The ratios, for :func:`groups`.

    Raises:
        FitError: there is no readout, or the model was rescaled before, or `base` does not match.
    """
    ratios = width_ratios(model, base)
    readouts = [part for part in model.modules() if isinstance(part, Readout)]
    if not readouts:
        raise FitError(
            f"{type(model).__name__} has no Readout; use one as its last layer, for example "
            "model.head = Readout(width, classes)"
        )
    if any(part.ratio is not None for part in readouts):
        raise FitError(
            "the model was rescaled before; doing it twice would scale its weights twice"
        )
    for name, part in model.named_modules():
        if not isinstance(part, nn.Linear | nn.modules.conv._ConvNd):
            continue
        m = ratios[f"{name}.weight" if name else "weight"][1]
        if isinstance(part, Readout):
            part.weight *= m**0.5
            part.ratio = m
        if part.bias is not None:
            part.bias *= m**0.5
    return ratios


def groups(
    model: nn.Module,
    ratios: Ratios,
    lr: float,
    *,
    optimizer: Literal["adam", "sgd"] = "adam",
    weight_decay: float = 0.0,
    decoupled: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups with the learning rates and decays of muP.

    A matrix scales along both axes, a vector along one. Adam: lr / m for matrices with m the ratio
    of the fan in. SGD: lr / (fan in's ratio / fan out's) for matrices, lr m for vectors. Decay that
    is part of the gradient (L2) is scaled the other way, so that lr times decay stays.

    Args:
        model: rescaled.
        ratios: from :func:`rescale`.
        lr: found on the base model.
        optimizer: which rules.
        weight_decay: of every parameter.
        decoupled: the decay acts on the weights directly (AdamW) and is left as it is.

    Returns:
        Groups for a torch optimizer, one for each learning rate.

    Raises:
        SettingsError: the optimizer is unknown.
    """
    if optimizer not in ("adam", "sgd"):
        raise SettingsError(f"optimizer is {optimizer!r}; expected 'adam' or 'sgd'")
    found: dict[float, list[Tensor]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        scaling = [(axis, r) for axis, r in enumerate(ratios[name]) if r != 1]
        factor = 1.0
        if len(scaling) == 2:
            (_, out), (_, fan_in) = scaling
            factor = 1 / fan_in if optimizer == "adam" else out / fan_in
        elif len(scaling) == 1 and optimizer == "sgd":
            factor = scaling[0][1]
        elif len(scaling) > 2:
            raise SettingsError(f"{name} scales along {len(scaling)} axes; muP knows at most 2")
        found.setdefault(factor, []).append(p)
    return [
        {
            "params": params,
            "lr": lr * factor,
            "weight_decay": weight_decay if decoupled else weight_decay / factor,
        }
        for factor, params in found.items()
    ]
