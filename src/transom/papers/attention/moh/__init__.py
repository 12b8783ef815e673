"""MoH."""

from transom.papers.attention.moh.attention import MoHAttention, MoHLlamaAttention
from transom.registry import Offer

OFFERS = (
    Offer("operator", "moh-attention", MoHAttention),
    Offer("operator", "moh-llama-attention", MoHLlamaAttention),
)
