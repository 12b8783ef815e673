"""In-context linear regression against XintianPan/ICL_linear."""

from __future__ import annotations

import torch
from torch import Tensor

from transom.papers.lens.icl_linear_regression import (
    CausalStack,
    InContextAttention,
    approximate_loss,
    debiased_gradient_step,
    gradient_flow,
    gradient_step,
    optimal_mu,
    reduced,
    ridge,
    ridge_risk,
)

from ..golden import Golden


def attention(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    layer = InContextAttention(c["n_embd"], c["n_head"], c["n_out"], bias=c["bias"])
    golden.load(layer)
    return {"y": layer(golden.inputs["zq"], golden.inputs["z"])}


def stack(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    layers, tied = c["n_layers"], c["weight_tying"]
    model = CausalStack(
        layers, c["d_model"], c["num_heads"], c["n_out"], tied=tied, double_softmax=True
    )
    # a file may hold the weights of tied layers once
    first = "attention_layers.0."
    twins = {
        f"attention_layers.{i}.{name.removeprefix(first)}": value
        for name, value in golden.tensors("param").items()
        if tied and name.startswith(first)
        for i in range(1, layers)
    }
    golden.load(model, **twins)
    return {"y": model(golden.inputs["zq"], golden.inputs["z"])}


def theory(golden: Golden) -> dict[str, Tensor]:
    c, given = golden.config, golden.inputs
    x, y, query = given["X"].T, given["y"], given["xq"]
    mu, omega = given["mu"], given["omega"]
    shape = (c["d"], c["L"], c["sigma2"])
    best = optimal_mu(omega, *shape)
    loss = approximate_loss(mu, omega, *shape)
    by_mu, by_omega = gradient_flow(mu, omega, *shape)
    step = (c["gd_mu"], c["gd_omega"], x, y, query)
    return {
        "mu_star": best,
        "predict": reduced(mu, omega, x, y, query),
        "predict_star": reduced(best, omega, x, y, query),
        "approx_loss": loss,
        "half_loss": loss / 2,
        "grad_mu": by_mu,
        "grad_omega": by_omega,
        "gd": gradient_step(*step),
        "debiased_gd": debiased_gradient_step(*step),
        "ridge": ridge(x, y, query, c["sigma2"]),
        "ridge_asymptotic": torch.tensor(ridge_risk(c["ridge_aspect"], c["sigma2"])),
    }


KINDS = {"attention": attention, "stack": stack, "theory": theory}
