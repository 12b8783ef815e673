"""DependencyViT-Lite: the quietest tokens go.

The paper calls them leaves. A pruned token is nobody's parent in the layers behind (a test). Of the
tree that :func:`~.tree.grow` makes of a small trained model that was not pruned, the quietest were
leaves as often as the others, so the two words are not one here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from transom.errors import SettingsError


def fractions(steps: int, ratio: float) -> list[float]:
    """Part of the tokens there are that stays at each of `steps` steps.

    After step i, i · ratio of the original tokens are gone:
    f_i = (1 - i · ratio) / (1 - (i - 1) · ratio).

    Raises:
        SettingsError: nothing would be left.
    """
    if ratio < 0 or ratio * steps >= 1:
        raise SettingsError(
            f"{steps} steps that each remove {ratio} of the original tokens leave nothing; "
            "expected prune_ratio at least 0, and times the number of prune_layers below 1"
        )
    return [(1 - i * ratio) / (1 - (i - 1) * ratio) for i in range(1, steps + 1)]


def kept(count: int, fraction: float) -> int:
    """How many of `count` tokens stay, at least one."""
    return max(1, min(count, math.floor(fraction * count)))


@torch.no_grad()
def loudest(m: Tensor, keep: int) -> Tensor:
    """Positions (B, keep) of the largest m (B, N), as they stood."""
    return m.topk(keep, -1).indices.sort(-1).values


def schedule(layers: Sequence[int], ratio: float, depth: int) -> dict[int, float]:
    """Block, counted from 0, to the part of its tokens that stays.

    Args:
        layers: blocks after whose attention tokens go, counted from 1 as in the paper.
        ratio: part of the original tokens that each step removes.
        depth: number of blocks.

    Raises:
        SettingsError: a layer is not there or named twice, they are not in order, or nothing
            would be left.
    """
    outside = [i for i in layers if not 1 <= i <= depth]
    if outside:
        raise SettingsError(
            f"prune_layers names layer {outside[0]}, but there are layers 1 to {depth}"
        )
    if any(b <= a for a, b in pairwise(layers)):
        raise SettingsError(f"prune_layers is {tuple(layers)}; expected them in rising order")
    shares = fractions(len(layers), ratio)
    return {layer - 1: share for layer, share in zip(layers, shares, strict=True)}
