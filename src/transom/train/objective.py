"""What a run minimises. One objective so far; others (self-supervised, adaptation) go beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from transom.registry import Training
from transom.train.evaluate import logits_of
from transom.train.recipe import Recipe


@dataclass(frozen=True)
class Judged:
    """The loss of one batch.

    Attributes:
        loss: scalar, with gradient.
        correct: part of the images whose likeliest class was the (mainly) right one.
    """

    loss: Tensor
    correct: Tensor


class Objective(Protocol):
    """The loop hands it one batch after the other and minimises what it gives back."""

    def __call__(self, model: nn.Module, bare: nn.Module, images: Tensor, labels: Tensor) -> Judged:
        """The loss of one batch.

        Args:
            model: to call: it may be compiled or spread over processes.
            bare: the model itself, to look into.
            images: (B, 3, H, W), normalised.
            labels: (B,).
        """


class Classify:
    """Cross-entropy on mixed and smoothed targets, a teacher, and what the method adds.

    Args:
        recipe: of the run.
        classes: C of the head.
        teacher: the plain host; None without distillation.
        training: what the fitted method adds.
    """

    def __init__(
        self, recipe: Recipe, classes: int, teacher: nn.Module | None, training: Training
    ) -> None:
        part = recipe.augment
        self.distil, self.teacher, self.training = recipe.distil, teacher, training
        self.smoothing = part.smoothing
        self.mix: Mixup | None = None
        if part.mixup > 0 or part.cutmix > 0:
            self.mix = Mixup(
                mixup_alpha=part.mixup,
                cutmix_alpha=part.cutmix,
                prob=part.mix_prob,
                label_smoothing=part.smoothing,
                num_classes=classes,
            )

    def __call__(self, model: nn.Module, bare: nn.Module, images: Tensor, labels: Tensor) -> Judged:
        """See :class:`Objective`."""
        main = labels
        if self.mix is not None:
            images, targets = self.mix(images, labels)
            outputs = logits_of(model(images)).float()
            loss, main = F.cross_entropy(outputs, targets), targets.argmax(1)
        else:
            outputs = logits_of(model(images)).float()
            loss = F.cross_entropy(outputs, labels, label_smoothing=self.smoothing)
        if self.teacher is not None and self.distil is not None:
            with torch.no_grad():
                taught = logits_of(self.teacher(images)).float()
            loss = torch.lerp(
                loss, divergence(outputs, taught, self.distil.temperature), self.distil.weight
            )
        extra = self.training.extra_loss(bare, outputs)
        if extra is not None:
            loss = loss + extra
        correct = (outputs.detach().argmax(1) == main).float().mean()
        return Judged(loss, correct)


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), mean over the batch (Hinton 2015).

    Args:
        student: logits (B, C).
        teacher: logits (B, C).
        temperature: T.
    """
    return temperature**2 * F.kl_div(
        (student / temperature).log_softmax(1),
        (teacher / temperature).log_softmax(1),
        log_target=True,
        reduction="batchmean",
    )
