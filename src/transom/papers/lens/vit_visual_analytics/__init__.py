"""ViT visual analytics: which heads matter, how far they look, what patterns they make.

With A (N, N) the attention of a head, p and z class probabilities and features of the model, and
~ for the model without that head:

    importance   p_y - p~_y,   JSD(p, p~),   1 - cos(z, z~),   fall of accuracy
    strength     S_k = mean_i sum of A_ij over patches j at Chebyshev distance k,   D = sum_k k S_k
    patterns     autoencoder n² -> 512 -> 128 -> 32 of sqrt(A), k-means of codes, decoded centres

and all of it linked in one table of heads. The model is only looked at; only the autoencoder is
trained.

Source: Li et al., How Does Attention Work in Vision Transformers? A Visual Analytics Attempt, IEEE
TVCG 29(6), 2023. No code was published and the formulas could not be read: the definitions are
this library's reading of the abstract. Checked against plain float64 loops and planted heads; not
checked against the paper. The interactive views of the paper are not part of it.

What changes the numbers: a pruned head puts out zero before the output projection, whose bias
stays; the class token is in no ring; density counts only queries that have such a ring; the
attention among patches is not renormalised; maps are means over images before the autoencoder.
Each head is one call of the whole model; layers below are not cached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transom.lens.maps import Maps, maps_of
from transom.papers.lens.vit_visual_analytics.importance import (
    METRICS,
    Importance,
    Replace,
    head_importance,
    pruning_curve,
)
from transom.papers.lens.vit_visual_analytics.patterns import Patterns, describe, find_patterns
from transom.papers.lens.vit_visual_analytics.strength import Strength, strength
from transom.registry import Offer

__all__ = [
    "METRICS",
    "Importance",
    "Maps",
    "Overview",
    "Patterns",
    "Strength",
    "describe",
    "find_patterns",
    "head_importance",
    "maps_of",
    "overview",
    "pruning_curve",
    "strength",
]


@dataclass(frozen=True)
class Overview:
    """Everything about the heads of a model.

    Attributes:
        importance: by pruning; None if it was not asked for.
        strength: of every layer.
        patterns: of the mean map of every head, layer by layer; None if there are too few heads.
        table: by name (L, H): metrics of importance and `rank`, `self` (S_0), `near` (S_1),
            `distance`, `prefix`, `entropy`, `cluster`, and the descriptors of
            :func:`describe`.
    """

    importance: Importance | None
    strength: list[Strength]
    patterns: Patterns | None
    table: dict[str, Tensor]

    def correlations(self) -> tuple[list[str], Tensor]:
        """Names of the numeric columns, and their correlations across heads; nan for constants."""
        names = [name for name in self.table if name != "cluster"]
        rows = torch.stack([self.table[name].double().flatten() for name in names])
        off = rows - rows.mean(1, keepdim=True)
        spread = off.norm(dim=1)
        spread = torch.where(spread > 1e-9 * rows.norm(dim=1), spread, torch.nan)
        return names, off @ off.T / (spread[:, None] * spread)

    def trend(self) -> dict[str, Tensor]:
        """`self`, `near` and `distance` averaged over heads, by layer (L,)."""
        return {name: self.table[name].mean(1) for name in ("self", "near", "distance")}


def overview(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    importance: bool = True,
    classes: bool = True,
    replace: Replace = "zero",
    seed: int = 0,
    **options: Any,
) -> Overview:
    """Look at every head of an image host.

    Args:
        model: see :func:`head_importance`.
        images: (B, 3, H, W).
        labels: (B,) true classes, or None.
        importance: whether to prune.
        classes: see :func:`head_importance`.
        replace: see :func:`head_importance`.
        seed: of the patterns.
        **options: of :func:`find_patterns`.

    Returns:
        See :class:`Overview`.

    Raises:
        HostError, TokensError, SettingsError: see the parts.
    """
    maps = maps_of(model, images)
    pruned = None
    if importance:
        pruned = head_importance(model, images, labels, replace=replace, classes=classes)
    strengths = [strength(each, maps.grid, maps.prefix) for each in maps.attention]
    among = [each[:, :, maps.prefix :, maps.prefix :].float() for each in maps.attention]
    described = [describe(each, maps.grid) for each in among]
    means = torch.stack([each.mean(0) for each in among])  # (L, H, n, n)
    flat = means.flatten(0, 1)
    tries = [k for k in options.pop("clusters", range(4, 13)) if k < len(flat)]
    patterns = find_patterns(flat, clusters=tries, seed=seed, **options) if tries else None
    table: dict[str, Tensor] = {}
    if pruned is not None:
        table |= {**pruned.heads, "rank": pruned.rank}
    table["self"] = torch.stack([s.mass[:, 0] for s in strengths])
    near = [s.mass[:, 1] if s.mass.shape[1] > 1 else 0 * s.mass[:, 0] for s in strengths]
    table["near"] = torch.stack(near)
    for name in ("distance", "prefix", "entropy"):
        table[name] = torch.stack([getattr(s, name) for s in strengths])
    if patterns is not None:
        table["cluster"] = patterns.cluster.view(means.shape[:2])
    for name in described[0]:
        table[name] = torch.stack([each[name] for each in described])
    return Overview(pruned, strengths, patterns, table)


OFFERS = (
    Offer("lens", "heads", overview),
    Offer("lens", "head-importance", head_importance),
    Offer("lens", "attention-strength", strength),
    Offer("lens", "attention-patterns", find_patterns),
)
