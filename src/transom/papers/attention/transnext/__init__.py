"""TransNeXt: every query sees its neighbours finely and the whole image coarsely, in one softmax.

Aggregated attention gives a query the keys of a 3x3 window around it and the keys of the image
pooled to a small grid,

    s_near = q' k_windowᵀ + B_local        q' = (q/|q| + E) τ ln(L_i + P)
    s_far  = q' k_poolᵀ + B(Δ)             k = k/|k|, as in both lines
    A_near, A_far = softmax of both together
    y      = (q/|q| T + b + A_near) v_window + A_far v_pool

with a learned query embedding E, a temperature τ = softplus(.) a head, L_i places of the window
that lie on the image, P pooled keys, and tokens T and bias b that are learned. B grows from the
relative coordinates by a small network, on a logarithmic scale that stays the one of training when
the image is larger. Pooled features are GELU(conv1x1(x)), averaged, normed, and projected by the
same weights as k and v. The last stage has cosine attention of all to all. The ffn is a gated
linear unit whose gate passes a depthwise 3x3 convolution (:class:`ConvGLU`).

Shapes: tokens (B, N, C) on a grid (h, w), near logits (B, h, w, H, 9), far ones (B, H, N, P). The
window goes through :mod:`transom.ops.neighborhood.unfused`, which never copies it out.

The backbones are models of timm. They take images of any size: tables of the size they were built
for are buffers, others are made in the call (`set_input_size` keeps those of another size), with
the coordinates on the scale of `pretrain_size`. `fixed_pool_size` makes the cost linear.

As a method for other hosts both halves of a block can be fitted (`parts`). Projections begin as
the host's, everything else anew, so training is needed. Prefix tokens are our addition: patches
see them as further far keys, they see every token, and the convolution takes each for a map of one
position.

Source: Shi, TransNeXt: Robust Foveal Visual Perception for Vision Transformers, CVPR 2024,
equations of aggregated attention and of the convolutional GLU; official code
DaiShiResearch/TransNeXt@c8a9974 (Apache-2.0; this file is our own). Parameters have the official
names, so official state dicts load as they are.

Checked against the official code: both attentions, the linear mode, the GLU, the whole network
(outputs and gradients). Not checked: accuracies, and the official CUDA operator.
"""

from transom.papers.attention.transnext.backbone import TransNeXt
from transom.papers.attention.transnext.method import TransNeXtBlock
from transom.papers.attention.transnext.mixer import (
    AggregatedAttention,
    ConvGLU,
    GlobalAttention,
)
from transom.registry import Backbone

__all__ = [
    "BACKBONES",
    "AggregatedAttention",
    "ConvGLU",
    "GlobalAttention",
    "TransNeXt",
    "TransNeXtBlock",
]

BACKBONES = (
    Backbone("transnext_micro", params=12.8, gmacs=2.7),
    Backbone("transnext_tiny", params=28.2, gmacs=5.7),
    Backbone("transnext_small", params=49.7, gmacs=10.3),
    Backbone("transnext_base", params=89.7, gmacs=18.4),
    Backbone("transnext_small_384", gmacs=32.1, size=384),
    Backbone("transnext_base_384", gmacs=56.3, size=384),
    Backbone("transnext_micro_aaaa_256", params=13.1, gmacs=3.3, size=256),
)
