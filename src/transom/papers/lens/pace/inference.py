"""Inference of the released code: what it computes, its peculiarities included."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TINY = 1e-50  # the released code adds it nearly everywhere; float32 does not see it


class Inferred(NamedTuple):
    """phi (B, J, K) concepts of patches, gamma (B, K) of images, distance () weighted distance."""

    phi: Tensor
    gamma: Tensor
    distance: Tensor


def class_token_weights(attention: Tensor) -> Tensor:
    """Weights of patches: attention (B, H, N, N) of the class token, mean over heads (B, N)."""
    return attention[:, :, 0].mean(1)


def expected_log(gamma: Tensor) -> Tensor:
    """E[log theta] of Dirichlet distributions (B, K)."""
    return torch.digamma(gamma) - torch.digamma(gamma.sum(-1, keepdim=True))


def distances(embeds: Tensor, mus: Tensor, sigmas: Tensor) -> Tensor:
    """Half the squared Mahalanobis distance of patches (B, J, d) to concepts: (B, J, K)."""
    eye = torch.eye(sigmas.shape[-1], dtype=sigmas.dtype, device=sigmas.device)
    precision = torch.linalg.inv(sigmas + TINY * eye)
    off = embeds[:, :, None] - mus
    return 0.5 * torch.einsum("bjkd,kde,bjke->bjk", off, precision, off)


def normalised(phi: Tensor) -> Tensor:
    return (phi + TINY) / (phi.sum(-1, keepdim=True) + phi.shape[-1] * TINY)


def e_step(
    embeds: Tensor,
    weights: Tensor,
    mus: Tensor,
    sigmas: Tensor,
    phi: Tensor,
    *,
    alpha: float = 2.0,
    iterations: int = 10,
    temperature: float = 100.0,
) -> Inferred:
    """E-step without labels: for augmented images and at test time.

    Args:
        embeds: (B, J, d).
        weights: (B, J); they cancel here.
        mus: (K, d).
        sigmas: (K, d, d).
        phi: (B, J, K) to begin with, drawn from Gamma(K, 1 / K).
        alpha: of the Dirichlet prior.
        iterations: of the fixed point.
        temperature: distances are divided by it.

    Returns:
        See :class:`Inferred`; the distance is weighted with phi before the last update.
    """
    gamma = phi.sum(1)
    s = distances(embeds, mus, sigmas)
    volume = (torch.linalg.det(sigmas).abs() + TINY).sqrt()
    before = phi
    for _ in range(iterations):
        before = phi
        u = expected_log(gamma)[:, None]
        phi = normalised((u - s / temperature).exp() / volume * weights[..., None])
        gamma = alpha + phi.sum(1)
    return Inferred(phi, gamma, len(embeds) * (before * s).mean())


class Moments:
    """Adam whose moments are replaced by their bias-corrected values at every step."""

    def __init__(self, lr: float, betas: tuple[float, float]) -> None:
        self.lr, self.betas, self.count = lr, betas, 0
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0

    def step(self, x: Tensor) -> Tensor:
        self.count += 1
        one, two = self.betas
        first = (one * self.first + (1 - one) * x) / (1 - one**self.count)
        second = (two * self.second + (1 - two) * x.square()) / (1 - two**self.count)
        self.first, self.second = first, second
        return self.lr * first / ((second + 1e-5).sqrt() + 1e-5)


def pull_of_labels(mean: Tensor, labels: Tensor, eta: Tensor) -> Tensor:
    """Gradient of log-likelihood of labels (B, C) with respect to mean concepts (B, K).

    Args:
        mean: (B, K) mean of phi over patches.
        labels: (B, C) class probabilities.
        eta: (C, K) class weights.
    """
    return (labels - (mean @ eta.T).softmax(-1)) @ eta


def pull_of_twins(mean: Tensor, twins: Tensor, temperature: float = 0.1) -> Tensor:
    """Minus the gradient of InfoNCE between images and their augmented copies.

    Taken with respect to the *normalised* mean concepts of the images, as released.

    Args:
        mean: (B, K) of the images.
        twins: (B, K) of the augmented copies.
        temperature: of the softmax over the batch.
    """
    unit = torch.nn.functional.normalize(mean, dim=-1)
    other = torch.nn.functional.normalize(twins, dim=-1)
    chances = (unit @ other.T / temperature).softmax(-1)
    return (other - chances @ other) / (temperature * len(mean))


def training_e_step(
    embeds: Tensor,
    weights: Tensor,
    mus: Tensor,
    sigmas: Tensor,
    phi: Tensor,
    *,
    labels: Tensor,
    eta: Tensor,
    twins: Tensor,
    alpha: float = 2.0,
    iterations: int = 10,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.9),
    temperature: float = 0.1,
) -> Inferred:
    """E-step that also looks at the labels of the model and at augmented copies.

    Args:
        embeds, weights, mus, sigmas, phi, alpha, iterations: as in :func:`e_step`.
        labels: (B, C) class probabilities of the model.
        eta: (C, K) class weights.
        twins: (B, J, K) phi of the augmented copies.
        lr, betas: of :class:`Moments`.
        temperature: of InfoNCE.

    Returns:
        See :class:`Inferred`.
    """
    gamma = phi.sum(1)
    s = distances(embeds, mus, sigmas)
    patches, other = embeds.shape[1], twins.mean(1)
    faithful, stable = Moments(lr, betas), Moments(lr, betas)
    before = phi
    for _ in range(iterations):
        before = phi
        mean = phi.mean(1)
        pull = faithful.step(pull_of_labels(mean, labels, eta) / patches)
        pull = pull + stable.step(pull_of_twins(mean, other, temperature) / patches)
        u = expected_log(gamma)[:, None]
        phi = normalised((u - s + TINY).exp() * weights[..., None])
        phi = normalised(phi.clamp(0, 1e10))
        phi = normalised(phi + pull[:, None])
        gamma = alpha + phi.sum(1)
    return Inferred(phi, gamma, len(embeds) * (before * s).mean())


class Learned(NamedTuple):
    """mus (K, d), sigmas (K, d, d), and the running count of images of the online M-step."""

    mus: Tensor
    sigmas: Tensor
    images: float


def m_step(
    embeds: Tensor,
    weights: Tensor,
    phi: Tensor,
    before: Learned,
    mu0: Tensor,
    *,
    step: int = 1,
    rho: float = 0.75,
    prior: float = 500.0,
) -> Learned:
    """Online M-step with shrinkage towards mu0 and the identity.

    Args:
        embeds: (B, J, d).
        weights: (B, J).
        phi: (B, J, K).
        before: what was learned before this batch; images 0 at the beginning.
        mu0: (K, d) prior means.
        step: number of this batch, counted from 1.
        rho: part of the past that stays.
        prior: count of the prior.

    Returns:
        What is learned now.
    """
    share = phi * weights[..., None]
    total = share.sum((0, 1))
    mean = torch.einsum("bjk,bjd->kd", share, embeds) / total[:, None]
    off = embeds[:, :, None] - before.mus  # around the old means, as released
    spread = torch.einsum("bjk,bjkd,bjke->kde", share, off, off) / total[:, None, None]
    past, now = rho * before.images, (1 - rho) * len(embeds)
    count = before.images + now
    mus = (before.mus * past + mean * now) / count
    sigmas = (before.sigmas * past + spread * now) / count
    return Learned((prior * mu0 + step * mus) / (prior + step), _shrink(sigmas, step, prior), count)


def _shrink(sigmas: Tensor, step: int, prior: float) -> Tensor:
    """Shrink precisions towards the identity, then covariances."""
    eye = torch.eye(sigmas.shape[-1], dtype=sigmas.dtype, device=sigmas.device)
    precision = (prior * eye + step * torch.linalg.inv(sigmas)) / (prior + step)
    return (prior * eye + step * torch.linalg.inv(precision)) / (prior + step)


def descend(eta: Tensor, labels: Tensor, phi: Tensor, lr: float = 0.01) -> Tensor:
    """Class weights after one step of the released code, which lowers the likelihood of labels.

    Args:
        eta: (C, K).
        labels: (B, C) class probabilities of the model.
        phi: (B, J, K).
        lr: step size.

    Returns:
        (C, K); each class sees those before it already changed.
    """
    mean, target = phi.mean((0, 1)), labels.mean(0)
    eta = eta.clone()
    for c in range(len(eta)):
        eta[c] = eta[c] - lr * (target[c] - (eta @ mean).softmax(0)[c]) * mean
    return eta
