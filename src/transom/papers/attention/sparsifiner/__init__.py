"""Sparsifiner: predict at low rank which keys a query needs, and attend to those alone.

    c = softmax_K(H^-1/2 · (q W_q) ((k W_k)ᵀ P)ᵀ),  Â = c · |B|ᵀ,  mask = top keys of each row of Â

with P, B: (N, K) parameters of a layer, shared by its heads. The class token sees everything.

Source: Wei et al., Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision
Transformers, CVPR 2023; official code lim142857/Sparsifiner@9a11e26 (MIT; this file is our own).
"""

from __future__ import annotations

from transom.papers.attention.sparsifiner.model import BACKBONES

__all__ = ["BACKBONES"]
