"""SHViT: one attention head, on a part of the channels, in a network of few and wide tokens.

    x₁, x₂ = the first p channels of x, the other C - p
    q, k, v = BN(W GroupNorm₁(x₁))                       widths e, e, p
    y = BN(W' ReLU[softmax(q kᵀ / √e) v, x₂])

The other channels are those of the block's input, not normed. A block is a depthwise 3x3
convolution, this attention and an FFN of ratio 2, all residual and with batch norm; the stem
reduces images by 16 at once, three stages halve the map between them with an inverted bottleneck.
Early stages have no attention ("i"), the others do ("s").

Shapes: maps (B, C, h, w), q and k (B, 1, h w, e), v (B, 1, h w, p). At inference every batch norm
folds into the convolution before it (into the linear layer behind it at the classifier), and the
identity beside a depthwise convolution into the centre of its kernel: `model.fuse()`. The group
norm stays.

The backbones S1 to S4 are models of timm. timm since some time has models `shvit_s1` to `shvit_s4`
with other parameter names, one classifier, and no downsampling between stages of equal width; ours
have the names and layout of the official code and `_official` behind their name, and `convert`
brings state dicts of timm's models over. As a method for other hosts, single-head attention takes
the place of a block's whole attention, with the tokens as positions, prefix tokens included;
padding takes no part in its statistics. Nothing of it can be taken from the host, so it needs
training: its last batch norm begins with weight 0, as in the paper, and so the block begins without
attention.

Source: Yun and Ro, "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design",
2024, section 3; official code github.com/ysj9909/SHViT (MIT). Different here: attention runs in
fused kernels.

Checked against the official code: attention with running and with batch statistics, a block, the
merging, the network with one and with two classifiers (outputs and gradients); against timm's
SHViT-S1: logits with its parameters. Not checked: accuracies, download of weights, the published
throughputs.
"""

from transom.papers.attention.shvit.attention import SHSA
from transom.papers.attention.shvit.backbone import SHViT, convert
from transom.papers.attention.shvit.method import SingleHead
from transom.registry import Backbone, Offer

__all__ = ["BACKBONES", "OFFERS", "SHSA", "SHViT", "SingleHead", "convert"]

BACKBONES = (
    Backbone("shvit_s1_official", params=6.33, gmacs=0.241),
    Backbone("shvit_s2_official", params=11.48, gmacs=0.366),
    Backbone("shvit_s3_official", params=14.25, gmacs=0.601),
    Backbone("shvit_s4_official", params=16.59, gmacs=0.986, size=256),
)

OFFERS = (Offer("operator", "single-head-self-attention", SHSA),)
