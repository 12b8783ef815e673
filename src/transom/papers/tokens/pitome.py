"""PiToMe: merge tokens of high energy, protect the isolated ones.

The energy of a token is its mean similarity to all others above a margin,

    E_i = mean_j ELU(cos(k_i, k_j) - m),

high in the middle of a large group of similar tokens (background), low for what stands alone.
Each block keeps a ratio of its T patch tokens, so r = floor(T - T·ratio) leave. Of the 2r tokens
of highest energy, each second one flows into the most similar of the others ("pitome"); or ToMe's
bipartite matching runs over all tokens ordered by energy ("bipartite"). Merging and proportional
attention are ToMe's. x: (B, N, D) becomes (B, N - r, D). Training-free.

Source: Tran et al., Accelerating Transformers with Spectrum-Preserving Token Merging, NeurIPS
2024, sec. 3; official code hchautran/PiToMe@550b5de (non-commercial licence; this file is written
from the mathematics).

The released ViT, DeiT and MAE blocks track sizes but never hand them to the attention, so a
merged token counts as one key. Here sizes reach the attention by default, as the paper's method
and the released BLIP-2 attention have it; prop_attn=False is the behaviour as released. All
prefix tokens are protected, where the released code protects the class token alone.

On text encoders the variant of the released BERT patch runs by default: a Gaussian of 1 - cos in
place of the ELU, the r tokens of highest energy flow into the next r, plain means, in the first
three blocks only. There sizes stay out of the attention: on a real sentence encoder that keeps
embeddings nearer at every length and budget tried (benchmarks/sentence_embeddings.py). In a padded
batch each text is merged as if it were alone; padding is neither a candidate nor a destination.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from transom.errors import SettingsError
from transom.hosts.base import Host
from transom.ops import matching, padded
from transom.registry import Method
from transom.settings import one_a_block
from transom.slots import Ask, Fill
from transom.tokens import Tokens

Kind = Literal["pitome", "bipartite", "text"]

# Margin of block l of L: start - slope·l/L, by kind of host (released patches).
MARGINS = {
    "deit": (0.75, 0.75),
    "mae": (0.75, 0.75),
    "vit": (0.9, 0.9),
    "clip": (0.9, 0.9),
    "clip-lavis": (0.95, 0.95),
    "blip2": (0.75, 0.4),
    "text": (0.9, 0.25),
}
TEXT_BLOCKS = 3
"""Blocks that merge on a text encoder, counted from the first (released BERT patch)."""


@dataclass(frozen=True)
class MergeByEnergy:
    """Token step: merge floor(T - T·ratio) tokens of high energy.

    Attributes:
        ratio: of patch tokens that stay.
        margin: similarity from which a neighbour counts in full.
        kind: of matching; "text" is the variant for language, with the Gaussian energy.
        metric: "key" (head mean) or "feature" (the residual stream after attention).
        alpha: of the ELU.
        prune: drop the sources instead of merging them.
    """

    ratio: float
    margin: float
    kind: Kind
    metric: Literal["key", "feature"]
    alpha: float
    prune: bool

    def __call__(self, tokens: Tokens, attended: Ask) -> Tokens:
        r = removed(tokens.count - tokens.prefix, self.ratio)
        if not r:
            return tokens
        metric = attended.key if self.metric == "key" else tokens.x.detach()
        valid = tokens.record.valid
        if valid is None:
            found = matching.by_energy(metric, r, tokens.prefix, self.margin, self.kind, self.alpha)
        else:
            found = padded.by_energy(
                metric, valid, self.ratio, self.margin, self.kind, tokens.prefix, self.alpha
            )
        if self.prune:
            return tokens.keep(found.keep)
        return tokens.merge(found, weighted=self.kind != "text")


def removed(count: int, ratio: float) -> int:
    """How many of `count` patch tokens leave when `ratio` of them stay."""
    return 0 if ratio >= 1 else math.floor(count - count * ratio)


@dataclass(frozen=True)
class PiToMe(Method):
    """Spectrum-preserving token merging.

    Attributes:
        ratio: of patch tokens that stay in each block, from 0.5 to 1; or one number a block.
        margin: a number, one number a block, the name of a kind of host (see MARGINS), or "auto":
            the kind of this host (DeiT and MAE 0.75, others 0.9, falling linearly with depth).
        matching: "pitome", "bipartite", "text", one of them a block, or "auto": as released for
            this kind of host (DeiT: bipartite in the first half; MAE: in the second half; text
            encoders: text, in the first 3 blocks only; others: pitome).
        prop_attn: add log(size) to the logits of each key. "auto": except on text encoders, whose
            merges are plain means.
        metric: what similarity is measured on: "key", "feature" (the residual stream), or "auto":
            as released for this kind of host (CLIP: feature; others: key).
        alpha: of the ELU in the energy.
        prune: drop the sources instead of merging them.
    """

    ratio: float | tuple[float, ...] = 0.95
    margin: float | str | tuple[float, ...] = "auto"
    matching: str | tuple[str, ...] = "auto"
    prop_attn: bool | Literal["auto"] = "auto"
    metric: Literal["key", "feature", "auto"] = "auto"
    alpha: float = 1.0
    prune: bool = False

    def __post_init__(self) -> None:
        ratios = self.ratio if isinstance(self.ratio, tuple) else (self.ratio,)
        if any(not 0.5 <= ratio <= 1 for ratio in ratios):
            raise SettingsError(
                f"ratio is {self.ratio!r}; expected the part of tokens that stays in each block, "
                "from 0.5 (every token of high energy pairs with another) to 1 (none leaves)"
            )
        if isinstance(self.margin, str) and self.margin not in (*MARGINS, "auto"):
            raise SettingsError(
                f"margin is {self.margin!r}; expected a number, one a block, 'auto' or one of "
                f"{list(MARGINS)}"
            )
        kinds = (self.matching,) if isinstance(self.matching, str) else self.matching
        known: tuple[str, ...] = get_args(Kind)
        known += ("auto",) if isinstance(self.matching, str) else ()
        if any(kind not in known for kind in kinds):
            raise SettingsError(
                f"matching is {self.matching!r}; expected 'auto', 'pitome', 'bipartite' or 'text', "
                "or one of the last three a block"
            )
        if self.metric not in ("key", "feature", "auto"):
            raise SettingsError(f"metric is {self.metric!r}; expected 'key', 'feature' or 'auto'")

    def fit(self, host: Host) -> list[Fill]:
        kind = host_kind(host)
        margins = self._margins(kind, host.depth)
        kinds = self._kinds(kind, host.depth)
        metric = self.metric
        if metric == "auto":
            metric = "feature" if kind == "clip" else "key"
        sizes = kind != "text" if self.prop_attn == "auto" else self.prop_attn
        fills = []
        if isinstance(self.ratio, tuple):
            ratios = one_a_block(self.ratio, host.depth, "ratio")
        else:
            ratios = [self.ratio] * host.depth
        for i, (ratio, margin, pick) in enumerate(zip(ratios, margins, kinds, strict=True)):
            if kind == "text" and self.matching == "auto" and i >= TEXT_BLOCKS:
                fills.append(Fill(size_bias=sizes))
                continue
            step = MergeByEnergy(ratio, margin, pick, metric, self.alpha, self.prune)  # type: ignore[arg-type]
            fills.append(
                Fill(
                    tokens=step if ratio < 1 else None,
                    size_bias=sizes,
                    asks=metric == "key",
                    drops=self.prune,
                )
            )
        return fills

    def _margins(self, kind: str, depth: int) -> list[float]:
        if isinstance(self.margin, tuple):
            return [float(m) for m in one_a_block(self.margin, depth, "margin")]
        if not isinstance(self.margin, str):
            return [float(self.margin)] * depth
        start, slope = MARGINS[kind if self.margin == "auto" else self.margin]
        return [start - slope * i / depth for i in range(depth)]

    def _kinds(self, kind: str, depth: int) -> list[str]:
        if isinstance(self.matching, tuple):
            return [str(k) for k in one_a_block(self.matching, depth, "matching")]
        if self.matching != "auto":
            return [self.matching] * depth
        if kind == "text":
            return ["text"] * depth
        half = (depth + 1) // 2
        first, second = ["bipartite"] * half, ["pitome"] * (depth - half)
        if kind == "deit":
            return first + second
        if kind == "mae":
            return ["pitome"] * half + ["bipartite"] * (depth - half)
        return ["pitome"] * depth

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        # ratios that leave 3/4, 1/2 and 1/5 of the patches after the last block
        return [{"ratio": max(0.5, round(left ** (1 / depth), 4))} for left in (0.75, 0.5, 0.2)]

    @classmethod
    def removing(cls, removed: Sequence[int], patches: int) -> dict[str, Any]:
        ratios = []
        for r in removed:
            # floor(T - T·ratio) is r for any ratio a little below (T - r)/T
            ratios.append(1.0 if not r else max(0.5, (patches - r - 0.25) / patches))
            patches -= r
        return {"ratio": tuple(ratios)}

    @classmethod
    def neutral(cls) -> dict[str, Any]:
        return {"ratio": 1.0}


def host_kind(host: Host) -> str:
    """Which of the released settings a host takes: "deit", "mae", "clip", "text" or "vit"."""
    if host.modality == "text":
        return "text"
    name = host.architecture.lower()
    for kind in ("mae", "deit", "clip"):
        if kind in name:
            return kind
    return "vit"
