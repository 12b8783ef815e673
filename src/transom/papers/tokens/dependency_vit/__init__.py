"""DependencyViT: tokens send to their parents, and a tree over patches comes out of it.

    S = softmax(q kᵀ / √d)                           row j: how child j spreads over parents
    p = softmax over heads of (W_p x / τ)            each child speaks through nearly one head
    m ← m · sigmoid(MLP(x))                          how much it still says; never rises again
    y_i = W_o concat over heads of Σ_j S[j, i] p[j] m[j] v_j

Shapes: x (B, N, D), S (B, H, N, N), p (B, H, N), m (B, N). Columns of Sᵀ sum to 1, its rows do
not: how much arrives at a token is its popularity. A block is pre-norm with layer scale, there is
no class token, and the tokens behind the last norm are averaged with weight m. The Lite form drops
the tokens with the smallest m behind the attention of some blocks, in step i down to the part
(1 - i r)/(1 - (i - 1) r) of those there.

Summed over heads and layers, Sᵀ p m is a soft graph over the patches (`dependency_mask`); `grow`
makes a tree of it, whose subtrees are parts, and `draw_tree` puts it on the picture. The mask can
also be read from an ordinary ViT.

As a method, the host's own projections are turned around, and prefix tokens and padding receive
without sending. A pretrained host has to be trained for it. What is read behind the last block is
the host's: m is not multiplied there.

Source: Ding et al., Visual Dependency Transformers: Dependency Tree Emerges from Reversed
Attention, CVPR 2023. The authors released no code (dingmyu/DependencyViT is empty). Checked against
a third-party re-implementation that says of itself that it is not verified
(fffffgggg54/pytorch-image-models@11e8739, timm/models/dependencyvit.py): the attention, and stacks
with and without pruning, outputs and gradients. So parity with the authors is not claimed; biases
of selector and controller, the place of the last m and the score of pruning are those of that file,
as are the parameter names. Ours: how a tree is made of the graph, since the rule of the paper is
not available to us. On planted textures a small Lite model keeps the object more often than chance
and is more accurate than with patches dropped at random (a test). That edges between patches of one
object exceed chance was seen in some small trainings and not in others. Not checked: accuracy on
real images, any checkpoint, segmentation by parts.
"""

from transom.papers.tokens.dependency_vit.attention import ReversedAttention
from transom.papers.tokens.dependency_vit.backbone import DependencyViT
from transom.papers.tokens.dependency_vit.method import Dependency
from transom.papers.tokens.dependency_vit.readout import dependency_mask
from transom.papers.tokens.dependency_vit.tree import DependencyTree, draw_tree, grow
from transom.registry import Backbone, Offer

__all__ = [
    "BACKBONES",
    "OFFERS",
    "Dependency",
    "DependencyTree",
    "DependencyViT",
    "ReversedAttention",
    "dependency_mask",
    "draw_tree",
    "grow",
]

# No size or cost is published in the sources at hand.
BACKBONES = (
    Backbone("dependencyvit_tiny_patch16_224"),
    Backbone("dependencyvit_small_patch16_224"),
    Backbone("dependencyvit_lite_tiny_patch16_224"),
)

OFFERS = (
    Offer("operator", "reversed-attention", ReversedAttention),
    Offer("lens", "dependency-mask", dependency_mask),
    Offer("lens", "dependency-tree", grow),
    Offer("lens", "dependency-tree-drawing", draw_tree),
)
