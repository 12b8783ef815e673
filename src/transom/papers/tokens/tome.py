"""ToMe: merge the r most similar pairs of tokens in every block.

Between attention and ffn, tokens at even positions each choose the most similar token at an odd
position (cosine of the keys, averaged over heads), and the r best pairs become one token each:

    x  <- sum of s_i x_i over a group / sum of s_i        s: tokens a token stands for
    softmax(q kᵀ / sqrt(d) + log s) v                     proportional attention

x: (B, N, D) becomes (B, N - r, D). Prefix tokens (class, distillation, registers) neither leave
nor receive. Training-free; in training the gradient passes the merge and not the matching.

Source: Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023, sec. 3; official code
facebookresearch/ToMe@af95e4b (non-commercial licence; this file is written from the mathematics).

Differences from the official patch, all deliberate: layer scale, q/k norm and gates of the host
are honoured; the schedule of a one-block host is defined; ties are broken by position; hosts that
average over tokens count each original patch once (apply(..., restore="never") gives the plain
mean over the tokens that are left). In a padded batch each item is merged as if it were alone:
padding is neither a candidate nor a destination.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transom.errors import SettingsError, TokensError
from transom.hosts.base import Host
from transom.ops import matching, padded
from transom.registry import Method
from transom.settings import one_a_block, removals
from transom.slots import Ask, Fill
from transom.tokens import Tokens


@dataclass(frozen=True)
class MergePairs:
    """Token step: bipartite soft matching of r pairs on the keys."""

    r: int

    def __call__(self, tokens: Tokens, attended: Ask) -> Tokens:
        valid = tokens.record.valid
        if min(self.r, (tokens.count - tokens.prefix) // 2) < 1:
            return tokens
        if valid is not None:
            return tokens.merge(padded.bipartite(attended.key, valid, self.r, tokens.prefix))
        return tokens.merge(matching.bipartite(attended.key, self.r, tokens.prefix))


@dataclass(frozen=True)
class MergeToEveryKth:
    """Token step: of the patch tokens every k-th stays and takes in the most similar others."""

    k: int

    def __call__(self, tokens: Tokens, attended: Ask) -> Tokens:
        if tokens.record.valid is not None:
            raise TokensError(
                "k-th matching drops what is left over at the end of a sequence, so it has no form "
                "for a padded batch; give inputs of one length, or use r instead of kth"
            )
        patches = tokens.count - tokens.prefix
        if patches < self.k:
            raise TokensError(
                f"kth is {self.k}, but only {patches} patch tokens enter the block, so none would "
                "stay; lower it, or restrict it to early blocks with apply(..., where=...)"
            )
        found = matching.every_kth(attended.key[:, tokens.prefix :], self.k)
        return tokens.merge(found.behind(tokens.prefix))


def schedule(r: int, inflect: float, depth: int) -> list[int]:
    """Tokens to remove in each block: linear from r (1 - inflect) to r (1 + inflect).

    Args:
        r: mean number a block.
        inflect: -1 removes most in early blocks, 0 the same everywhere, 1 most in late blocks.
        depth: number of blocks.

    Returns:
        One number a block.
    """
    low = int(r * (1.0 - inflect))
    step = (2 * r - 2 * low) / max(depth - 1, 1)
    return [int(low + step * i) for i in range(depth)]


@dataclass(frozen=True)
class ToMe(Method):
    """Token merging.

    Attributes:
        r: tokens to remove in each block; a sequence gives one number a block, and blocks beyond
            its end remove none. Never more than half of the patch tokens of a block are removed.
        inflect: slope of the schedule in [-1, 1] when r is one number.
        prop_attn: add log(size) to the logits of each key. The paper switches it off for
            off-the-shelf MAE models.
        kth: instead of r: every kth patch token stays and takes in the others. Use it with
            apply(..., where=...).
    """

    r: int | tuple[int, ...] = 8
    inflect: float = 0.0
    prop_attn: bool = True
    kth: int | None = None

    def __post_init__(self) -> None:
        removals(self.r)
        if not -1 <= self.inflect <= 1:
            raise SettingsError(f"inflect is {self.inflect!r}; expected a slope from -1 to 1")
        if self.kth is not None and self.kth < 1:
            raise SettingsError(f"kth is {self.kth!r}; expected an integer of at least 1")

    def fit(self, host: Host) -> list[Fill]:
        if self.kth is not None:
            step = None if self.kth == 1 else MergeToEveryKth(self.kth)
            # tokens beyond a multiple of kth are dropped
            return [Fill(tokens=step, size_bias=self.prop_attn, drops=self.kth > 1)] * host.depth
        return [
            Fill(tokens=MergePairs(r) if r else None, size_bias=self.prop_attn)
            for r in self.per_block(host.depth)
        ]

    def per_block(self, depth: int) -> list[int]:
        """Tokens to remove in each of `depth` blocks.

        Raises:
            SettingsError: r lists more blocks than there are.
        """
        if isinstance(self.r, int):
            return schedule(self.r, self.inflect, depth)
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
