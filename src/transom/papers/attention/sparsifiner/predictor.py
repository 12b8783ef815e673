"""Which keys a query attends to, predicted at low rank, and attention over those alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.errors import SettingsError, TokensError
from transom.ops import attention

Score = Literal["topk", "threshold"]
Path = Literal["auto", "masked", "gathered"]


@dataclass(frozen=True)
class Budget:
    """What of a prediction is kept.

    Attributes:
        keep_rate: part of all N keys that a query attends to.
        coef_topk: coefficients kept of each query; None uses coef_threshold instead.
        coef_threshold: coefficients up to this are set to 0.
        basis_threshold: entries of the basis up to this are set to 0.
        score: "topk" keeps ceil(keep_rate · N) keys, "threshold" those above score_threshold.
        score_threshold: of the approximate attention.
        prune_rows: whether tokens that are gone attend to nothing.
    """

    keep_rate: float = 0.25
    coef_topk: int | None = 8
    coef_threshold: float = 0.0
    basis_threshold: float = 0.02
    score: Score = "topk"
    score_threshold: float = 0.001
    prune_rows: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.keep_rate <= 1:
            raise SettingsError(
                f"keep_rate is {self.keep_rate}; expected the part of keys that a query attends "
                "to: above 0, at most 1"
            )
        if self.coef_topk is not None and self.coef_topk < 1:
            raise SettingsError(f"coef_topk is {self.coef_topk}; expected at least 1, or None")
        if self.score not in ("topk", "threshold"):
            raise SettingsError(f"score is {self.score!r}; expected 'topk' or 'threshold'")

    def keys(self, count: int) -> int:
        """How many of `count` keys a query attends to."""
        return math.ceil(self.keep_rate * count)


class Prediction(NamedTuple):
    """What the predictor says of R = N - P queries, those behind the prefix.

    Attributes:
        coefficients: (B, H, R, K), weights of the basis.
        approx: (B, H, R, N), the approximate attention.
        places: (B, H, R, keys) int64, the chosen keys; None when their number differs.
        mask: (B, H, R, N) bool, the chosen keys; None unless it was asked for.
    """

    coefficients: Tensor
    approx: Tensor
    places: Tensor | None
    mask: Tensor | None


class MaskPredictor(nn.Module):
    """Low-rank estimate of an attention matrix, shared by the heads of a layer.

    Args:
        head_dim: d.
        tokens: N, fixed.
        reduce_n: N over the rank K of the estimate.
        reduce_c: d over the width r of reduced queries and keys.
        tied: whether the basis is made of the map that reduces the keys.
        budget: what of the estimate is kept.
        generator: of the initial values.
    """

    def __init__(
        self,
        head_dim: int,
        tokens: int,
        reduce_n: int = 6,
        reduce_c: int = 2,
        tied: bool = False,
        budget: Budget | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        rank, width = tokens // max(reduce_n, 1), head_dim // max(reduce_c, 1)
        if reduce_n < 1 or reduce_c < 1 or rank < 1 or width < 1:
            raise SettingsError(
                f"reduce_n {reduce_n} and reduce_c {reduce_c} leave {rank} of {tokens} tokens and "
                f"{width} of {head_dim} channels; expected at least 1 of each"
            )
        self.budget = Budget() if budget is None else budget
        self.reconstructs = False  # phase 1 of the training
        self.proj_c_q, self.proj_c_k = nn.Linear(head_dim, width), nn.Linear(head_dim, width)
        for linear in (self.proj_c_q, self.proj_c_k):
            nn.init.normal_(linear.weight, std=head_dim**-0.5, generator=generator)
            nn.init.zeros_(linear.bias)
        self.proj_n = nn.Parameter(torch.empty(tokens, rank))
        self.proj_back_n = self.proj_n if tied else nn.Parameter(torch.empty(tokens, rank))
        for table in (self.proj_n,) if tied else (self.proj_n, self.proj_back_n):
            nn.init.normal_(table, std=tokens**-0.5, generator=generator)

    def extra_repr(self) -> str:
        tokens, rank = self.proj_n.shape
        return f"tokens={tokens}, rank={rank}, keys={self.budget.keys(tokens)}"

    @property
    def phase1(self) -> bool:
        """Whether the estimate is being fitted and not yet used."""
        return self.reconstructs and self.training

    def forward(
        self, q: Tensor, k: Tensor, live: Tensor | None = None, prefix: int = 1, mask: bool = True
    ) -> Prediction:
        """The estimate and the keys it chooses; no gradient passes through the choice.

        Args:
            q, k: (B, H, N, d).
            live: (B, N) bool, False for tokens that are gone; None when none is.
            prefix: P tokens in front, whose queries see everything.
            mask: whether the choice is wanted as a mask, and not only by their places.

        Raises:
            TokensError: there are not the N tokens the predictor was made for.
        """
        low, summary = self._reduced(q, k, live, prefix)
        return self._found(low, summary, self._basis(), live, prefix, mask)

    def by_rows(self, q: Tensor, k: Tensor, prefix: int, rows: int) -> Iterator[Prediction]:
        """The same for `rows` queries at a time, so that all pairs are never there at once.

        Without masks, so for budgets that choose by "topk", and with all tokens there.
        """
        low, summary = self._reduced(q, k, None, prefix)
        basis = self._basis()
        for some in low.split(rows, 2):
            yield self._found(some, summary, basis, None, prefix, False)

    def _reduced(
        self, q: Tensor, k: Tensor, live: Tensor | None, prefix: int
    ) -> tuple[Tensor, Tensor]:
        """Narrow queries (B, H, R, r), and (B, H, r, K): what is left of the keys."""
        tokens = self.proj_n.shape[0]
        if q.shape[2] != tokens:
            raise TokensError(
                f"Sparsifiner's predictor was made for {tokens} tokens, but {q.shape[2]} came; "
                "its parameters belong to places, so use images of the size it was fitted for, "
                "and no method that removes tokens before it"
            )
        q, k = self.proj_c_q(q[:, :, prefix:]), self.proj_c_k(k)
        if live is not None:
            q = q.masked_fill(~live[:, None, prefix:, None], 0)
            k = k.masked_fill(~live[:, None, :, None], 0)
        return q, (k.mT @ self.proj_n) * q.shape[1] ** -0.5

    def _basis(self) -> Tensor:
        """(K, N)."""
        basis = self.proj_back_n.mT
        if self.phase1:
            return basis
        return _above(basis.abs(), self.budget.basis_threshold).contiguous()

    def _found(
        self,
        low: Tensor,
        summary: Tensor,
        basis: Tensor,
        live: Tensor | None,
        prefix: int,
        mask: bool,
    ) -> Prediction:
        budget = self.budget
        c = (low @ summary).softmax(-1)
        kept = None
        if not self.phase1:
            if budget.coef_topk is None:
                c = _above(c, budget.coef_threshold)
            elif budget.coef_topk < c.shape[-1]:
                kept = c.topk(budget.coef_topk, -1, sorted=False)
                c = torch.zeros_like(c).scatter(-1, kept.indices, kept.values)
        if kept is None or self.training or c.device.type != "cpu":
            approx = c @ basis
        else:  # a few rows of the basis; most of the product would be with zeros
            weights, places = (t.flatten(0, 2) for t in (kept.values, kept.indices))
            approx = F.embedding_bag(places, basis, per_sample_weights=weights, mode="sum").view(
                *c.shape[:-1], -1
            )
        with torch.no_grad():
            index, chosen = self._choice(approx.detach(), live, prefix, mask)
        return Prediction(c, approx, index, chosen)

    def _choice(
        self, score: Tensor, live: Tensor | None, prefix: int, wanted: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        budget, tokens = self.budget, score.shape[-1]
        index: Tensor | None = None
        chosen: Tensor | None
        if live is not None:
            score = score.masked_fill(~live[:, None, None], -torch.inf)
        if budget.score == "threshold":
            chosen = score > budget.score_threshold
        else:
            chosen, index = _best(score, live, prefix, budget.keys(tokens), wanted)
        if live is not None and budget.prune_rows:
            index = None
            if chosen is None:
                chosen = _best(score, live, prefix, budget.keys(tokens), True)[0]
            assert chosen is not None
            chosen = chosen & live[:, None, prefix:, None]
        return index, chosen


def _above(x: Tensor, threshold: float) -> Tensor:
    return x.masked_fill(x <= threshold, 0)


def _best(
    score: Tensor, live: Tensor | None, prefix: int, keys: int, wanted: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The best keys as a mask (if wanted) and as an index (if all rows have as many)."""
    # as a set, unless ranks decide what counts; sorting would take half of the time
    index = score.topk(keys, -1, sorted=live is not None).indices
    ones = torch.ones_like(index, dtype=torch.bool)
    if live is not None:
        # the k-th best counts only while there are as many tokens behind the prefix
        amount = live[:, prefix:].sum(-1)[:, None, None, None]
        ones = ones & (torch.arange(keys, device=index.device) < amount)
        wanted = True
    chosen = None
    if wanted:
        chosen = torch.zeros_like(score, dtype=torch.bool).scatter(-1, index, ones)
    return chosen, index if live is None else None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    found: Prediction,
    *,
    scale: float,
    bias: Tensor | None = None,
    prefix: int = 1,
    path: Path = "auto",
) -> Tensor:
    """Attention of each query over the keys that were chosen for it.

    Args:
        q, k, v: (B, H, N, d).
        found: for the queries behind the prefix.
        scale: of the logits.
        bias: broadcastable to (B, H, N, N), added to the logits; None for none.
        prefix: tokens in front, whose queries attend to everything.
        path: "gathered" computes the chosen logits alone, "masked" all of them in one fused
            kernel. "auto" takes the faster one, see :func:`gathers`.

    Returns:
        (B, H, N, d); 0 for a query without keys.
    """
    if found.places is not None and (
        path == "gathered"
        or (path == "auto" and gathers(k.shape[2], found.places.shape[-1], q.device))
    ):
        rows = gathered(q[:, :, prefix:], k, v, found.places, scale, _rows(bias, prefix, None))
    else:
        rows = _masked(q[:, :, prefix:], k, v, found, scale, _rows(bias, prefix, None))
    if not prefix:
        return rows
    lead = attention.attend(q[:, :, :prefix], k, v, _rows(bias, 0, prefix), scale=scale)
    return torch.cat([lead, rows], 2)


