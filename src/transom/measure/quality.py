"""How close a fitted model stays: pure functions of outputs, targets and the plain model's outputs.

Every function returns one number an image, shape (B,), so that results can be averaged over
batches of different sizes, looked at image by image, and compared in pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transom.errors import DataError


def top_k(logits: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """1 where the label is among the k largest logits, else 0.

    With fewer than k classes every label counts as found.

    Args:
        logits: (B, C).
        labels: (B,) integers in [0, C).
        k: How many of the largest logits count.

    Returns:
        (B,) float64.

    Raises:
        DataError: If the shapes do not fit or a label lies outside the classes.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise DataError(
            f"accuracy needs logits (B, C) and labels (B,); "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    check_labels(labels, logits.shape[1])
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices  # (B, k)
    return (best == labels.to(best)[:, None]).any(1).double()


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels that the head cannot answer.

    Raises:
        DataError: If a label is negative or not below `classes`.
    """
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise DataError(
            f"labels reach from {int(labels.min())} to {int(labels.max())}, but the head has "
            f"{classes} classes (0 to {classes - 1}); use the data the head was trained for, "
            "or leave the labels out (labels=False)"
        )


def agreement(logits: Tensor, plain: Tensor) -> Tensor:
    """1 where both models name the same class, else 0.

    Args:
        logits: (B, C), or (B, C, ...) for dense predictions: then the share of places.
        plain: The plain model's, of the same shape.

    Returns:
        (B,) float64.
    """
    _same_shape(logits, plain)
    same = logits.argmax(1) == plain.to(logits.device).argmax(1)
    return same.reshape(len(logits), -1).double().mean(1)


def cosine(features: Tensor, plain: Tensor) -> Tensor:
    """Cosine of the angle between an image's features and the plain model's, all of them as one.

    Args:
        features: (B, ...).
        plain: (B, ...) of the same shape.

    Returns:
        (B,) float64 in [-1, 1]; 0 where either is all zeros.
    """
    a, b = _flat(features, plain)
    return torch.nn.functional.cosine_similarity(a, b, dim=1).double()


def correlation(maps: Tensor, plain: Tensor) -> Tensor:
    """Pearson correlation of an image's map with the plain model's.

    Args:
        maps: (B, ...), for example (B, 1, H, W).
        plain: (B, ...) of the same shape.

    Returns:
        (B,) float64 in [-1, 1]; where a map is constant: 1 if both are equal, else 0.
    """
    a, b = _flat(maps, plain)
    equal = (a == b).all(1)
    a = a - a.mean(1, keepdim=True)
    b = b - b.mean(1, keepdim=True)
    value = torch.nn.functional.cosine_similarity(a, b, dim=1)
    return torch.where(equal, torch.ones_like(value), value).double()


def mean_absolute_difference(maps: Tensor, plain: Tensor) -> Tensor:
    """Mean absolute difference of an image's map to the plain model's, in the unit of the map.

    Args:
        maps: (B, ...), for example (B, 1, H, W).
        plain: (B, ...) of the same shape.

    Returns:
        (B,) float64.
    """
    a, b = _flat(maps, plain)
    return (a - b).abs().mean(1).double()


def kl(logits: Tensor, plain: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the predicted classes from the plain model's, in nats.

    KL(p ‖ q) = Σ_c p_c (log p_c − log q_c) with p of the plain model and q of this one.

    Args:
        logits: (B, C).
        plain: (B, C), of the plain model.

    Returns:
        (B,) float64, ≥ 0 up to rounding.
    """
    q, p = _flat(logits, plain)
    log_p, log_q = p.log_softmax(1), q.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1).double()


def _flat(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    # Double precision: a cosine of 1 - 1e-7 is a statement about the method, not about rounding.
    _same_shape(a, b)
    return a.detach().flatten(1).double(), b.detach().to(a.device).flatten(1).double()


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim < 2:
        raise DataError(
            f"outputs of shape {tuple(a.shape)} cannot be compared with the plain model's "
            f"{tuple(b.shape)}; both must be (B, ...) and equal. If tokens were reduced, fit with "
            "restore='end', or give `forward` a function that returns something of one shape"
        )
