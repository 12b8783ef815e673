"""What can be said about a difference: bootstrap, permutation, adjustment for many targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transom.errors import SettingsError
from transom.papers.lens.brain_integration.encoding import encode


class Bootstrap(NamedTuple):
    """Scores of each model on resampled events, (draws, E), with the same draws for all models."""

    validation: dict[str, Tensor]
    test: dict[str, Tensor]


class Comparison(NamedTuple):
    """One model against another.

    Attributes:
        difference: mean of the first's test score less the second's, one a site.
        p: one-sided, of a difference that is not positive, one a site; 1 where too little of the
            site is predicted.
        adjusted: p after Benjamini and Hochberg over all sites.
    """

    difference: Tensor
    p: Tensor
    adjusted: Tensor


def benjamini_hochberg(p: Tensor) -> Tensor:
    """Values of p adjusted for many tests: rejecting below q keeps the false discovery rate at q.

    Args:
        p: (E,).

    Returns:
        (E,).
    """
    order = p.argsort()
    ranks = torch.arange(1, len(p) + 1, device=p.device)
    scaled = (p[order] * len(p) / ranks).flip(0).cummin(0).values.flip(0)
    return torch.empty_like(p).scatter_(0, order, scaled.clamp_max(1))


def bootstrap(
    features: Mapping[str, Tensor],
    targets: Tensor,
    *,
    draws: int = 1000,
    seed: int = 0,
    **options: Any,
) -> Bootstrap:
    """Refit all models on events drawn with replacement, sorted, the same for each model.

    Args:
        features: (n, f) by the model's name.
        targets: (n, E).
        draws: of events. No p value gets below 1 / (draws + 1), which adjustment for E targets
            multiplies by up to E: with too few draws nothing can be found.
        seed: of the draws.
        **options: of :func:`encode`.

    Returns:
        Scores of every draw.

    Raises:
        SettingsError: there are no draws, or the numbers of events differ.
    """
    if draws < 1:
        raise SettingsError(f"draws is {draws}; expected 1 or more")
    _same_events(features, targets)
    generator, count = torch.Generator().manual_seed(seed), len(targets)
    validation: dict[str, list[Tensor]] = {name: [] for name in features}
    test: dict[str, list[Tensor]] = {name: [] for name in features}
    for _ in range(draws):
        index = torch.randint(count, (count,), generator=generator).sort().values
        for name, x in features.items():
            scores = encode(x[index], targets[index], **options)
            validation[name].append(scores.validation)
            test[name].append(scores.test)
    return Bootstrap(
        {name: torch.stack(rows) for name, rows in validation.items()},
        {name: torch.stack(rows) for name, rows in test.items()},
    )


def _same_events(features: Mapping[str, Tensor], targets: Tensor) -> None:
    odd = {name: len(x) for name, x in features.items() if len(x) != len(targets)}
    if odd or not features:
        raise SettingsError(
            f"targets have {len(targets)} events, features {odd}; expected at least one model and "
            "the same events everywhere"
        )


def compare(
    scores: Bootstrap,
    better: str,
    worse: str,
    *,
    sites: Tensor | None = None,
    least: int = 1,
    level: float = 0.05,
) -> Comparison:
    """Whether one model predicts a site better than another.

    Targets count where the first model's validation scores are above zero in all but `level` of the
    draws; a site averages over those targets. (The paper asks it of both models, which would pass
    over sites where the second predicts nothing at all.)

    Args:
        scores: of both models.
        better, worse: their names.
        sites: (E,), the site (electrode) 0, 1, ... each target (bin) belongs to; each its own by
            default.
        least: targets that must count at a site, 10 in the paper.
        level: of the lower bound of the validation scores.

    Returns:
        One value a site.

    Raises:
        SettingsError: a model is unknown.
    """
    unknown = [name for name in (better, worse) if name not in scores.test]
    if unknown:
        raise SettingsError(f"there are no scores of {unknown}; there are {list(scores.test)}")
    difference = scores.test[better] - scores.test[worse]
    draws, count = difference.shape
    held = scores.validation[better].quantile(level, 0) > 0
    where = torch.arange(count) if sites is None else sites
    total = int(where.max()) + 1
    weight = held.to(difference)
    number = difference.new_zeros(total).index_add_(0, where, weight)
    summed = difference.new_zeros(draws, total).index_add_(1, where, difference * weight)
    mean = summed / number.clamp_min(1)
    p = ((mean <= 0).sum(0) + 1).to(difference) / (draws + 1)
    p = p.masked_fill(number < least, 1.0)
    return Comparison(mean.mean(0), p, benjamini_hochberg(p))


def permutation(
    features: Tensor,
    targets: Tensor,
    *,
    draws: int = 200,
    block: int = 1,
    seed: int = 0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Test scores against those with the events of the targets out of order.

    Args:
        features: (n, f).
        targets: (n, E).
        draws: of orders.
        block: events that stay together, so that slow signals keep their course.
        seed: of the orders.
        **options: of :func:`encode`.

    Returns:
        p values (E,), one-sided and not adjusted, and the scores by chance (draws, E).

    Raises:
        SettingsError: a setting is out of range.
    """
    if draws < 1 or not 1 <= block <= len(targets) // 2:
        raise SettingsError(
            f"draws is {draws} and block {block}; expected a draw or more, and blocks from 1 to "
            f"half of the {len(targets)} events"
        )
    _same_events({"features": features}, targets)
    generator = torch.Generator().manual_seed(seed)
    observed = encode(features, targets, **options).test
    blocks = torch.arange(len(targets)).split(block)
    chance = []
    for _ in range(draws):
        order = torch.randperm(len(blocks), generator=generator)
        index = torch.cat([blocks[i] for i in order.tolist()])
        chance.append(encode(features, targets[index], **options).test)
    scores = torch.stack(chance)
    return ((scores >= observed).sum(0) + 1).to(observed) / (draws + 1), scores


def integration(
    scores: Bootstrap,
    multimodal: Sequence[str],
    unimodal: Sequence[str],
    linear: str | None = None,
    *,
    level: float = 0.05,
    sites: Tensor | None = None,
    least: int = 1,
) -> Tensor:
    """Sites at which the best multimodal model beats every unimodal one and linear integration.

    Args:
        scores: of all models.
        multimodal, unimodal: names; the best multimodal one is that of the highest mean validation
            score over all targets, so that test scores have no say in it.
        linear: name of the concatenated features; None leaves that test out.
        level: false discovery rate of each test.
        sites: as in :func:`compare`.
        least: as in :func:`compare`.

    Returns:
        (sites,) of bool.

    Raises:
        SettingsError: a name is unknown or a list empty.
    """
    missing = [n for n in (*multimodal, *unimodal) if n not in scores.validation]
    if missing or not multimodal or not unimodal:
        raise SettingsError(
            f"multimodal {list(multimodal)} and unimodal {list(unimodal)} name {missing}, which "
            f"have no scores; expected at least one each of {list(scores.validation)}"
        )
    best = max(multimodal, key=lambda name: float(scores.validation[name].mean()))
    rivals = [*unimodal] + ([linear] if linear is not None else [])
    tests = [
        compare(scores, best, rival, sites=sites, least=least).adjusted < level for rival in rivals
    ]
    return torch.stack(tests).all(0)
