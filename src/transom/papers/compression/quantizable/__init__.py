"""Quantizable transformers: heads that can output nothing, so that activations need no outliers.

A head that wants to leave its token alone has to find logits far apart to make a softmax nearly
zero, and networks grow outliers for that. Two ways out, for training:

    p = clip((ζ - γ) softmax(S) + γ, 0, 1)              clipped softmax, γ ≤ 0, ζ ≥ 1
    y_h = σ(G_h(x)) P_h V_h                              gated attention

Clipped weights are exactly 0, pass no gradient, and do not add up to 1; γ may be given as -α / T
for sequences of up to T tokens. The gate reads x, the input of the attention, in the features of
its own head (linear, or an MLP of one hidden layer) or in all of them; it is one number a head
(H,), a sample (B, H, 1, 1, logits averaged over tokens), or a token (B, H, T, 1).

A clipped softmax needs the matrix of weights (its memory is that of all pairs); gates stay on fused
attention. In a host the clipped softmax works between its own projections, also in decoders; a
gate rebuilds the attention from the projections, so norms of q and k and the like are not there,
and hosts whose positions enter the attention are refused. With `finetune` a gate begins near 1.

Beside the method: `outliers` (infinity norm and kurtosis of any activation that transom.capture
knows, on any host), `quantised` (a model as if its layers were integers: the paper's quantisers and
ranges), `int8` (torch's own integer kernels), `grid`, `RunningRange` and `ErrorRange`.

Source: Bondarenko, Nagel, Blankevoort, Quantizable Transformers: Removing Outliers by Helping
Attention Heads Do Nothing, NeurIPS 2023; official code
Qualcomm-AI-research/outlier-free-transformers@1e59744 (BSD-3-Clause-Clear, which grants no patents;
this package is our own). Parameters have the official names: `alpha` is the gate's.

Quirks of the official code: its softmax "clipped(-.005:1.005)" has γ = -0.003, and its percentile
means opposite things in its two kinds of ranges; here both are what they say.

Checked against the official code: clipped softmax with gradient, attention of BERT and OPT, with
clipped softmax and with gates per token (linear and MLP), quantisers, ranges and metrics. Not
checked: other gates (no golden), the search over shifted ranges, accuracies, and that training at
scale removes outliers. `benchmarks/outliers.py` trains a ViT of two blocks to do nothing at most
tokens: what attention gives has smaller infinity norms with either change, but at that size INT8
costs all three forms the same.
"""

from transom.papers.compression.quantizable.attention import (
    QuantizableAttention,
    clipped_softmax,
)
from transom.papers.compression.quantizable.method import Quantizable
from transom.papers.compression.quantizable.outliers import (
    Outliers,
    infinity_norm,
    kurtosis,
    outliers,
)
from transom.papers.compression.quantizable.ptq import int8, quantised
from transom.papers.compression.quantizable.quantizers import ErrorRange, RunningRange, grid
from transom.registry import Offer

__all__ = [
    "OFFERS",
    "ErrorRange",
    "Outliers",
    "Quantizable",
    "QuantizableAttention",
    "RunningRange",
    "clipped_softmax",
    "grid",
    "infinity_norm",
    "int8",
    "kurtosis",
    "outliers",
    "quantised",
]

OFFERS = (
    Offer("operator", "clipped-softmax", clipped_softmax),
    Offer("operator", "quantizable-attention", QuantizableAttention),
    Offer("lens", "outliers", outliers),
    Offer("pipeline", "quantised", quantised),
    Offer("pipeline", "int8", int8),
)
