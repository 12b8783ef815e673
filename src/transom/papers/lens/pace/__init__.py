"""PACE: a topic model whose words are the patches of a vision transformer.

For image m with patch embeddings e_j (d,), weights a_j (attention of the class token, summing to
J) and class probabilities y of the model:

    theta ~ Dir(alpha)      z_j ~ Cat(theta)      e_j ~ N(mu_z, Sigma_z), counted a_j times
    y ~ softmax(H zbar)     agreement with the augmented copy ~ exp(beta zbar · zbar')

    phi_jk  ~ |Sigma_k|^-1/2 exp( E log theta_k - d_jk + pull_k / (J a_j) )
    d_jk    = 1/2 (e_j - mu_k)^T Sigma_k^-1 (e_j - mu_k)
    pull    = (y - softmax(H phibar)) H + beta phibar'
    gamma_k = alpha + sum_j a_j phi_jk;   mu, Sigma: mean and covariance with weights a_j phi_jk

Concepts (mu, Sigma) explain the data set, theta = gamma / sum gamma an image, phi (J, K) patches,
means of theta classes. The model is only looked at.

Source: Wang et al., Probabilistic Conceptual Explainers: Trustworthy Conceptual Explanations for
Vision Foundation Models, ICML 2024; official code Wang-ML-Lab/interpretable-foundation-models.
Checked against it (:mod:`inference`): both E-steps, the first M-step, class weights. Checked
otherwise: the bound of :func:`learn` never falls. Not checked: later M-steps of the released code,
figures of the paper.

What differs from the released code, whose forms are in :mod:`inference` as they are: there the
attention cancels and reaches neither phi nor gamma, class weights descend the likelihood of labels
(wrong sign), training and testing use different formulas, and the class token is a patch. What
differs from the paper: it puts a_j into the exponent of the distance but not to the determinant,
which is not the maximum of the bound that its other updates climb; `power=True` does that. Each
step towards phi is shortened until the bound rises. Covariances have a prior, as single patches
have none.
"""

from __future__ import annotations

from transom.papers.lens.pace.desiderata import Desiderata, faithfulness, measure
from transom.papers.lens.pace.explainer import (
    Concepts,
    Explanation,
    Fitted,
    Patches,
    class_level,
    explain,
    image_bounds,
    learn,
    look_at,
)
from transom.registry import Offer

__all__ = [
    "Concepts",
    "Desiderata",
    "Explanation",
    "Fitted",
    "Patches",
    "class_level",
    "explain",
    "faithfulness",
    "image_bounds",
    "learn",
    "look_at",
    "measure",
]

OFFERS = (
    Offer("lens", "patch-embeddings", look_at),
    Offer("lens", "concepts", learn),
    Offer("lens", "explain-by-concepts", explain),
    Offer("lens", "explanation-desiderata", measure),
)
