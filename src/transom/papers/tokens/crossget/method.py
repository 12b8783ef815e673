"""CrossGET as a method: the token step, and the hyperparameters that put it into blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from transom.errors import SettingsError
from transom.hosts.base import Host
from transom.ops import attention, matching, padded
from transom.papers.tokens.crossget.cross import (
    CrossToken,
    end_of,
    mean_of,
    refuse_without_room,
)
from transom.registry import Method
from transom.settings import one_a_block, removals
from transom.slots import Ask, Fill
from transom.tokens import Tokens

Guide = Literal["class", "mean", "cross", "end"]


@dataclass(frozen=True)
class MergeGuided:
    """Token step: complete-graph soft matching of r tokens, guided across modalities.

    Guests stand last, take no part and stay.

    Attributes:
        r: tokens to remove.
        guide: whose query it is: of the class token, of the mean token, of the cross token, or of
            the end of a text; None for no guide.
        received: importance is the attention that a token receives, from all and from the guide,
            instead of the cosine of its key with the query of the guide.
        ensemble: weight the two of a pair by importance; else the mean.
        suffix: last real tokens that are left alone.
    """

    r: int
    guide: Guide | None
    ensemble: bool
    received: bool = False
    suffix: int = 0

    def __call__(self, tokens: Tokens, attended: Ask) -> Tokens:
        count = tokens.count - attended.guests
        r = min(self.r, (count - tokens.prefix - self.suffix) // 2)
        if r < 1:
            return tokens
        assert attended.k is not None
        if self.received:
            key = attended.key[:, :count]
        else:
            key = attended.k.detach().transpose(1, 2).flatten(2)[:, :count]  # (B, N, C)
        valid = tokens.record.valid
        valid = None if valid is None else valid[:, :count]
        importance = self.importance(key, attended, count, valid)
        if valid is not None:
            found = padded.complete(key, valid, r, importance, tokens.prefix, self.suffix)
        else:
            reserved = matching.Reserved(tokens.prefix, self.suffix)
            found = matching.complete(key, r, importance, reserved)
        shares = None
        if importance is not None and self.ensemble:
            shares = matching.guided_shares(found, importance)
        return tokens.merge(found.before(count, attended.guests), shares=shares)

    def importance(
        self, key: Tensor, attended: Ask, count: int, valid: Tensor | None
    ) -> Tensor | None:
        """(B, N) how much each token matters; None when there is no guide."""
        if self.guide is None:
            return None
        assert attended.q is not None and attended.k is not None
        q = attended.q.detach()
        if self.received:
            k = attended.k.detach()
            seen = attention.probabilities(q, k, attended.bias, attended.scale).mean(1)
            guide = seen[:, -1] if self.guide == "cross" else seen[:, 0]
            others = seen[:, :count]
            if valid is not None:  # what padding attends to does not matter
                others = others * valid[..., None].to(others)
            total = count if valid is None else valid.sum(-1, keepdim=True)
            return (others.sum(1) / total + guide)[:, :count]
        query = q.transpose(1, 2).flatten(2)
        if self.guide == "cross":
            guide = query[:, -1:]
        elif self.guide == "end":
            guide = end_of(query[:, :count], valid)
        else:
            guide = query[:, :1] if self.guide == "class" else mean_of(query[:, :count], valid)
        return matching.guided_importance(key, guide)


@dataclass(frozen=True)
class CrossGET(Method):
    """Complete-graph matching and guided ensemble, with or without cross tokens.

    Attributes:
        r: tokens to remove in each block; a sequence gives one number a block, and blocks beyond
            its end remove none. Never more than half of the patch tokens of a block are removed.
        guided: importance from the class token's query, or the mean query on hosts without one.
        ensemble: weight the two tokens of a pair by importance; needs guided.
        prop_attn: add log(size) to the logits of each key.
        cross: a learnable cross token in each block, which guides in place of the class token. It
            starts as a copy of that one, and is trained with
            :func:`transom.papers.tokens.crossget.aligning`.
        importance: "query", cosine of a key with the query of the guide, or "received", attention
            that a token receives from all tokens and from the guide (the form for LLaVA).
    """

    keeps_order: ClassVar[bool] = True

    r: int | tuple[int, ...] = 16
    guided: bool = True
    ensemble: bool = True
    prop_attn: bool = True
    cross: bool = False
    importance: Literal["query", "received"] = "query"

    def __post_init__(self) -> None:
        removals(self.r)
        if self.cross and not self.guided:
            raise SettingsError(
                "cross=True with guided=False: a cross token guides the merging, so leave cross "
                "out, or guided"
            )

    def fit(self, host: Host) -> list[Fill]:
        if self.cross:
            refuse_without_room(host)
        origin: Guide = "end" if host.causal else "class" if host.class_token else "mean"
        guide: Guide | None = None
        if self.guided:
            # behind the end of a text nothing that is read hears the cross token
            guide = "cross" if self.cross and not host.causal else origin
        if guide == "end" and self.importance == "received":
            raise SettingsError(
                f"importance='received' in this {host.family}, where a token is heard only by "
                "those behind it; expected importance='query'"
            )
        return [
            Fill(
                tokens=self._step(r, guide, host) if r else None,
                enter=CrossToken(host.width, origin) if self.cross else None,
                size_bias=self.prop_attn,
            )
            for r in self.per_block(host.depth)
        ]

    def _step(self, r: int, guide: Guide | None, host: Host) -> MergeGuided:
        received = self.importance == "received"
        return MergeGuided(r, guide, self.ensemble, received, int(host.causal))

    def per_block(self, depth: int) -> list[int]:
        """Tokens to remove in each of `depth` blocks.

        Raises:
            SettingsError: r lists more blocks than there are.
        """
        if isinstance(self.r, int):
            return [self.r] * depth
        return one_a_block(self.r, depth, "r", rest=0)

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
