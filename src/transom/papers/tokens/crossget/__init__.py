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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transom.errors import SettingsError
from transom.hosts.base import Host
from transom.ops import matching, padded
from transom.papers.tokens.crossget.from_clip import convert, from_transformers
from transom.papers.tokens.crossget.towers import (
    CrossCLIP,
    CrossText,
    CrossVision,
    alignment_loss,
)
from transom.registry import Method, Offer
from transom.slots import Ask, Fill
from transom.tokens import Tokens

__all__ = [
    "CrossCLIP",
    "CrossGET",
    "CrossText",
    "CrossVision",
    "alignment_loss",
    "convert",
    "from_transformers",
]


@dataclass(frozen=True)
class MergeGuided:
    """Token step: complete-graph soft matching of r tokens, guided by a query.

    Attributes:
        r: tokens to remove.
        guide: whose query it is; None for no guide.
        ensemble: weight the two of a pair by importance; else the mean.
    """

    r: int
    guide: Literal["class", "mean"] | None
    ensemble: bool

    def __call__(self, tokens: Tokens, attended: Ask) -> Tokens:
        r = min(self.r, (tokens.count - tokens.prefix) // 2)
        if r < 1:
            return tokens
        assert attended.q is not None and attended.k is not None
        key = attended.k.detach().transpose(1, 2).flatten(2)  # (B, N, C)
        query = attended.q.detach().transpose(1, 2).flatten(2)
        valid = tokens.record.valid
        importance = None
        if self.guide is not None:
            guide = query[:, :1]
            if self.guide == "mean":
                real = query.new_ones(1, 1, 1) if valid is None else valid[..., None].to(query)
                guide = (query * real).mean(1, keepdim=True)  # its length does not matter
            importance = matching.guided_importance(key, guide)
        if valid is not None:
            found = padded.complete(key, valid, r, importance, tokens.prefix)
        else:
            reserved = matching.Reserved(tokens.prefix)
            found = matching.complete(key, r, importance, reserved)
        if importance is None or not self.ensemble:
            return tokens.merge(found)
        return tokens.merge(found, shares=matching.guided_shares(found, importance))


@dataclass(frozen=True)
class CrossGET(Method):
    """Complete-graph matching and guided ensemble, without training.

    Attributes:
        r: tokens to remove in each block; a sequence gives one number a block, and blocks beyond
            its end remove none. Never more than half of the patch tokens of a block are removed.
        guided: importance from the class token's query, or the mean query on hosts without one.
        ensemble: weight the two tokens of a pair by importance; needs guided.
        prop_attn: add log(size) to the logits of each key.
    """

    r: int | tuple[int, ...] = 16
    guided: bool = True
    ensemble: bool = True
    prop_attn: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.r, int):
            object.__setattr__(self, "r", tuple(self.r))
        numbers = (self.r,) if isinstance(self.r, int) else self.r
        if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in numbers):
            raise SettingsError(
                f"r is {self.r!r}; expected tokens to remove a block: an integer >= 0 or a "
                "sequence of them"
            )

    def fit(self, host: Host) -> list[Fill]:
        guide: Literal["class", "mean"] | None = None
        if self.guided:
            guide = "class" if host.class_token else "mean"
        return [
            Fill(
                tokens=MergeGuided(r, guide, self.ensemble) if r else None,
                size_bias=self.prop_attn,
            )
            for r in self.per_block(host.depth)
        ]

    def per_block(self, depth: int) -> list[int]:
        """Tokens to remove in each of `depth` blocks.

        Raises:
            SettingsError: r lists more blocks than there are.
        """
        if isinstance(self.r, int):
            return [self.r] * depth
        if len(self.r) > depth:
            raise SettingsError(f"r lists {len(self.r)} blocks, but the host has {depth}")
        return [*self.r, *[0] * (depth - len(self.r))]

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        # a quarter, a half and nearly all of what depth blocks can remove evenly
        return [{"r": max(1, round(patches * part / depth))} for part in (0.25, 0.5, 0.8)]

    @classmethod
    def removing(cls, removed: Sequence[int], patches: int) -> dict[str, Any]:
        return {"r": tuple(removed)}

    @classmethod
    def neutral(cls) -> dict[str, Any]:
        return {"r": 0}


OFFERS = (
    Offer("pipeline", "cross-clip", CrossCLIP),
    Offer("pipeline", "cross-clip-from-transformers", from_transformers),
    Offer("objective", "cross-token-alignment", alignment_loss),
)
