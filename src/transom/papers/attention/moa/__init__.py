"""MoA: every head of a decoder gets its own sliding window, found by profiling and a search.

The span of a head is a rule of the length N of the input, span(N) = α + β N. Its cache holds

    c = min(int(α + β (N + M)), N + M) tokens, at least 128, rounded up to blocks of 64

M being the tokens to come: the first 64 for ever (sink), the rest in a circle. While a prompt is
read, queries of block i see key blocks j < 1 or j > i - (c - 64) / 64, and no later token.

q, k, v: (B, H, N, d) behind the rotary embedding; the cache of a layer is (B, Σ c_h, d), head after
head. Nothing is trained.

Source: Fu et al., MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression,
2024 (CoLM 2025: Mixture of Attention Spans); official code thu-nics/MoA@e224fe3 (MIT; this file is
our own).

    importance = {n: profile(model, texts_of_length_n) for n in (2048, 4096)}
    plan = search(importance, candidates(4096, 8192, 2048), budget=0.5)
    plan.save("plan.json")
    transom.apply(model, MoA.of(plan))            # or MoA.of(Plan.load("plan.json"))

`profile` takes the gradient of the loss, E_ij = -A_ij (G_ij - Σ_n G_in A_in) / (1 - A_ij), the
first-order effect of removing one attention value; `search` picks rules that lose least of it.
A plan names query heads, or heads of keys where these are shared (importance: `shared`); query
heads that share keys but have rules of their own each keep a copy of these, as the official code
does.

Differences, all deliberate: blocks and sink are counted from the first real token, so that padding
in front changes nothing; a prompt may go on after an answer (several new tokens enter the cache one
by one); the search is a relaxation instead of a commercial solver, see `search`. As in the official
code the sink comes on top of the band in the search but out of the cache size at inference, so a
real window is one block shorter than the profiled one; and the room in the cache is for
`room` new tokens: after more the windows stay as they are.

Checked: goldens of influence, search space, losses and densities, cache sizes, the cache, windows;
influence against removing a value; decoding against dense attention with the same masks. Not
reproduced: the published plans and retrieval scores, which need models of 7B.

Measured by `benchmarks/moa.py` on SmolLM2-135M and WikiText-2, 2,048 tokens at a time: perplexity
20.26 with all keys; with half of them 20.63 by one window and 20.28 by a plan; with a quarter 23.78
and 21.51, in a cache of 22.5 MiB instead of 90. At 4,096 tokens it is 19.04; 19.14 and 19.07; 19.65
and 19.33, with the same plans, which are beside the table in docs/results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor

from transom.errors import SettingsError, TokensError
from transom.hosts.base import Host
from transom.ops import attention
from transom.papers.attention.moa.cache import RaggedCache
from transom.papers.attention.moa.influence import influence, profile, shared
from transom.papers.attention.moa.search import pareto, search
from transom.papers.attention.moa.spans import Cut, Plan, Rule, candidates, rules
from transom.papers.attention.moa.window import window_mask, windowed
from transom.registry import Method, Offer, Takes
from transom.slots import Ask, Fill
from transom.tokens import Record

__all__ = ["MoA", "Plan", "candidates", "pareto", "profile", "rules", "search", "shared"]


@dataclass(frozen=True)
class Windows:
    """Attention operator of one layer.

    Attributes:
        rules: of its heads, ordered so that equal ones are neighbours.
        order: the place of each of them among the heads of the host.
        cut: how spans become caches and windows.
    """

    rules: tuple[Rule, ...]
    order: tuple[int, ...]
    cut: Cut

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None,
        scale: float,
        record: Record | None,
        ask: Ask,
    ) -> Tensor:
        real = _real(bias, q.shape[2] if ask.decoding else k.shape[2])
        if ask.decoding:
            from transom.papers.attention.moa.cached import RaggedLayer

            layer = ask.cache.layers[ask.place]
            if not isinstance(layer, RaggedLayer):
                raise TokensError(
                    "MoA was fitted after this cache was filled, so it holds no windows; begin "
                    "with a new cache"
                )
            return layer.attend(q, scale, real)
        count = q.shape[2]
        sizes = [self.cut.size(rule, count) for rule in self.rules]
        sinks = [min(size, self.cut.sink) for size in sizes]
        heads = self._heads(q.shape[1])
        if count <= self.cut.block:
            y = attention.attend(q, k, v, bias, scale=scale)
        else:
            y = self._read(q, k, v, bias, scale, real, sizes, sinks, heads)
        if ask.cache is not None:
            self._keep(ask, k, v, real, sizes, sinks)
        return y

    def _heads(self, queries: int) -> list[int]:
        """Query heads in the order of the rules."""
        each = queries // len(self.order)
        return [head * each + i for head in self.order for i in range(each)]

    def _read(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        scale: float,
        real: Tensor | None,
        sizes: Sequence[int],
        sinks: Sequence[int],
        heads: list[int],
    ) -> Tensor:
        """Attention over the prompt, (B, H, N, d)."""
        block, each = self.cut.block, len(heads) // len(self.order)
        near = [max(1, (size - sink) // block) for size, sink in zip(sizes, sinks, strict=True)]
        local = [n for n in near for _ in range(each)]
        first = [sink // block for sink in sinks for _ in range(each)]
        sorts = heads != sorted(heads)
        if sorts:
            q, k, v = (x[:, heads] for x in (q, k, v))
        if real is None:
            y = windowed(q, k, v, local, first, block, scale=scale)
        else:
            places = (real.cumsum(-1) - 1).clamp(min=0)
            assert bias is not None
            y = _padded(q, k, v, bias, scale, places, local, first, block)
        return y[:, torch.tensor(heads, device=y.device).argsort()] if sorts else y

    def _keep(
        self,
        ask: Ask,
        k: Tensor,
        v: Tensor,
        real: Tensor | None,
        sizes: Sequence[int],
        sinks: Sequence[int],
    ) -> None:
        """Put a ragged layer in the place of the host's."""
        from transom.papers.attention.moa.cached import RaggedLayer

        layers = ask.cache.layers
        if type(layers[ask.place]).__name__ != "DynamicLayer":
            raise TokensError(
                f"MoA keeps its own windows in place of a DynamicLayer, but this cache has a "
                f"{type(layers[ask.place]).__name__}; use the default cache"
            )
        each = k.shape[1] // len(self.order)
        chosen = [head * each for head in self.order]
        ragged = RaggedCache(sizes, sinks, k)
        with torch.no_grad():
            ragged.write(k[:, chosen], v[:, chosen], real)
        layers[ask.place] = RaggedLayer(ragged, self.order, k.shape[2])


