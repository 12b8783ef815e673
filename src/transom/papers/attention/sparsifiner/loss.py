"""The losses of Sparsifiner's training, and what they become in a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from transom.errors import SettingsError


@dataclass(frozen=True)
class Weights:
    """Weight of each loss; a loss whose weight is 0 is not computed.

    Attributes:
        cls: cross-entropy.
        cls_distill: KL(teacher ‖ student) on the logits.
        token_distill: mean squared error of the patch tokens.
        attn_recon: sum of squared errors of the approximate attention against the teacher's.
        attn_self_distill: the same against the model's own attention over all keys.
    """

    cls: float = 1.0
    cls_distill: float = 0.5
    token_distill: float = 0.5
    attn_recon: float = 0.01
    attn_self_distill: float = 0.0


def reconstruction(approx: Sequence[Tensor], attention: Sequence[Tensor]) -> Tensor:
    """Squared error of estimated attention, summed over everything but averaged over layers.

    Args:
        approx: (B, H, R, N) of each layer: the last R queries.
        attention: (B, H, N, N) of each layer.
    """
    if len(approx) != len(attention) or not approx:
        raise SettingsError(
            f"got estimates of {len(approx)} layers and attention of {len(attention)}; expected "
            "one of each a layer"
        )
    each = [
        F.mse_loss(a, t[:, :, t.shape[2] - a.shape[2] :], reduction="sum")
        for a, t in zip(approx, attention, strict=True)
    ]
    return torch.stack(each).mean()


def losses(
    logits: Tensor,
    labels: Tensor,
    features: Tensor,
    teacher_logits: Tensor,
    teacher_features: Tensor,
    approx: Sequence[Tensor] = (),
    teacher_attention: Sequence[Tensor] = (),
    own_attention: Sequence[Tensor] = (),
    *,
    live: Tensor | None = None,
    weights: Weights | None = None,
) -> Mapping[str, Tensor]:
    """Every loss that has a weight, by name, without it; "loss" is the weighted sum.

    Args:
        logits, teacher_logits: (B, C).
        labels: (B,) int64.
        features, teacher_features: (B, T, D) patch tokens behind the last norm.
        approx: (B, H, N - 1, N) estimated attention of each layer.
        teacher_attention, own_attention: (B, H, N, N) of each layer.
        live: (B, T) bool, patches that are still there; None for all.
        weights: of the losses.
    """
    weights = Weights() if weights is None else weights
    found: dict[str, Tensor] = {}
    if weights.cls:
        found["cls"] = F.cross_entropy(logits, labels)
    if weights.cls_distill:
        found["cls_distill"] = F.kl_div(
            logits.log_softmax(-1),
            teacher_logits.log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
    if weights.token_distill:
        if live is not None:
            features, teacher_features = features[live], teacher_features[live]
        found["token_distill"] = F.mse_loss(features, teacher_features)
    if weights.attn_recon:
        found["attn_recon"] = reconstruction(approx, teacher_attention)
    if weights.attn_self_distill:
        found["attn_self_distill"] = reconstruction(approx, own_attention)
    total = logits.new_zeros(())
    for name, value in found.items():
        total = total + getattr(weights, name) * value
    return {**found, "loss": total}
