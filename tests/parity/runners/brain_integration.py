"""Encoding models against vsubramaniam851/brain-multimodal."""

from __future__ import annotations

import re

from torch import Tensor

from transom.papers.lens.brain_integration import encode, predict, ridge, standardise

from ..golden import Golden


def regression(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    x, y = (golden.inputs[name].detach() for name in ("features", "responses"))
    low, high, count = map(int, re.findall(r"-?\d+", str(c["alphas"])))
    alphas = [10 ** (low + i * (high - low) / (count - 1)) for i in range(count)]
    found = encode(x, y, count=c["n_splits"], alphas=alphas)
    (whole,) = standardise(x)
    weights = ridge(whole, y, [c["ridge_alpha_for_weights"]])[0]
    return {
        "val": found.validation,
        "test": found.test,
        "alpha": found.alpha,
        "ridge_weights": weights,
        "ridge_predictions": predict(whole, weights),
    }


KINDS = {"regression": regression}