def _real(bias: Tensor | None, count: int) -> Tensor | None:
    """(B, count) bool, which of the last tokens are no padding; None when all are real."""
    if bias is None:
        return None
    seen = bias[:, 0, -1, -count:] > torch.finfo(bias.dtype).min / 2
    return None if bool(seen.all()) else seen


def _padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    scale: float,
    places: Tensor,
    local: Sequence[int],
    sinks: Sequence[int],
    block: int,
) -> Tensor:
    """The same as `windowed` for texts that begin at different places, by masks."""
    out, first = [], 0
    for (near, sink), same in groupby(zip(local, sinks, strict=True)):
        heads = slice(first, first + len(list(same)))
        first = heads.stop
        kept = window_mask(places, [near], [sink], block)  # (B, 1, N, N)
        added = bias.masked_fill(~kept, torch.finfo(bias.dtype).min)
        out.append(attention.attend(q[:, heads], k[:, heads], v[:, heads], added, scale=scale))
    return torch.cat(out, 1)


@dataclass(frozen=True)
class MoA(Method):
    """Per-head sliding windows in a decoder, in the prompt and in its cache.

    Attributes:
        alphas, betas: (layers, heads) of a plan; None for the same rule everywhere.
        alpha, beta: of that rule.
        block: side of a block of the prompt; cache sizes are multiples of it.
        sink: tokens at the start that every head keeps.
        minimum: of a cache, in tokens.
        room: tokens to be generated, counted into the length of a prompt.
    """

    alphas: tuple[tuple[float, ...], ...] | None = None
    betas: tuple[tuple[float, ...], ...] | None = None
    alpha: float = 0.0
    beta: float = 0.5
    block: int = 64
    sink: int = 64
    minimum: int = 128
    room: int = 1024
    takes: ClassVar[Takes] = "decoder"

    def __post_init__(self) -> None:
        self._cut()
        if (self.alphas is None) != (self.betas is None):
            raise SettingsError("a plan needs both alphas and betas, or neither")
        if self.alphas is not None and self.betas is not None:
            Plan(self.alphas, self.betas)

    @classmethod
    def of(cls, plan: Plan, **settings: Any) -> MoA:
        """With a plan and further settings."""
        return cls(plan.alphas, plan.betas, **settings)

    def _cut(self) -> Cut:
        return Cut(self.block, self.sink, self.minimum, self.room)

    def fit(self, host: Host) -> list[Fill]:
        config: Any = host.root.config
        queries = config.num_attention_heads
        keys = getattr(config, "num_key_value_heads", None) or queries
        if self.alphas is None or self.betas is None:
            plan = Plan.uniform(host.depth, keys, self.alpha, self.beta)
        else:
            plan = Plan(self.alphas, self.betas)
        layers, heads = plan.shape
        if layers != host.depth or heads not in (queries, keys):
            raise SettingsError(
                f"the plan is for {layers} layers of {heads} heads, but this {host.family} has "
                f"{host.depth} layers of {queries} heads ({keys} of keys)"
            )
        fills = []
        for i in range(layers):
            order, found = plan.order(i), plan.rules(i)
            ordered = tuple(found[head] for head in order)
            fills.append(Fill(attention=Windows(ordered, tuple(order), self._cut())))
        return fills

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        # blocks that are small beside the prompt, or nothing would be cut
        block = max(1, min(64, patches // 8))
        sizes = {"block": block, "sink": block, "minimum": 2 * block, "room": min(1024, patches)}
        return [{"beta": beta, **sizes} for beta in (0.75, 0.5, 0.25)]

    @classmethod
    def neutral(cls) -> dict[str, Any]:
        return {"beta": 1.0}


OFFERS = (
    Offer("lens", "influence", influence),
    Offer("lens", "profile", profile),
    Offer("operator", "ragged-cache", RaggedCache),
    Offer("operator", "windowed", windowed),
    Offer("pipeline", "search", search),
    Offer("pipeline", "pareto", pareto),
)