def predicted(
    predictor: MaskPredictor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    prefix: int = 1,
    path: Path = "auto",
    rows: int = 256,
) -> Tensor:
    """Prediction and attention together, `rows` queries at a time.

    So no head needs memory for all its pairs; what is left that grows with N² is the basis.

    Args:
        predictor: whose budget is "topk".
        q, k, v, scale, bias, prefix, path: see :func:`attend`.
        rows: queries at a time.

    Returns:
        (B, H, N, d).
    """
    out, start = [], prefix
    if prefix:
        own = _rows(bias, 0, prefix)
        out.append(attention.attend(q[:, :, :prefix], k, v, own, scale=scale))
    for found in predictor.by_rows(q, k, prefix, rows):
        stop = start + found.approx.shape[2]
        some, own = q[:, :, start:stop], _rows(bias, start, stop)
        out.append(attend(some, k, v, found, scale=scale, bias=own, prefix=0, path=path))
        start = stop
    return torch.cat(out, 2)


def gathers(tokens: int, keys: int, device: torch.device) -> bool:
    """Whether gathering is expected to be faster than masking.

    On CPUs copies of fewer than about 1 in 24 keys are cheaper than all logits in one kernel; on
    other devices this was not measured, and the mask is taken.
    """
    return device.type == "cpu" and keys * 24 <= tokens


