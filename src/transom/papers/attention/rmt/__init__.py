"""RMT: attention to a position decays with its Manhattan distance, faster in some heads.

A head of index k of n adds ln(γ_k) (|Δrow| + |Δcolumn|) to its logits, so that

    A = softmax(q kᵀ / √d + D),    D_ij = ln(γ_k) (|row_i - row_j| + |column_i - column_j|),
    γ_k = 1 - 2^-(a + r k / n),    k = 0 .. n - 1

weighs every position by γ_k to the power of its distance and normalises again. q and k are turned
by the flattened position (interleaved pairs) before. On large maps attention is decomposed: each
position looks along its row, with the decay of that axis, and the result is what it then looks for
along its column, with the same q and k: h w (h + w) pairs instead of (h w)². A depthwise 5x5
convolution of the values (`lepe`) joins the result in front of the output projection.

Shapes: maps (B, h, w, C), q, k, v (B, h, w, n, d); the full mask D is (n, h w, h w), those of the
axes (n, h, h) and (n, w, w). Both forms run in fused attention with the mask as additive bias.

The backbones T, S, B and L are models of timm, and S*, B* and L* those for token labelling: with a
classifier of single positions, in training mode they return (logits, logits of positions, box),
where the tokens of a rectangle, the box, were exchanged within the batch.

As a method for other hosts the decay alone is an attention operator between their own projections:
patches decay towards each other, prefix tokens (class, registers) have bias 0 in both directions,
and positions stay the host's; in hosts with windows it acts inside them. The decomposed form there
keeps the prefix tokens among the keys of both passes, and lets them look at everything; that is our
choice, the paper has no such tokens. With a large `initial_value` nothing decays and the host is as
it was. The method brings no parameters, but is meant to be trained with.

Source: Fan et al., "RMT: Retentive Networks Meet Vision Transformers", 2023, equations of Manhattan
self-attention and its decomposition; official code github.com/qhfan/RMT. Parameters have the
official names, buffers included, so official state dicts load as they are. Different here: the
mask of the paper multiplies the softmax, the official code adds its logarithm to the logits, and so
do we; the two tables of a stage stay in single precision when a model is cast to half.

Parameters of T, S, B, L are as published. The cost is not: counted are 2.64, 4.78, 10.37 and 19.49
GMACs at 224 pixels (`torch.utils.flop_counter`), published 2.5, 4.5, 9.7 and 18.2; linear layers
alone are 3.93, 8.96 and 17.14 of S, B and L. What the publication leaves out is not known, so the
backbones S, B and L state no published cost.

Checked against the official code: tables, both forms of attention, a block, the whole network with
and without the classifier of single positions (outputs and gradients). Not checked: accuracies (the
weights are on a drive only), training with token labelling beyond shapes and its own inverse.
"""

from transom.papers.attention.rmt.attention import MaSA
from transom.papers.attention.rmt.backbone import VisRetNet
from transom.papers.attention.rmt.method import ManhattanDecay
from transom.registry import Backbone, Offer

__all__ = ["BACKBONES", "OFFERS", "MaSA", "ManhattanDecay", "VisRetNet"]

BACKBONES = (
    Backbone("rmt_tiny", params=14, gmacs=2.5),
    Backbone("rmt_small", params=27),
    Backbone("rmt_base", params=54),
    Backbone("rmt_large", params=95),
    Backbone("rmt_small_token_label"),
    Backbone("rmt_base_token_label"),
    Backbone("rmt_large_token_label"),
)

OFFERS = (Offer("operator", "manhattan-self-attention", MaSA),)
