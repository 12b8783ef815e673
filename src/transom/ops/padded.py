"""Matchings and choices of a batch whose items differ in length.

Each function does to every item of a padded batch what its namesake in
:mod:`transom.ops.matching` does to that item alone: counts, energies and partners are those of the
real tokens only, so an item does not depend on its batch mates. Padding is never a destination of
a real token nor a candidate; where an item gives fewer tokens than the batch as a whole loses,
padding leaves in their place (its weight is nothing, see :meth:`transom.tokens.Tokens.merge`).
Real tokens stand in front afterwards, in the order they have alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from transom.ops import rows
from transom.ops.matching import Matching, complete_graph, complete_order, descending, unit


class Real(NamedTuple):
    """The real tokens of a padded batch.

    order: (B, N) int64 old positions, real tokens first, both kinds in the order they stood.
    amount: (B,) int64 number of real tokens.
    """

    order: Tensor
    amount: Tensor


def real(valid: Tensor) -> Real:
    """Which tokens are real.

    Args:
        valid: (B, N) bool, False for padding.

    Returns:
        Their order and number.
    """
    return Real(descending(valid.to(torch.float32)), valid.sum(-1))


def share(count: Tensor, ratio: float) -> Tensor:
    """How many of `count` (B,) tokens leave when `ratio` of them stay (PiToMe's floor, float64)."""
    precise = count.double()
    return (precise - precise * _double(ratio)).floor().long()


def quota(count: Tensor, rate: float) -> Tensor:
    """How many of `count` (B,) tokens stay when `rate` of them do (EViT's ceiling, float64)."""
    return (count.double() * _double(rate)).ceil().long()


def _double(number: float) -> Tensor:
    """A number that stays float64 in an exported graph; ONNX makes a plain one float32."""
    return torch.tensor(number, dtype=torch.float64)


def _places(like: Tensor, count: int) -> Tensor:
    return torch.arange(count, device=like.device)


def _assemble(found: Real, source: Tensor, partner: Tensor, rank: Tensor, r: Tensor) -> Matching:
    """A matching of equal shape for all items.

    Args:
        found: the real tokens.
        source: (B, R) places, in the order of `found`, of which the first r are meant.
        partner: (B, R) place that each flows into.
        rank: (B, N) where each real token shall stand if it stays: different numbers whose
            amount is below 8 N.
        r: (B,) real tokens that leave.

    Returns:
        A matching with M = N - R in old positions.
    """
    batch, removed = source.shape
    count = rank.shape[1]
    kept = count - removed
    slot, place = _places(source, removed), _places(source, count)
    spare = slot >= r[:, None]
    source = torch.where(spare, count - 1 - slot + r[:, None], source)
    rank = torch.where(r[:, None] > 0, rank, place)  # where nothing leaves, nothing moves
    rank = torch.where(place < found.amount[:, None], rank, 8 * count + place)
    rank = rank.scatter(1, source, 16 * count)
    # only those cut off are equal, so the sort need not be stable, which ONNX does not know
    keep = rank.argsort(dim=-1)[:, :kept]
    new = torch.zeros_like(rank).scatter(1, keep, place[:kept].expand(batch, -1))
    into = torch.where(spare, kept - 1, new.gather(1, partner))
    return Matching(found.order.gather(1, keep), found.order.gather(1, source), into)


@torch.no_grad()
def bipartite(metric: Tensor, valid: Tensor, r: int, prefix: int = 0) -> Matching:
    """:func:`transom.ops.matching.bipartite` of each item's real tokens.

    Args:
        metric: (B, N, c).
        valid: (B, N) bool, False for padding; prefix tokens are real.
        r: tokens to remove, in no item more than half of its real tokens behind the prefix.
        prefix: number of leading tokens that are left alone.

    Returns:
        A matching with M = N - min(r, (N - prefix) // 2).
    """
    count = metric.shape[1]
    most = max(0, min(r, (count - prefix) // 2))
    if count < 2:  # a single token has no partner
        stay = torch.arange(count, device=metric.device).expand(metric.shape[0], -1)
        return Matching(stay, stay[:, :0], stay[:, :0])
    found = real(valid)
    each = ((found.amount - prefix) // 2).clamp(0, most)
    metric = unit(rows.take(metric, found.order))
    scores = metric[:, ::2] @ metric[:, 1::2].mT
    place = _places(metric, count)
    genuine = place < found.amount[:, None]  # (B, N)
    scores[:, : (prefix + 1) // 2] = -torch.inf
    scores[:, :, : prefix // 2] = -torch.inf
    scores = scores.masked_fill(~genuine[:, None, 1::2], -torch.inf)
    scores = scores.masked_fill(~genuine[:, ::2, None], -torch.inf)
    best, partner = scores.max(-1)
    order = descending(best)
    chosen = order[:, :most]
    stands = place[::2].expand(metric.shape[0], -1)
    if not prefix:
        stands = torch.zeros_like(order).scatter(1, order, place[: order.shape[1]].expand_as(order))
    rank = (place + 2 * count).repeat(metric.shape[0], 1)
    rank[:, ::2] = stands
    rank[:, :prefix] = place[:prefix] - count
    return _assemble(found, 2 * chosen, 2 * partner.gather(1, chosen) + 1, rank, each)


@torch.no_grad()
def complete(
    metric: Tensor,
    valid: Tensor,
    r: int,
    importance: Tensor | None = None,
    prefix: int = 0,
    suffix: int = 0,
) -> Matching:
    """:func:`transom.ops.matching.complete` of each item's real tokens.

    Args:
        metric: (B, N, c).
        valid: (B, N) bool, False for padding; prefix tokens are real.
        r: tokens to remove, in no item more than half of its real tokens behind the prefix.
        importance: (B, N); None when all tokens matter alike.
        prefix: number of leading tokens that are left alone.
        suffix: number of the last real tokens that are left alone.

    Returns:
        A matching with M = N - min(r, (N - prefix - suffix) // 2).
    """
    count = metric.shape[1]
    found = real(valid)
    most = max(0, min(r, (count - prefix - suffix) // 2))
    each = ((found.amount - prefix - suffix) // 2).clamp(0, most)
    place = _places(metric, count)
    held = (place < prefix) | (place >= (found.amount - suffix)[:, None])
    graph = complete_graph(rows.take(metric, found.order), held)
    if importance is not None:
        importance = importance.gather(1, found.order)
    order = complete_order(graph, importance)
    chosen = order[:, :most]
    leaves = _places(chosen, most) < each[:, None]
    # what leaves is no destination; spare slots write into a column that is cut off
    gone = torch.zeros(len(chosen), count + 1, dtype=torch.bool, device=chosen.device)
    gone = gone.scatter(1, torch.where(leaves, chosen, count), True)[:, :count]
    near = rows.take(graph, chosen).masked_fill(gone[:, None], -torch.inf)
    return _assemble(found, chosen, near.argmax(-1), place.repeat(len(chosen), 1), each)


def _units(metric: Tensor, found: Real, prefix: int) -> tuple[Tensor, Tensor]:
    """Unit rows (B, T, c) of the tokens behind the prefix, and which of them are real (B, T)."""
    metric = unit(rows.take(metric, found.order)[:, prefix:])
    behind = _places(metric, metric.shape[1]) < (found.amount - prefix)[:, None]
    return metric * behind[..., None], behind


@torch.no_grad()
def by_energy(
    metric: Tensor,
    valid: Tensor,
    ratio: float,
    margin: float,
    kind: str,
    prefix: int = 0,
    alpha: float = 1.0,
) -> Matching:
    """PiToMe's matchings of each item's real tokens.

    Args:
        metric: (B, N, c).
        valid: (B, N) bool, False for padding; prefix tokens are real.
        ratio: of the real tokens behind the prefix that stay; small enough that a token of the
            batch leaves.
        margin: similarity from which a neighbour counts in full.
        kind: "pitome" (:func:`~transom.ops.matching.energy_pairs`), "bipartite"
            (:func:`~transom.ops.matching.energy_bipartite`) or "text"
            (:func:`~transom.ops.matching.energy_halves`).
        prefix: number of leading tokens that are left alone.
        alpha: of the ELU; not used for text.

    Returns:
        A matching.
    """
    found = real(valid)
    units, genuine = _units(metric, found, prefix)
    cosine = units @ units.mT
    score = _energy(units, cosine, genuine, margin, alpha, kind)
    order = descending(score)  # (B, T), padding last
    batch, count = order.shape
    most = math.floor(count - count * ratio)
    each = share(found.amount - prefix, ratio).clamp(max=most)
    place, slot = _places(order, count), _places(order, most)
    if kind == "bipartite":
        sources, targets = place[::2].expand(batch, -1), place[1::2].expand(batch, -1)
        open_ = genuine[:, 1::2]  # in this order the first ones are real, as before
    elif kind == "pitome":
        sources, targets = (2 * slot).expand(batch, -1), (2 * slot + 1).expand(batch, -1)
        open_ = slot < each[:, None]
    else:
        sources = slot.expand(batch, -1)
        targets = (each[:, None] + slot).clamp(max=count - 1)
        open_ = slot < each[:, None]
    a, b = order.gather(1, sources), order.gather(1, targets)
    item = torch.arange(batch, device=order.device)[:, None, None]
    near = cosine[item, a[:, :, None], b[:, None]].masked_fill(~open_[:, None], -torch.inf)
    best, partner = near.max(-1)
    rank = place.repeat(batch, 1)  # of the ordered tokens
    if kind == "bipartite":
        best = best.masked_fill(~genuine[:, ::2], -torch.inf)
        line = descending(best)
        a, partner = a.gather(1, line[:, :most]), partner.gather(1, line[:, :most])
        stands = torch.zeros_like(line).scatter(1, line, place[: line.shape[1]].expand_as(line))
        rank[:, ::2] = stands
        rank[:, 1::2] = place[1::2] + count
    else:
        rank = rank.scatter_add(1, targets, torch.where(open_, count, 0))
    rank = torch.zeros_like(rank).scatter(1, order, rank)  # of the tokens where they stand
    rank = torch.cat([_places(rank, prefix).expand(batch, -1) - 4 * (count + prefix), rank], 1)
    return _assemble(found, a + prefix, b.gather(1, partner) + prefix, rank, each)


def _energy(
    units: Tensor, cosine: Tensor, genuine: Tensor, margin: float, alpha: float, kind: str
) -> Tensor:
    """Energy (B, T) over real neighbours, in the arithmetic of one item; -inf for padding."""
    count = genuine.sum(-1, keepdim=True).clamp(min=1)
    padding = ~genuine[:, None]
    if kind == "text":
        width = 1.0 - margin
        near = ((1.0 - cosine) / width).square().mul(-0.5).exp()
        near = near / (width * (2 * torch.pi) ** 0.5)
        mean = near.masked_fill(padding, 0.0).sum(-1) / count
    else:
        precise = torch.promote_types(units.dtype, torch.float32)
        units, below = units.to(precise), cosine.to(precise).clamp(max=margin)
        linear = (units @ units.sum(1, keepdim=True).mT)[..., 0]
        linear = linear - below.masked_fill(padding, 0.0).sum(-1)
        saturated = below.exp().masked_fill(padding, 0.0).sum(-1) * math.exp(-margin)
        mean = (linear + alpha * saturated) / count - alpha
    return mean.masked_fill(~genuine, -torch.inf)


@torch.no_grad()
def highest(
    score: Tensor, valid: Tensor, stay: Tensor, most: int, prefix: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The real tokens of highest score of each item stay; padding fills up the batch.

    Args:
        score: (B, T) of the tokens behind the prefix, where they stand now.
        valid: (B, N) bool, False for padding.
        stay: (B,) real tokens behind the prefix that stay.
        most: tokens behind the prefix that the batch keeps.
        prefix: leading tokens, which stay.

    Returns:
        Positions (B, prefix + most) that stay, by descending score; positions (B, T - most) of
        the others, as they stood; position (B, 1) of the best of the others.
    """
    genuine = valid[:, prefix:]
    order = descending(score.masked_fill(~genuine, -torch.inf))
    batch, count = order.shape
    place = _places(order, count)
    amount = genuine.sum(-1)[:, None]
    rank = place + torch.where(place < stay[:, None], 0, 2 * count)
    rank = torch.where(place < amount, rank, place + count)
    line = order.gather(1, rank.argsort(dim=-1))
    front = _places(order, prefix).expand(batch, -1)
    lead = order.gather(1, stay[:, None].clamp(max=count - 1))
    rest = line[:, most:].sort(-1).values
    return torch.cat([front, line[:, :most] + prefix], 1), rest + prefix, lead + prefix
