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

Forms. :class:`CrossGET` is training-free and fits any encoder: the guide is the class token's
query, or the mean query where there is none. With `cross=True` each block gets a guest, the cross
token: the one that left the block before, without gradient, plus a learned vector; its query is
the guide. :func:`fit_towers` puts it into both towers of a model, and the loss of :func:`aligning`
draws the cross tokens of the two together in the joint space:

- CLIP, whose towers do not meet. In the text tower the cross token copies the end of the text in
  front of every block; the mask is causal, nothing hears it, and the end's own query is the guide.
- BLIP, whose text looks at the image. So does the cross token of the text, which is guided by this
  very image; that of the image, which is computed first, knows of texts by the loss alone.
- LLaVA (:func:`fit_llava`, :func:`aligning_llava`): importance in the vision tower is the attention
  a token receives; in the language model the first token of the prompt is the cross token.

:class:`CrossCLIP` is the released CLIP under OpenAI's parameter names, which the golden cases and
released checkpoints are for; :func:`from_transformers` fills it from a CLIPModel.

Source: Shi et al., CrossGET: Cross-Guided Ensemble of Tokens for Accelerating Vision-Language
Transformers, ICML 2024; official code sdc17/CrossGET@dc32975 (BSD-3; this file is our own).

Checked against the official CLIP code: matching and ensemble with and without a text's end, both
towers with gradients, the alignment loss. Two tokens that are each other's best partner always tie
in the ranking. Here ties go by position; the released code leaves them to torch's sort, whose
order depends on machine and dtype (stable=False does that, and is what the golden cases use).
A fitted CLIP gives what :class:`CrossCLIP` gives (a test), for texts without padding: what stands
behind the end of a text takes part in the release and not here, where a text comes out the same
however far it is padded. The BLIP form follows the paper's idea, since its code is not released,
and is held against nothing; of the LLaVA form there are no golden cases. On planted things that
captions name, the named patch stays by itself much more often than with ToMe, with random drops or
without guide (a test). No accuracy on real data was measured.
"""

from __future__ import annotations

from transom.papers.tokens.crossget.cross import aligning, fit_towers
from transom.papers.tokens.crossget.from_clip import convert, from_transformers
from transom.papers.tokens.crossget.language import aligning_llava, fit_llava
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
    "aligning_llava",
    "alignment_loss",
    "convert",
    "fit_llava",
    "fit_towers",
    "from_transformers",
]

OFFERS = (
    Offer("pipeline", "cross-guided-towers", fit_towers),
    Offer("pipeline", "cross-guided-llava", fit_llava),
    Offer("objective", "cross-guided-alignment", aligning),
    Offer("objective", "cross-guided-llava-alignment", aligning_llava),
    Offer("pipeline", "cross-clip", CrossCLIP),
    Offer("pipeline", "cross-clip-from-transformers", from_transformers),
    Offer("objective", "cross-token-alignment", alignment_loss),
)
