"""PACE against Wang-ML-Lab/interpretable-foundation-models."""

from __future__ import annotations

from torch import Tensor

from transom.papers.lens.pace import inference

from ..golden import Golden


def em_step(golden: Golden) -> dict[str, Tensor]:
    c, given = golden.config, {name: t.detach() for name, t in golden.inputs.items()}
    weights = inference.class_token_weights(given["attention"])
    embeds, mus, sigmas = given["embeds"], given["mus"], given["sigmas"]
    settings = {"alpha": c["alpha"], "iterations": c["iterations"]}
    found = inference.e_step(embeds, weights, mus, sigmas, given["phi_init"], **settings)
    learned = inference.m_step(
        embeds,
        weights,
        found.phi,
        inference.Learned(mus, sigmas, 0.0),
        given["mu0"],
        rho=c["rhot"],
        prior=c["prior_count"],
    )
    labels = given["logits"].softmax(-1)
    return {
        "phi": found.phi,
        "gamma": found.gamma,
        "delta": found.distance,
        "e_log_theta": inference.expected_log(found.gamma),
        "new_mus": learned.mus,
        "new_sigmas": learned.sigmas,
        "new_eta": inference.descend(given["eta"], labels, found.phi, c["lr"]),
    }


def contrastive_e_step(golden: Golden) -> dict[str, Tensor]:
    c, given = golden.config, golden.inputs
    found = inference.training_e_step(
        given["embeds"],
        inference.class_token_weights(given["attention"]),
        given["mus"],
        given["sigmas"],
        given["phi_init"],
        labels=given["prob"],
        eta=given["eta"],
        twins=given["phi_trans"],
        alpha=c["alpha"],
        iterations=c["iterations"],
        lr=c["adam_lr"],
        betas=tuple(c["adam_betas"]),
        temperature=c["temperature"],
    )
    return {"phi": found.phi, "gamma": found.gamma, "delta": found.distance}


KINDS = {"em-step": em_step, "e-step": contrastive_e_step}
