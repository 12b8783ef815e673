"""CrossGET: merge tokens along the complete graph of similarities, guided across modalities.

Between attention and ffn, with the keys m of all heads side by side and a guide u (the query of a
token that speaks for the task):

    S_ij   = cos(m_i, m_j)                      no bipartite split: every pair may merge
    rank   : by max_j S_ij, highest first;      i sees only tokens ranked behind it
    I_i    = cos(m_i, u)                        importance
    give way: lowest I_i - max_{j in sight} S_ij first; the first r flow each into the nearest other
    w      = softmax(I_source, I_destination)   the pair is weighted 2w_s : 2w_d instead of 1 : 1
    x      = (weighted sum of size·x) / (sum of sizes),  softmax(q kᵀ/√d + log size) v

x: (B, N, D) becomes (B, N - r, D) in the old order, so causal hosts can follow.

Two forms. :class:`CrossGET` is training-free and fits any encoder: the guide is the class token's
query, or the mean query where there is none. :class:`CrossCLIP` is the trained form for two
towers: each carries a cross token, x_last (image) or the end of the text, without gradient, plus a
learned vector per layer; its query (in the text tower that of the end of the text) is the guide,
and :func:`alignment_loss` draws the cross tokens of the two towers together in the joint space.
:func:`from_transformers` fills it from a CLIPModel.

Source: Shi et al., CrossGET: Cross-Guided Ensemble of Tokens for Accelerating Vision-Language
Transformers, ICML 2024; official code sdc17/CrossGET@dc32975 (BSD-3; this file is our own).

Checked against the official CLIP code: matching and ensemble with and without a text's end, both
towers with gradients, the alignment loss. Two tokens that are each other's best partner always tie
in the ranking. Here ties go by position; the released code leaves them to torch's sort, whose
order depends on machine and dtype (stable=False does that, and is what the golden cases use).
Not here: the BLIP and BLIP-2 forms, whose code is not released, and the LLaVA form (importance
from received attention, cross tokens in the language model).
"""

from __future__ import annotations

from transom.papers.tokens.crossget.cross import aligning, fit_towers
from transom.papers.tokens.crossget.from_clip import convert, from_transformers
from transom.papers.tokens.crossget.method import CrossGET
from transom.papers.tokens.crossget.towers import (
    CrossCLIP,
    CrossText,
    CrossVision,
    alignment_loss,
)
from transom.registry import Offer

__all__ = [
    "CrossCLIP",
    "CrossGET",
    "CrossText",
    "CrossVision",
    "aligning",
    "alignment_loss",
    "convert",
    "fit_towers",
    "from_transformers",
]

OFFERS = (
    Offer("pipeline", "cross-guided-towers", fit_towers),
    Offer("objective", "cross-guided-alignment", aligning),
    Offer("pipeline", "cross-clip", CrossCLIP),
    Offer("pipeline", "cross-clip-from-transformers", from_transformers),
    Offer("objective", "cross-token-alignment", alignment_loss),
)