def _mask(found: Prediction) -> Tensor:
    if found.mask is not None:
        return found.mask
    assert found.places is not None
    return torch.zeros_like(found.approx, dtype=torch.bool).scatter(-1, found.places, True)


def _rows(bias: Tensor | None, start: int, end: int | None) -> Tensor | None:
    return bias if bias is None or bias.shape[-2] == 1 else bias[:, :, start:end]


def _masked(
    q: Tensor, k: Tensor, v: Tensor, found: Prediction, scale: float, bias: Tensor | None
) -> Tensor:
    if found.mask is not None or found.places is None or bias is not None:
        return masked(q, k, v, _mask(found), scale, bias)
    # every query has keys, and zeros where they are make the mask in one pass
    added = torch.full_like(found.approx, torch.finfo(q.dtype).min, dtype=q.dtype)
    added = added.detach().scatter_(-1, found.places, 0.0)
    return attention.attend(q, k, v, added, scale=scale)


def masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Softmax over the keys in mask (B, H, R, N), for q (B, H, R, d); the plain twin."""
    added = torch.zeros_like(mask, dtype=q.dtype) if bias is None else bias.expand(mask.shape)
    added = added.masked_fill(~mask, torch.finfo(q.dtype).min)
    y = attention.attend(q, k, v, added, scale=scale)
    return y.masked_fill(~mask.any(-1, keepdim=True), 0)


def gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    scale: float,
    bias: Tensor | None = None,
    room: int = 1 << 22,
) -> Tensor:
    """The same from copies of the chosen keys and values, in O(R · keys · d).

    Args:
        q: (B, H, R, d).
        k, v: (B, H, N, d).
        index: (B, H, R, keys) int64.
        scale: of the logits.
        bias: broadcastable to (B, H, R, N).
        room: numbers that copies of keys may take at a time.

    Returns:
        (B, H, R, d).
    """
    (batch, heads, count, width), keys = q.shape, index.shape[-1]
    step = max(1, room // max(1, batch * heads * keys * width))
    start = torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1) * k.shape[2]
    flat_k, flat_v = k.flatten(0, 2), v.flatten(0, 2)
    if bias is not None:
        bias = bias.expand(batch, heads, count, k.shape[2])
    out = []
    for first in range(0, count, step):
        some = slice(first, min(first + step, count))
        shape = (batch * heads * (some.stop - first), keys, width)
        place = (index[:, :, some] + start).flatten()
        keyed = flat_k.index_select(0, place).view(shape)
        logits = torch.bmm(keyed, q[:, :, some].reshape(-1, width, 1) * scale)[..., 0]
        if bias is not None:
            logits = logits + bias[:, :, some].gather(-1, index[:, :, some]).view_as(logits)
        valued = flat_v.index_select(0, place).view(shape)
        out.append(torch.bmm(logits.softmax(-1)[:, None], valued).view(batch, heads, -1, width))
    return torch.cat(out, 2)


def maps(
    q: Tensor, k: Tensor, found: Prediction, scale: float, prefix: int = 1, everything: bool = False
) -> tuple[Tensor, Tensor]:
    """Both attention matrices (B, H, N, N) for losses: the one in use, and the one over all keys.

    Args:
        q, k: (B, H, N, d).
        found: for the queries behind the prefix.
        scale: of the logits.
        prefix: tokens in front, whose queries attend to everything.
        everything: whether the choice is not in use, as in phase 1.
    """
    logits = (q @ k.mT) * scale
    full = logits.softmax(-1)
    if everything:
        return full, full
    chosen = F.pad(_mask(found), (0, 0, prefix, 0), value=True)
    sparse = logits.masked_fill(~chosen, -torch.inf).softmax(-1).nan_to_num()
    return sparse, full
