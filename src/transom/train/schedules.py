"""Optimizer and learning rate, both timm's, with everything counted in steps."""

from __future__ import annotations

from typing import Any

from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import Optimizer

from transom.errors import SettingsError
from transom.train.recipe import OptimPart


def optimizer_of(model: nn.Module, part: OptimPart) -> Optimizer:
    """The optimizer a recipe asks for, with layer decay.

    Args:
        model: its parameters; what a method brought along counts as the last layer.
        part: the section.

    Raises:
        SettingsError: timm has no such optimizer, or it does not take these settings.
    """
    options: dict[str, Any] = {} if part.betas is None else {"betas": part.betas}
    try:
        optimizer: Optimizer = create_optimizer_v2(
            model,
            opt=part.name,
            lr=part.lr,
            weight_decay=part.weight_decay,
            layer_decay=part.layer_decay,
            **options,
        )
    except (ValueError, KeyError, AssertionError, TypeError) as error:
        raise SettingsError(f"optim.name is {part.name!r}: {error}") from error
    return optimizer


def scheduler_of(
    optimizer: Optimizer, part: OptimPart, steps: int, steps_per_epoch: int
) -> CosineLRScheduler:
    """Linear warm-up, then a cosine down to `min_lr`; call ``step_update(step)`` before each step.

    Args:
        optimizer: whose rate is set.
        part: the section.
        steps: of the whole training.
        steps_per_epoch: of one pass over the data.

    Raises:
        SettingsError: the warm-up is not shorter than the training.
    """
    warmup = round(part.warmup_epochs * steps_per_epoch)
    if warmup >= steps:
        raise SettingsError(
            f"optim.warmup_epochs is {part.warmup_epochs:g}, {warmup} steps, but the training has "
            f"{steps}; expected a shorter warm-up"
        )
    return CosineLRScheduler(
        optimizer,
        t_initial=steps - warmup,
        lr_min=part.min_lr,
        warmup_t=warmup,
        warmup_lr_init=part.warmup_lr,
        warmup_prefix=True,
        t_in_epochs=False,
    )
