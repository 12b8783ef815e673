"""DependencyViT."""

from transom.papers.tokens.dependency_vit.attention import ReversedAttention
from transom.papers.tokens.dependency_vit.backbone import DependencyViT
from transom.registry import Backbone, Offer

__all__ = ["BACKBONES", "OFFERS", "DependencyViT", "ReversedAttention"]

BACKBONES = (
    Backbone("dependencyvit_tiny_patch16_224"),
    Backbone("dependencyvit_small_patch16_224"),
    Backbone("dependencyvit_lite_tiny_patch16_224"),
)

OFFERS = (Offer("operator", "reversed-attention", ReversedAttention),)
