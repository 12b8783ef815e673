"""MoH: every token uses some of the heads, each with its own weight.

Multi-head attention is a sum over heads of a head's output times its slice of the output
projection. Here token t weighs head i with g_i(t),

    p = softmax(W_g x)  over the E = H - S routed heads
    r_i = K p_i / Σ p   for the K largest p, 0 for the others
    s = S softmax(W_1 x)                          over the first S heads, which are always on
    a = 2 softmax(W_0 x)
    g = (a_0 s, a_1 r),      y = W_o (g ∘ heads)

with x what enters the projection to q, k and v. With S = 0 or K = 0 there is one group and no a;
with S = 1, s is 1. Zero logits give every active head the weight 1. Training adds 0.01 times the
mean over layers of E Σ_e (mean p_e · part of tokens that chose e)  (`load_balance`), in
`transom train` as the method's own loss.

Without parameters, for continued training of a finished model (the LLaMA form): half of the heads
are shared, of the others each token uses those with the largest norms of queries, weight 1.

Shapes: x (B, N, C), gates (B, N, H), heads (B, H, N, d).

The official code computes every head and multiplies by 0. Here heads that are not chosen are left
out (`skipping`): the queries of each routed head that chose it are gathered into a group, padded to
the largest one, attend to all keys, and go back to their places; that is exact, also backward.
`path="auto"` does so only where it was measured to pay on CPUs. On one thread (float32, tokens
spread evenly over heads) attention with 50 % of the heads is 1.2 times as fast as its dense form at
130 keys, 1.4 times at 197 and 1.7 times at 785 (12 heads of 64); with 75 % it is 1.1 times from 400
on. Where tokens choose unevenly, in short sequences, on GPUs, and in compiled or exported graphs
"auto" is dense; it took at most 9 % longer than that. Projections are computed for all heads.

As a method the learned router rebuilds the attention from the host's projections, so what else a
host does inside it (norms of q and k, gates, a scale of its own) is not there and has to be trained
again; hosts with rotary or relative positions are refused. The query router works between any
host's own projections, also those of decoders (`host="decoder"`). `head_usage` reports which heads
are used how much. MoH-ViT, whose host is TransNeXt, is registered with timm; there the heads are
weighed, but none is left out.

Source: Jin et al., MoH: Multi-Head Attention as Mixture-of-Head Attention, 2024; official code
SkyworkAI/MoH@2cefd57 (Apache-2.0; this package is our own). The factors S, K and 2 are in the code
but not in the formulas of the paper. Parameters have the official names.

Checked against the official code: attention of the DiT form (with every mix of shared and routed
heads, outputs, gradients, loss), of the LLaMA form, and a small MoH-ViT; the skipping path against
the dense one. Not checked: accuracies; the straight-through gradient, whose training code is not
released. MoH-DiT is there as its attention alone.
"""

from transom.papers.attention.moh.attention import MoHAttention, MoHLlamaAttention
from transom.papers.attention.moh.method import MoH
from transom.papers.attention.moh.network import moh_vit
from transom.papers.attention.moh.routing import head_usage, load_balance
from transom.registry import Backbone, Offer

__all__ = [
    "BACKBONES",
    "OFFERS",
    "MoH",
    "MoHAttention",
    "MoHLlamaAttention",
    "head_usage",
    "load_balance",
    "moh_vit",
]

BACKBONES = (
    Backbone("moh_vit_small_80", params=50.0),
    Backbone("moh_vit_small_75", params=50.0),
    Backbone("moh_vit_base_75", params=90.0),
    Backbone("moh_vit_base_50", params=90.0),
)

OFFERS = (
    Offer("operator", "moh-attention", MoHAttention),
    Offer("operator", "moh-llama-attention", MoHLlamaAttention),
    Offer("objective", "load-balance", load_balance),
    Offer("lens", "head-usage", head_usage),
)
