"""The five desiderata of a concept explanation, as numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from transom.errors import SettingsError
from transom.papers.lens.pace.explainer import Explanation


class Desiderata(NamedTuple):
    """How good explanations are.

    faithfulness: accuracy of a logistic regression from theta to the model's label (higher).
    stability: mean of ||theta - theta'|| / ||theta|| under augmentation (lower); nan without.
    sparsity: part of the entries of theta below 0.1 / K (higher).
    levels: agreement of levels, 1 - total variation between theta and mean phi (higher).
    parsimony: fewest concepts that hold 95 % of the data set (lower).
    """

    faithfulness: float
    stability: float
    sparsity: float
    levels: float
    parsimony: int


def measure(
    explanation: Explanation,
    weights: Tensor,
    labels: Tensor,
    twins: Explanation | None = None,
    *,
    held_out: float = 0.2,
    seed: int = 0,
) -> Desiderata:
    """Measure explanations.

    The first three are the paper's. `levels` and `parsimony` are names of its desiderata without a
    published number; what is measured for them is this library's reading.

    Args:
        explanation: of images.
        weights: (B, J) of their patches.
        labels: (B, C) class probabilities of the model.
        twins: explanation of augmented copies.
        held_out: part of the images on which faithfulness is measured.
        seed: of the choice of these.

    Raises:
        SettingsError: too few images to hold some out.
    """
    theta = explanation.theta
    k = theta.shape[-1]
    stability = float("nan")
    if twins is not None:
        stability = float(((theta - twins.theta).norm(dim=-1) / theta.norm(dim=-1)).mean())
    share = weights[..., None] / weights.sum(1)[:, None, None]
    patch_level = (explanation.phi * share).sum(1)
    mass = theta.mean(0).sort(descending=True).values.cumsum(0)
    return Desiderata(
        faithfulness(theta, labels.argmax(-1), held_out=held_out, seed=seed),
        stability,
        float((theta < 0.1 / k).float().mean()),
        float(1 - 0.5 * (theta - patch_level).abs().sum(-1).mean()),
        min(k, int((mass < 0.95).sum()) + 1),
    )


def faithfulness(
    theta: Tensor, labels: Tensor, *, held_out: float = 0.2, seed: int = 0, ridge: float = 1e-3
) -> float:
    """Accuracy of a logistic regression from theta (B, K) to labels (B,), on images held out."""
    order = torch.randperm(len(theta), generator=torch.Generator().manual_seed(seed))
    cut = round(len(theta) * held_out)
    if not 0 < cut < len(theta):
        raise SettingsError(f"held_out={held_out!r} leaves nothing of {len(theta)} images")
    test, train = order[:cut], order[cut:]
    mean, spread = theta[train].mean(0), theta[train].std(0).clamp_min(1e-6)
    x = ((theta - mean) / spread).detach()
    weight = x.new_zeros(int(labels.max()) + 1, x.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def logits(rows: Tensor) -> Tensor:
        return x[rows] @ weight[:, :-1].T + weight[:, -1]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits(train), labels[train])
        loss = loss + ridge * weight[:, :-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return float((logits(test).argmax(-1) == labels[test]).float().mean())
