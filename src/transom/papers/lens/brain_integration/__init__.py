"""Where do recordings integrate vision and language? Encoding models, compared honestly.

Features of a model, X (n events, f), predict every target of a recording, Y (n, E), by ridge
regression with columns standardised on the training events:

    w = ([1 X]^T [1 X] + alpha I)^-1 [1 X]^T y          score = Pearson r of held-out events

Folds are contiguous in time. Of each held-out block the first half chooses alpha for each target,
the second half is reported. A target integrates if features of a multimodal model predict it
better than those of every unimodal model and than their concatenation (linear integration). The
difference is resampled over events, all models with the same draws, and p values are adjusted over
targets (Benjamini-Hochberg). Targets can be any signal with one value an event.

Source: Revealing Vision-Language Integration in the Brain with Multimodal Networks, ICML 2024;
official code vsubramaniam851/brain-multimodal@87175f7. Checked against it: weights, predictions,
validation and test scores and chosen alphas. The comparison's code was never released: it follows
the paper and is checked by planting sites in simulated recordings. Not checked: the recordings,
which are not public.

Held-out events touch training events in time, so slow signals leak: `gap` leaves out events on both
sides. alpha is chosen on events that train other folds; `inner` chooses it within each training set
instead. Better prediction alone is no proof of integration; neither is what this finds.
"""

from __future__ import annotations

from transom.papers.lens.brain_integration.encoding import (
    ALPHAS,
    Encoding,
    Fold,
    encode,
    folds,
    noise_ceiling,
    pearson,
    predict,
    project,
    ridge,
    standardise,
    windows,
)
from transom.papers.lens.brain_integration.significance import (
    Bootstrap,
    Comparison,
    benjamini_hochberg,
    bootstrap,
    compare,
    integration,
    permutation,
)
from transom.papers.lens.brain_integration.simulation import Recording, simulate
from transom.registry import Offer

__all__ = [
    "ALPHAS",
    "OFFERS",
    "Bootstrap",
    "Comparison",
    "Encoding",
    "Fold",
    "Recording",
    "benjamini_hochberg",
    "bootstrap",
    "compare",
    "encode",
    "folds",
    "integration",
    "noise_ceiling",
    "pearson",
    "permutation",
    "predict",
    "project",
    "ridge",
    "simulate",
    "standardise",
    "windows",
]

OFFERS = (
    Offer("lens", "encoding-model", encode),
    Offer("lens", "noise-ceiling", noise_ceiling),
    Offer("lens", "encoding-bootstrap", bootstrap),
    Offer("lens", "encoding-permutation", permutation),
    Offer("lens", "encoding-comparison", compare),
    Offer("lens", "integration-sites", integration),
    Offer("lens", "simulated-recording", simulate),
)
