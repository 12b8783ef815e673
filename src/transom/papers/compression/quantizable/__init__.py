"""Quantizable transformers."""

from transom.papers.compression.quantizable.attention import QuantizableAttention
from transom.registry import Offer

OFFERS = (Offer("operator", "quantizable-attention", QuantizableAttention),)
