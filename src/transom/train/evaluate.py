"""Accuracy of a classifier, with its confusion matrix."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.errors import DataError
from transom.measure.data import ImageSet


@dataclass(frozen=True)
class Score:
    """How well a model does.

    Attributes:
        accuracy: in percent.
        loss: mean cross-entropy in nats.
        confusion: (C, C) counts, true class by predicted class.
    """

    accuracy: float
    loss: float
    confusion: Tensor

    @property
    def count(self) -> int:
        """Images judged."""
        return int(self.confusion.sum())


def logits_of(outputs: object) -> Tensor:
    """The logits (B, C) in what a model returned.

    Raises:
        DataError: there are none.
    """
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise DataError(
            f"the model returned a {type(outputs).__name__}; training needs a classifier that "
            "returns logits (B, C)"
        )
    return logits


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: ImageSet,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    part: tuple[int, int] = (0, 1),
    total: Callable[[Tensor], Tensor] = lambda counts: counts,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Score:
    """Judge a model on labelled images; it is left in the mode it was in.

    Args:
        model: a classifier.
        images: with labels.
        batch_size: images of a call.
        device: where the model is.
        part: (i, n): this process judges every n-th batch from i on.
        total: sums a tensor over the processes.
        context: around every call, for automatic mixed precision.

    Raises:
        DataError: the images have no labels, or the model does not return logits.
    """
    if images.labels is None:
        raise DataError("the images have no labels to judge by")
    training = model.training
    model.eval()
    confusion, loss = None, torch.zeros(1, dtype=torch.float64, device=device)
    try:
        for start in range(part[0] * batch_size, len(images), part[1] * batch_size):
            labels = images.labels[start : start + batch_size].to(device)
            with context():
                outputs = model(images.batch(start, batch_size, device))
            logits = logits_of(outputs).float()
            classes = logits.shape[1]
            if confusion is None:
                confusion = torch.zeros(classes * classes, dtype=torch.float64, device=device)
            pairs = labels * classes + logits.argmax(1)
            confusion += pairs.bincount(minlength=classes * classes)
            loss += F.cross_entropy(logits, labels, reduction="sum")
    finally:
        model.train(training)
    if confusion is None:
        raise DataError(f"{len(images)} images are too few for {part[1]} processes")
    confusion, loss = total(confusion), total(loss)
    classes = round(len(confusion) ** 0.5)
    square = confusion.reshape(classes, classes).long().cpu()
    count = int(square.sum())
    return Score(100 * int(square.trace()) / count, float(loss) / count, square)
