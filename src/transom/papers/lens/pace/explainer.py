"""Concepts by coordinate ascent on one bound, and how good they are."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

import transom
from transom.errors import HostError, SettingsError
from transom.lens.maps import maps_of
from transom.papers.lens.pace.inference import expected_log


class Patches(NamedTuple):
    """What a model says about images.

    embeds: (B, J, d) patch embeddings of one layer.
    weights: (B, J) attention of the class token, summing to J.
    labels: (B, C) class probabilities.
    """

    embeds: Tensor
    weights: Tensor
    labels: Tensor


class Concepts(NamedTuple):
    """The data set's explanation.

    mus (K, d), sigmas (K, d, d), eta (C, K) class weights, alpha of the Dirichlet prior.
    """

    mus: Tensor
    sigmas: Tensor
    eta: Tensor
    alpha: float


class Explanation(NamedTuple):
    """gamma (B, K); theta (B, K) concepts of images; phi (B, J, K) concepts of patches."""

    gamma: Tensor
    theta: Tensor
    phi: Tensor


class Fitted(NamedTuple):
    """What :func:`learn` found.

    concepts: of the data set; explanation: of its images; bounds: the bound after each round.
    """

    concepts: Concepts
    explanation: Explanation
    bounds: list[float]


@torch.no_grad()
def look_at(
    model: nn.Module,
    images: Tensor,
    *,
    layer: int = -2,
    dim: int | None = 25,
    seed: int = 0,
    labelled: bool = True,
) -> Patches:
    """Patch embeddings, their weights and the labels of a model.

    Args:
        model: an image host with a class token that returns logits (B, C). Where fitted methods
            merge tokens, patches share the embedding of their token; dropped ones weigh nothing.
        images: (B, 3, H, W) as the model wants them.
        layer: of the embeddings; -2 is the one before the last.
        dim: width of a frozen random projection; None for none.
        seed: of the projection.
        labelled: whether the model's classes take part; without them any model will do, and all
            images are of one class.

    Returns:
        See :class:`Patches`. The class token is no patch.

    Raises:
        HostError: no class token, or no logits.
        SettingsError: no such layer.
    """
    host = transom.hosts.find(model)
    if not host.class_token:
        raise HostError(
            f"{host.family} has no class token, whose attention weighs the patches; choose a model "
            "that has one"
        )
    if not -host.depth <= layer < host.depth:
        raise SettingsError(f"layer is {layer}, but there are layers 0 to {host.depth - 1}")
    maps = maps_of(model, images, residual=True, spread=True, layers=[layer % host.depth])
    labels = images.new_ones(len(images), 1)
    if labelled:
        out = maps.output
        logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise HostError("the model returns no logits (B, C); pass a classifier")
        labels = logits.float().softmax(-1)
    embeds = maps.residual[0][:, maps.prefix :].float()
    weights = maps.looked_at()[0].mean(1).flatten(1)
    weights = weights / weights.sum(1, keepdim=True) * weights.shape[1]
    if dim is not None:
        draw = torch.Generator().manual_seed(seed)
        projection = torch.randn(embeds.shape[-1], dim, generator=draw) / embeds.shape[-1] ** 0.5
        embeds = embeds @ projection.to(embeds.device)
    return Patches(embeds, weights, labels)


def log_densities(embeds: Tensor, concepts: Concepts) -> tuple[Tensor, Tensor]:
    """Of patches under concepts: half squared distances (B, J, K), and half log dets (K,)."""
    factor = torch.linalg.cholesky(concepts.sigmas)
    off = (embeds[:, :, None] - concepts.mus).permute(2, 3, 0, 1)  # (K, d, B, J)
    solved = torch.linalg.solve_triangular(factor, off.flatten(2), upper=False)
    half = 0.5 * solved.square().sum(1).unflatten(1, embeds.shape[:2]).permute(1, 2, 0)
    return half, factor.diagonal(dim1=1, dim2=2).log().sum(-1)


def image_bounds(
    patches: Patches,
    concepts: Concepts,
    phi: Tensor,
    gamma: Tensor,
    twins: Tensor | None,
    stability: float,
) -> Tensor:
    """The evidence lower bound of each image (B,), the expected label term at mean concepts.

    Args:
        patches: of the images.
        concepts: of the data set.
        phi: (B, J, K).
        gamma: (B, K).
        twins: (B, K) mean concepts of augmented copies, or None.
        stability: weight of the agreement with them.
    """
    half, volume = log_densities(patches.embeds, concepts)
    width = patches.embeds.shape[-1]
    density = -half - volume - 0.5 * width * math.log(2 * math.pi)
    log_theta = expected_log(gamma)
    entropy = -(phi * phi.clamp_min(1e-38).log()).sum(-1)
    each = (phi * (log_theta[:, None] + density)).sum(-1) + entropy
    alpha = torch.full_like(gamma, concepts.alpha)
    bound = (patches.weights * each).sum(1)
    bound = bound + ((alpha - gamma) * log_theta).sum(-1) + _log_beta(gamma) - _log_beta(alpha)
    mean = phi.mean(1)
    bound = bound + (patches.labels * (mean @ concepts.eta.T).log_softmax(-1)).sum(-1)
    if twins is not None:
        bound = bound + stability * (mean * twins).sum(-1)
    return bound


def _log_beta(gamma: Tensor) -> Tensor:
    return gamma.lgamma().sum(-1) - gamma.sum(-1).lgamma()


def explain(
    patches: Patches,
    concepts: Concepts,
    *,
    phi: Tensor | None = None,
    twins: Tensor | None = None,
    stability: float = 1.0,
    power: bool = False,
    rounds: int = 30,
) -> Explanation:
    """Concepts of images and of their patches. An image's result does not depend on the others.

    Args:
        patches: of the images.
        concepts: of the data set.
        phi: (B, J, K) to begin with; uniform when None.
        twins: (B, J, K) phi of augmented copies.
        stability: weight of the agreement with them.
        power: whether weights enter the exponent of the distance, as the paper writes it. The
            bound may fall then.
        rounds: at most, until the bound stands.

    Returns:
        See :class:`Explanation`.
    """
    half, volume = log_densities(patches.embeds, concepts)
    weights = patches.weights[..., None]
    if phi is None:
        phi = torch.full_like(half, 1 / half.shape[-1])
    other = None if twins is None else twins.mean(1)
    gamma = concepts.alpha + (phi * weights).sum(1)

    def value(phi: Tensor, gamma: Tensor) -> Tensor:
        return image_bounds(patches, concepts, phi, gamma, other, stability)

    for _ in range(rounds):
        start = value(phi, gamma)
        mean = phi.mean(1)
        chances = (mean @ concepts.eta.T).softmax(-1)
        pull = (patches.labels - chances) @ concepts.eta
        if other is not None:
            pull = pull + stability * other
        # a patch of weight a counts a times, so what is per patch is shared among its copies
        pull = pull[:, None] / half.shape[1]
        pull = pull if power else pull / weights.clamp_min(1e-6)
        s = half * weights if power else half
        goal = (expected_log(gamma)[:, None] - s - volume + pull).softmax(-1)
        step = torch.ones_like(start)
        if not power:
            # the label term is concave: some way towards the goal always raises the bound
            for _ in range(12):
                trial = phi + step[:, None, None] * (goal - phi)
                falls = value(trial, gamma) < start
                if not falls.any():
                    break
                step = torch.where(falls, step / 2, step)
            step = torch.where(falls, torch.zeros_like(step), step)
        phi = phi + step[:, None, None] * (goal - phi)
        gamma = concepts.alpha + (phi * weights).sum(1)
        gain = value(phi, gamma) - start
        if bool((gain.abs() < 1e-6 * start.abs().clamp_min(1)).all()):
            break
    return Explanation(gamma, gamma / gamma.sum(-1, keepdim=True), phi)


def learn(
    patches: Patches,
    count: int = 100,
    *,
    alpha: float = 2.0,
    twins: Patches | None = None,
    stability: float = 1.0,
    floor: float = 0.05,
    prior: float = 10.0,
    rate: float = 1.0,
    rounds: int = 30,
    power: bool = False,
    seed: int = 0,
) -> Fitted:
    """Learn concepts of a data set, by coordinate ascent on the bound of all its images.

    Args:
        patches: of the images.
        count: of concepts, K.
        alpha: of the Dirichlet prior.
        twins: of augmented copies of the same images; they make explanations stable.
        stability: weight of the agreement with them.
        floor: variance of the prior of covariances, as a part of that of all patches.
        prior: its count of patches.
        rate: step size of the class weights; up to 2 never lowers the bound.
        rounds: of learning.
        power: see :func:`explain`.
        seed: of the patches that concepts begin at.

    Returns:
        See :class:`Fitted`.

    Raises:
        SettingsError: a setting is out of range.
    """
    if not 1 <= count <= patches.embeds[..., 0].numel():
        raise SettingsError(f"count is {count!r}; expected at least 1, at most one a patch")
    if alpha <= 0 or floor <= 0 or prior <= 0 or not 0 <= rate <= 2:
        raise SettingsError(
            f"got alpha={alpha!r}, floor={floor!r}, prior={prior!r}, rate={rate!r}; expected "
            "numbers above 0, and rate from 0 to 2"
        )
    flat = patches.embeds.flatten(0, 1)
    width = flat.shape[-1]
    variance = flat.var(0, correction=0).mean().clamp_min(1e-12)
    eye = torch.eye(width, dtype=flat.dtype, device=flat.device)
    base = floor * variance * eye
    concepts = Concepts(
        _seeds(flat, count, seed),
        (variance * eye).expand(count, -1, -1).contiguous(),
        flat.new_zeros(patches.labels.shape[1], count),
        alpha,
    )
    phi, twin_phi, bounds = None, None, []
    for _ in range(rounds):
        if twins is not None:
            twin_phi = explain(twins, concepts, power=power, rounds=3).phi
        found = explain(
            patches,
            concepts,
            phi=phi,
            twins=twin_phi,
            stability=stability,
            power=power,
            rounds=3,
        )
        phi = found.phi
        concepts = _maximised(patches, concepts, phi, base, prior, rate)
        other = None if twin_phi is None else twin_phi.mean(1)
        each = image_bounds(patches, concepts, phi, found.gamma, other, stability)
        bounds.append(float(each.sum() + _log_prior(concepts.sigmas, base, prior)))
    return Fitted(concepts, explain(patches, concepts, phi=phi, power=power), bounds)


def _seeds(flat: Tensor, count: int, seed: int) -> Tensor:
    """Patches far from one another, drawn as in k-means++: (K, d)."""
    draw = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(flat), (), generator=draw))]
    far = (flat - flat[chosen[0]]).square().sum(-1)
    for _ in range(count - 1):
        chances = far.cpu().double() + 1e-12
        chosen.append(int(torch.multinomial(chances, 1, generator=draw)))
        far = torch.minimum(far, (flat - flat[chosen[-1]]).square().sum(-1))
    return flat[chosen].clone()


def _maximised(
    patches: Patches, concepts: Concepts, phi: Tensor, base: Tensor, prior: float, rate: float
) -> Concepts:
    """The M-step: weighted means, covariances with their prior, one ascent of class weights."""
    share = phi * patches.weights[..., None]
    total = share.sum((0, 1))
    mean = torch.einsum("bjk,bjd->kd", share, patches.embeds) / total.clamp_min(1e-12)[:, None]
    # a concept that nobody has stays where it is
    mus = torch.where((total > 1e-6)[:, None], mean, concepts.mus)
    off = patches.embeds[:, :, None] - mus
    spread = torch.einsum("bjk,bjkd,bjke->kde", share, off, off)
    sigmas = (spread + prior * base) / (total + prior)[:, None, None]
    image = phi.mean(1)
    error = patches.labels - (image @ concepts.eta.T).softmax(-1)
    eta = concepts.eta + rate * error.T @ image / len(image)
    return Concepts(mus, sigmas, eta, concepts.alpha)


def _log_prior(sigmas: Tensor, base: Tensor, prior: float) -> Tensor:
    """Log-density of covariances, up to a constant."""
    factor = torch.linalg.cholesky(sigmas)
    traces = torch.cholesky_solve(base.expand_as(sigmas), factor)
    traces = traces.diagonal(dim1=1, dim2=2).sum(-1)
    return -0.5 * prior * (2 * factor.diagonal(dim1=1, dim2=2).log().sum(-1) + traces).sum()


def class_level(explanation: Explanation, labels: Tensor) -> Tensor:
    """Concepts of classes (C, K): the mean of theta, weighted with class probabilities (B, C)."""
    return labels.T @ explanation.theta / labels.sum(0).clamp_min(1e-12)[:, None]
