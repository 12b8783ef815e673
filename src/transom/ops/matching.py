"""Which tokens flow into which: similarity graphs and matchings.

A :class:`Matching` is the answer every merging paper gives in its own words: `keep`, the tokens
that stay and the order in which they stand afterwards; `source`, the tokens that leave; `into`,
the new position of the token each source flows into. No gradient passes through a matching.

Similarity is the cosine of a metric (B, N, c). Ties are broken by position, so equal tokens give
the same matching on every run and whatever else is in the batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transom.ops import native, rows


class Matching(NamedTuple):
    """Tokens that stay, tokens that leave, and where those go.

    keep: (B, M) int64, old position of the token at each new position.
    source: (B, R) int64, old positions of the tokens that leave.
    into: (B, R) int64, new position that each source is merged into.
    """

    keep: Tensor
    source: Tensor
    into: Tensor

    def target(self, count: int) -> Tensor:
        """New position of every old one.

        Args:
            count: number of old tokens N.

        Returns:
            (B, N) int64; -1 where a token is neither kept nor a source.
        """
        batch, kept = self.keep.shape
        new = torch.arange(kept, device=self.keep.device).expand(batch, -1)
        target = self.keep.new_full((batch, count), -1)
        return target.scatter(1, self.keep, new).scatter(1, self.source, self.into)

    def behind(self, prefix: int) -> Matching:
        """The same matching of tokens that stand behind `prefix` others, which stay in front."""
        front = torch.arange(prefix, device=self.keep.device).expand(self.keep.shape[0], -1)
        return Matching(
            torch.cat([front, self.keep + prefix], 1), self.source + prefix, self.into + prefix
        )

    def before(self, count: int, suffix: int) -> Matching:
        """The same matching of `count` tokens before `suffix` others, which stay last."""
        if not suffix:
            return self
        last = torch.arange(count, count + suffix, device=self.keep.device)
        keep = torch.cat([self.keep, last.expand(self.keep.shape[0], -1)], 1)
        return Matching(keep, self.source, self.into)


def unit(metric: Tensor) -> Tensor:
    """Rows of `metric` (B, N, c) scaled to length one; a zero row stays zero."""
    length = torch.linalg.vector_norm(metric, dim=-1, keepdim=True)
    return metric / length.clamp_min(1e-12)


def descending(score: Tensor) -> Tensor:
    """Positions (B, N) int64 by descending score (B, N); ties by position."""
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        # ONNX has no stable sort, but its TopK breaks ties by position; torch's topk does not
        return score.topk(score.shape[-1], dim=-1).indices
    return score.argsort(dim=-1, descending=True, stable=True)


def _at(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index)


def _interleave(first: Tensor, second: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Order of (first, second) in which the leading `count` tokens alternate again.

    Returns the concatenation in that order and, for each position of `second`, where it landed.
    """
    a, b = (count + 1) // 2, count // 2
    head = [first[:, i // 2] if i % 2 == 0 else second[:, i // 2] for i in range(count)]
    order = torch.cat([torch.stack(head, 1), first[:, a:], second[:, b:]], 1)
    places = [2 * i + 1 for i in range(b)]
    places += [count + first.shape[1] - a + i for i in range(second.shape[1] - b)]
    return order, torch.tensor(places, device=first.device)


def bipartite(metric: Tensor, r: int, prefix: int = 0) -> Matching:
    """ToMe's bipartite soft matching: even positions choose their most similar odd position.

    The r even tokens with the most similar partner are merged into it (Bolya et al. 2023, sec. 3).
    Prefix tokens neither leave nor receive. The order afterwards is that of the official code:
    unmerged even tokens, then odd tokens; without prefix tokens the unmerged ones stand by
    descending similarity, and prefix tokens keep their places at the front.

    Args:
        metric: (B, N, c).
        r: tokens to remove; more than half of the N - prefix others are never removed.
        prefix: number of leading tokens that are left alone.

    Returns:
        A matching with M = N - r.
    """
    count = metric.shape[1]
    r = max(0, min(r, (count - prefix) // 2))
    if count < 2:  # a single token has no partner
        stay = torch.arange(count, device=metric.device).expand(metric.shape[0], -1)
        return Matching(stay, stay[:, :0], stay[:, :0])
    if prefix < 2 and native.serves(metric):
        return Matching(*native.bipartite(metric, r, prefix))
    return _bipartite(metric, r, prefix)


@torch.no_grad()
def _bipartite(metric: Tensor, r: int, prefix: int) -> Matching:
    """The same in plain torch, for at least two tokens."""
    count = metric.shape[1]
    metric = unit(metric)
    scores = torch.bmm(metric[:, ::2], metric[:, 1::2].mT)  # (B, ceil(N/2), floor(N/2))
    if prefix:
        scores[:, : (prefix + 1) // 2] = -torch.inf
    if prefix > 1:
        scores[:, :, : prefix // 2] = -torch.inf
    order = descending(scores.amax(-1))
    place = 2 * order
    source, unmerged = place[:, :r], place[:, r:]
    if prefix:
        unmerged = unmerged.sort(-1).values
    odd = torch.arange(1, count, 2, device=metric.device).expand(metric.shape[0], -1)
    # the maximum alone is much cheaper than its place, which only the sources need
    into = rows.take(scores, order[:, :r]).argmax(-1)
    if prefix < 2:
        return Matching(torch.cat([unmerged, odd], 1), source, unmerged.shape[1] + into)
    keep, places = _interleave(unmerged, odd, prefix)
    return Matching(keep, source, places[into])


@torch.no_grad()
def every_kth(metric: Tensor, k: int) -> Matching:
    """ToMe's k-th matching: every k-th token stays, all others flow into the most similar of them.

    Args:
        metric: (B, N, c); trailing tokens beyond a multiple of k are dropped.
        k: at least 1; positions k-1, 2k-1, ... are the destinations.

    Returns:
        A matching with M = N // k.
    """
    batch, count, _ = metric.shape
    count -= count % k
    positions = torch.arange(count, device=metric.device)
    stays = positions % k == k - 1
    metric = unit(metric[:, :count])
    keep = positions[k - 1 :: k]
    source = positions[~stays] if k > 1 else positions[:0]
    into = (metric[:, source] @ metric[:, keep].mT).max(-1).indices
    return Matching(keep.expand(batch, -1), source.expand(batch, -1), into)


@torch.no_grad()
def energy(units: Tensor, margin: float, alpha: float = 1.0) -> Tensor:
    """PiToMe's energy: mean over all tokens j of ELU(cos(i, j) - margin) (Tran et al. 2024, eq. 4).

    High energy marks a member of a large group of similar tokens, low energy an isolated one.

    Args:
        units: (B, T, c), rows of :func:`unit`.
        margin: similarity above which a neighbour counts in full.
        alpha: saturation of the ELU below the margin.

    Returns:
        (B, T).
    """
    cosine = torch.bmm(units, units.mT)
    full = units.dtype in (torch.float32, torch.float64)
    if not full or units.device.type != "cpu" or torch.compiler.is_compiling():
        return F.elu(cosine.sub_(margin), alpha=alpha, inplace=True).mean(-1)
    # With z = min(cos, margin), ELU(cos - margin) = cos - z + alpha (exp(z - margin) - 1). The
    # expm1 inside torch's ELU takes six times as long on a CPU as an exp, whose rounding near
    # zero is nothing beside the mean; and the sum of the cosines needs no pass over them.
    total = torch.bmm(units, units.sum(1, keepdim=True).mT)[..., 0]
    total -= cosine.clamp_(max=margin).sum(-1)
    total.add_(cosine.exp_().sum(-1), alpha=alpha * math.exp(-margin))
    return total.mul_(1 / units.shape[1]).sub_(alpha)


@torch.no_grad()
def gaussian_energy(units: Tensor, margin: float) -> Tensor:
    """PiToMe's energy for text: mean Gaussian kernel of 1 - cos(i, j) with width 1 - margin.

    Args:
        units: (B, T, c), rows of :func:`unit`.
        margin: below 1.

    Returns:
        (B, T).
    """
    width = 1.0 - margin
    distance = (1.0 - torch.bmm(units, units.mT)) / width
    return distance.square_().mul_(-0.5).exp_().mean(-1) / (width * (2 * torch.pi) ** 0.5)


def _flow(rest: Tensor, a: Tensor, b: Tensor, into: Tensor, prefix: int) -> Matching:
    """Tokens `a` flow into `b` at the places `into`; prefix and `rest` stay in front of `b`."""
    front = torch.arange(prefix, device=rest.device).expand(rest.shape[0], -1)
    return Matching(torch.cat([front, rest, b], 1), a, into + (prefix + rest.shape[1]))


@torch.no_grad()
def energy_pairs(units: Tensor, score: Tensor, r: int, prefix: int = 0) -> Matching:
    """PiToMe: of the 2r tokens with the highest energy, each second one flows into its best other.

    Args:
        units: (B, T, c), rows of :func:`unit`, of the tokens behind the prefix.
        score: (B, T), their energy.
        r: tokens to remove, at most half of T.
        prefix: number of leading tokens that are left alone.

    Returns:
        A matching of prefix + T tokens, r fewer afterwards: prefix, the rest by descending energy,
        then the destinations.
    """
    order = descending(score)
    high = rows.take(units, order[:, : 2 * r])
    into = torch.bmm(high[:, ::2], high[:, 1::2].mT).argmax(-1)
    place = order + prefix
    pairs = place[:, : 2 * r]
    return _flow(place[:, 2 * r :], pairs[:, ::2], pairs[:, 1::2], into, prefix)


@torch.no_grad()
def energy_bipartite(units: Tensor, score: Tensor, r: int, prefix: int = 0) -> Matching:
    """PiToMe's bipartite variant: ToMe's matching over tokens ordered by energy.

    Args:
        units: (B, T, c), rows of :func:`unit`, of the tokens behind the prefix.
        score: (B, T), their energy.
        r: tokens to remove, at most half of T.
        prefix: number of leading tokens that are left alone.

    Returns:
        A matching of prefix + T tokens, r fewer afterwards: prefix, unmerged by descending
        similarity, then the destinations.
    """
    order = descending(score)
    place = order + prefix
    a, b = place[:, ::2], place[:, 1::2]
    ordered = rows.take(units, order)
    similarity = torch.bmm(ordered[:, ::2], ordered[:, 1::2].mT)
    ranks = descending(similarity.amax(-1))
    source, unmerged = ranks[:, :r], ranks[:, r:]
    into = rows.take(similarity, source).argmax(-1)
    return _flow(_at(a, unmerged), _at(a, source), b, into, prefix)


@torch.no_grad()
def energy_halves(units: Tensor, score: Tensor, r: int, prefix: int = 0) -> Matching:
    """PiToMe for text: the r tokens of highest energy flow into the next r.

    Args:
        units: (B, T, c), rows of :func:`unit`, of the tokens behind the prefix.
        score: (B, T), their energy.
        r: tokens to remove, at most half of T.
        prefix: number of leading tokens that are left alone.

    Returns:
        A matching of prefix + T tokens, r fewer afterwards: prefix, the rest by descending energy,
        then the destinations.
    """
    order = descending(score)
    high = rows.take(units, order[:, : 2 * r])
    into = torch.bmm(high[:, :r], high[:, r:].mT).argmax(-1)
    place = order + prefix
    return _flow(place[:, 2 * r :], place[:, :r], place[:, r : 2 * r], into, prefix)


def by_energy(
    metric: Tensor, r: int, prefix: int, margin: float, kind: str, alpha: float = 1.0
) -> Matching:
    """PiToMe's matching of r tokens.

    Args:
        metric: (B, N, c).
        r: tokens to remove, at most half of those behind the prefix.
        prefix: leading tokens that are left alone.
        margin: similarity from which a neighbour counts in full.
        kind: "pitome" (:func:`energy_pairs`), "bipartite" (:func:`energy_bipartite`) or "text"
            (:func:`energy_halves`).
        alpha: of the ELU; not used for text.

    Returns:
        A matching with M = N - r.
    """
    if kind == "pitome" and native.serves(metric):
        return Matching(*native.energy_pairs(metric, margin, alpha, r, prefix))
    with torch.no_grad():
        units = unit(metric[:, prefix:])
        if kind == "text":
            return energy_halves(units, gaussian_energy(units, margin), r, prefix)
        pick = energy_pairs if kind == "pitome" else energy_bipartite
        return pick(units, energy(units, margin, alpha), r, prefix)


class Reserved(NamedTuple):
    """Tokens that neither leave nor receive.

    prefix: leading ones.
    suffix: trailing ones.
    also: (B,) int64, one more position in each item, behind the prefix and before the suffix; None
        for no other.
    """

    prefix: int = 0
    suffix: int = 0
    also: Tensor | None = None

    def capped(self, r: int, count: int) -> int:
        """At most half of the tokens that are not reserved."""
        reserved = self.prefix + self.suffix + (self.also is not None)
        return max(0, min(r, (count - reserved) // 2))

    def mask(self, batch: int, count: int, device: torch.device) -> Tensor:
        """(B, N) bool, True where a token is reserved."""
        place = torch.arange(count, device=device)
        held = ((place < self.prefix) | (place >= count - self.suffix)).expand(batch, -1)
        return held if self.also is None else held | (place == self.also[:, None])


@torch.no_grad()
def complete_graph(metric: Tensor, held: Tensor) -> Tensor:
    """Cosine of every pair of tokens; -inf on the diagonal and wherever a token is held.

    Args:
        metric: (B, N, c).
        held: (B, N) bool, True for tokens that take no part.

    Returns:
        (B, N, N), at least float32.
    """
    metric = unit(metric.to(torch.promote_types(metric.dtype, torch.float32)))
    graph = metric @ metric.mT
    itself = torch.eye(metric.shape[1], dtype=torch.bool, device=metric.device)
    return graph.masked_fill_(itself | held[:, :, None] | held[:, None], -torch.inf)


@torch.no_grad()
def complete_order(graph: Tensor, importance: Tensor | None, *, stable: bool = True) -> Tensor:
    """CrossGET's order in which tokens give way (Shi et al. 2024, sec. 3.2 and 3.3).

    Tokens are ranked by the similarity of their best partner, and each may look only at tokens
    ranked behind it, which keeps two tokens from choosing each other. The order is that of
    importance minus the similarity of the best partner in sight, lowest first.

    Args:
        graph: (B, N, N) of :func:`complete_graph`.
        importance: (B, N); None when all tokens matter alike.
        stable: ties by position. Two tokens that are each other's best partner always tie in the
            ranking; False leaves their order, like the official code, to the sort of the machine.

    Returns:
        (B, N) int64; tokens without a partner in sight come last.
    """
    batch, count, _ = graph.shape
    if stable:  # a matrix product may round the two directions of a pair differently
        graph = torch.maximum(graph, graph.mT)
    best = graph.amax(-1)
    order = descending(best) if stable else best.argsort(dim=-1, descending=True)
    place = torch.arange(count, device=graph.device).expand(batch, -1)
    rank = torch.zeros_like(order).scatter(1, order, place)
    sight = graph.masked_fill(rank[:, None] <= rank[:, :, None], -torch.inf).amax(-1)
    priority = -sight if importance is None else importance - sight
    return descending(-priority) if stable else priority.argsort(dim=-1)


def complete(
    metric: Tensor,
    r: int,
    importance: Tensor | None = None,
    reserved: Reserved | None = None,
    *,
    stable: bool = True,
) -> Matching:
    """CrossGET's complete-graph soft matching: any token may flow into any other.

    The r tokens that give way first flow each into the most similar of the others. The tokens
    that stay keep their order, so that causal hosts may follow.

    Args:
        metric: (B, N, c).
        r: tokens to remove; more than half of those not reserved are never removed.
        importance: (B, N), see :func:`guided_importance`; None when all tokens matter alike.
        reserved: tokens that are left alone; None for none.
        stable: see :func:`complete_order`.

    Returns:
        A matching with M = N - r; sources in the order in which they give way.
    """
    batch, count, _ = metric.shape
    reserved = Reserved() if reserved is None else reserved
    r = reserved.capped(r, count)
    if stable and native.serves(metric, *([] if importance is None else [importance])):
        units = unit(metric)
        last = count - reserved.suffix
        return Matching(
            *native.complete(
                torch.bmm(units, units.mT), importance, r, reserved.prefix, last, reserved.also
            )
        )
    with torch.no_grad():
        graph = complete_graph(metric, reserved.mask(batch, count, metric.device))
        order = complete_order(graph, importance, stable=stable)
        source, keep = order[:, :r], order[:, r:].sort(-1).values
        near = rows.take(graph, source).gather(2, keep[:, None].expand(-1, r, -1))
        return Matching(keep, source, near.argmax(-1))


@torch.no_grad()
def guided_importance(metric: Tensor, guide: Tensor) -> Tensor:
    """Cosine of each token with a guide, such as the query of a token of another modality.

    Args:
        metric: (B, N, c).
        guide: (B, 1, c).

    Returns:
        (B, N), at least float32.
    """
    dtype = torch.promote_types(metric.dtype, torch.float32)
    return (unit(metric.to(dtype)) @ unit(guide.to(dtype)).mT)[..., 0]


@torch.no_grad()
def guided_shares(matching: Matching, importance: Tensor) -> Tensor:
    """Softmax of the importance of each source and its destination.

    Args:
        matching: of N tokens.
        importance: (B, N).

    Returns:
        (B, R, 2): share of the source, share of the destination.
    """
    into = importance.gather(1, matching.keep).gather(1, matching.into)
    return torch.stack([importance.gather(1, matching.source), into], -1).softmax(-1)
