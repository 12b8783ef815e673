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
checked: other gates (no golden), the search over shifted ranges, accuracies, and training at scale.

Measured (docs/results): `benchmarks/outliers.py` finds what the paper describes in real models; the
mean kurtosis is 34 in a ViT-S/14, 115 in MiniLM and 25,000 in SmolLM2, where one feed-forward
reaches 21,000; 8 bits with one range a tensor change their outputs by 5, 42 and 52 % of the norm.
`benchmarks/quantised_training.py` trains a ViT of two blocks to do nothing at most tokens. In each
of three seeds static 8-bit activations cost either change less than the plain form (27 % less on
average), and so do 5 bits (37 and 44 %); in 6 bits gates win every time and the clipped softmax
twice. In 4 bits all fail alike, and torch's INT8, whose ranges are those of each call, costs all
three about the same. With γ of -0.1 for 16 tokens the clipped softmax learnt nothing: a softmax
that is even, as it is at the start, stays above 0 only for γ > -1 / (T - 1).
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
