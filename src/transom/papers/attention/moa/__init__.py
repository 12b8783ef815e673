"""MoA: every head of a decoder gets its own sliding window, found by profiling and a search.

Source: Fu et al., MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression,
2024; official code thu-nics/MoA@e224fe3 (MIT; this file is our own).
"""

from __future__ import annotations

from transom.papers.attention.moa.cache import RaggedCache
from transom.papers.attention.moa.influence import influence
from transom.registry import Offer

OFFERS = (Offer("lens", "influence", influence), Offer("operator", "ragged-cache", RaggedCache))
