"""Closed forms of in-context linear regression: the reduced model, its loss and the predictors.

X is (..., L, d) with examples in rows, y (..., L), x_q (..., d); omega and mu are (H,).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from transom.errors import SettingsError


def _bracket(omega: Tensor, d: int, length: int, noise: float) -> Tensor:
    outer = omega[:, None] * omega
    return outer + (1 + noise) / length * torch.exp(d * outer)


def reduced(mu: Tensor, omega: Tensor, x: Tensor, y: Tensor, query: Tensor) -> Tensor:
    """What a layer predicts that has the patterns exactly: sum_h mu_h y . softmax(omega_h X x_q).

    Args:
        mu, omega: (H,).
        x: (..., L, d).
        y: (..., L).
        query: (..., d).

    Returns:
        (...).
    """
    scores = (x @ query[..., None]).squeeze(-1)
    weights = (omega[:, None] * scores[..., None, :]).softmax(-1)
    return ((weights @ y[..., None]).squeeze(-1) * mu).sum(-1)


def approximate_loss(mu: Tensor, omega: Tensor, d: int, length: int, noise: float) -> Tensor:
    """Expected squared error of the reduced model for small omega.

    1 + s - 2 mu . omega + mu^T (omega omega^T + (1 + s)/L exp(d omega omega^T)) mu, with the
    exponential of each entry.

    Args:
        mu, omega: (H,).
        d: covariates.
        length: examples in the context, L.
        noise: variance s of the noise on a response.

    Returns:
        A number.
    """
    return 1 + noise - 2 * mu @ omega + mu @ _bracket(omega, d, length, noise) @ mu


def optimal_mu(omega: Tensor, d: int, length: int, noise: float) -> Tensor:
    """The mu (H,) that minimises :func:`approximate_loss` for given omega (H,).

    Equal omegas leave their shares undetermined; then this is the solution of least norm.
    """
    bracket = _bracket(omega, d, length, noise)
    return torch.linalg.pinv(bracket, hermitian=True) @ omega


def gradient_flow(
    mu: Tensor, omega: Tensor, d: int, length: int, noise: float
) -> tuple[Tensor, Tensor]:
    """Gradients of half of :func:`approximate_loss` by mu and by omega, each (H,)."""
    bracket = _bracket(omega, d, length, noise)
    spread = torch.exp(d * omega[:, None] * omega) * (mu[:, None] * mu)
    by_omega = -mu + (mu @ omega) * mu + d * (1 + noise) / length * spread @ omega
    return bracket @ mu - omega, by_omega


def gradient_step(mu: float, omega: float, x: Tensor, y: Tensor, query: Tensor) -> Tensor:
    """Prediction after one gradient step from zero: (2 omega mu / L) sum_l y_l x_l . x_q.

    Args:
        mu, omega: of a pair of heads with opposite signs.
        x: (..., L, d).
        y: (..., L).
        query: (..., d).

    Returns:
        (...).
    """
    return 2 * omega * mu * ((x * y[..., None]).mean(-2) * query).sum(-1)


def debiased_gradient_step(mu: float, omega: float, x: Tensor, y: Tensor, query: Tensor) -> Tensor:
    """:func:`gradient_step` on centred covariates: what two opposite heads compute to first order.

    Args:
        mu, omega: of a pair of heads with opposite signs.
        x: (..., L, d).
        y: (..., L).
        query: (..., d).

    Returns:
        (...).
    """
    return gradient_step(mu, omega, x - x.mean(-2, keepdim=True), y, query)


def ridge(x: Tensor, y: Tensor, query: Tensor, noise: float) -> Tensor:
    """The Bayes predictor for beta ~ N(0, I/d): x_q . (X^T X + d s I)^-1 X^T y.

    Args:
        x: (..., L, d).
        y: (..., L).
        query: (..., d).
        noise: variance s of the noise on a response.

    Returns:
        (...).
    """
    d = x.shape[-1]
    gram = x.mT @ x + d * noise * torch.eye(d, dtype=x.dtype, device=x.device)
    beta = torch.linalg.solve(gram, (x.mT @ y[..., None]))
    return (beta.squeeze(-1) * query).sum(-1)


def ridge_risk(ratio: float, noise: float) -> float:
    """Squared error of :func:`ridge` when d and L grow with d/L fixed, noise of y_q included.

    Args:
        ratio: d/L; towards 0 the risk is the noise, towards infinity 1 + the noise.
        noise: variance of the noise on a response.

    Returns:
        A number.

    Raises:
        SettingsError: the ratio is not positive.
    """
    if ratio <= 0:
        raise SettingsError(f"ratio is {ratio}; expected a number above 0, covariates / examples")
    root = math.sqrt(4 * noise + (noise + (1 - ratio) / ratio) ** 2)
    return 0.5 * (noise + (ratio - 1) / ratio + root)
