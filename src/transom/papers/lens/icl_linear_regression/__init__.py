"""In-context linear regression: a trained softmax attention layer, and what its weights say.

A prompt holds L examples of one linear task and a query. With tokens z_l = [x_l; y_l] (e = d +
number of responses), the query z_q = [x_q; 0] and H heads as wide as the token:

    f(z, z_q) = W_O concat_h softmax(z_q W_QK^h z^T / sqrt(e)) z W_V^h          W_QK = W_Q W_K^T

no mask, residual, norm or ffn; the query is no key. Trained on fresh tasks, W_QK^h / sqrt(e)
becomes omega_h I on the covariates and zero elsewhere, W_OV^h reads only the response with mu_h,
and sum_h mu_h = 0. So the layer is nearly one step of debiased gradient descent,

    (2 omega mu / L) (sum_l y_l x_l - (sum_l y_l) mean_l x_l) . x_q

in :mod:`.theory` with the reduced model, its approximate loss and the Bayes predictor. `circuits`
reads W_QK and W_OV of any attention weights, `patterns` scores them, `run` trains and compares.

Shapes: z (B, L, e), z_q (B, 1, e), f (B, 1, responses); here X is (L, d), examples in rows.

Source: In-Context Linear Regression Demystified: Training Dynamics and Mechanistic
Interpretability of Multi-Head Softmax Attention, 2025; official code
XintianPan/ICL_linear@87ed34f. Checked against it: one layer and the causal stack with gradients,
and every closed form of `theory`. Not checked: the schedules of heads in multi-task training.

The released causal stack applies softmax twice, first without the mask, so that the future leaks;
`double_softmax=True` gives that, the default masks once.
"""

from __future__ import annotations

from transom.papers.lens.icl_linear_regression.lab import Outcome, picture, run, train
from transom.papers.lens.icl_linear_regression.model import (
    CausalAttention,
    CausalStack,
    Circuits,
    InContextAttention,
    Patterns,
    Prompts,
    circuits,
    patterns,
    sample,
    sample_tasks,
)
from transom.papers.lens.icl_linear_regression.theory import (
    approximate_loss,
    debiased_gradient_step,
    gradient_flow,
    gradient_step,
    optimal_mu,
    reduced,
    ridge,
    ridge_risk,
)
from transom.registry import Offer

__all__ = [
    "OFFERS",
    "CausalAttention",
    "CausalStack",
    "Circuits",
    "InContextAttention",
    "Outcome",
    "Patterns",
    "Prompts",
    "approximate_loss",
    "circuits",
    "debiased_gradient_step",
    "gradient_flow",
    "gradient_step",
    "optimal_mu",
    "patterns",
    "picture",
    "reduced",
    "ridge",
    "ridge_risk",
    "run",
    "sample",
    "sample_tasks",
    "train",
]

OFFERS = (
    Offer("lens", "in-context-attention", InContextAttention),
    Offer("lens", "in-context-stack", CausalStack),
    Offer("lens", "circuits", circuits),
    Offer("lens", "circuit-patterns", patterns),
    Offer("lens", "debiased-gradient-step", debiased_gradient_step),
    Offer("lens", "ridge-predictor", ridge),
    Offer("lens", "in-context-regression", run),
)
