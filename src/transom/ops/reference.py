"""Plain, short, slow twins of the fast paths in `ops`; tests hold the two against each other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from transom.ops.matching import Matching


def take(x: Tensor, index: Tensor) -> Tensor:
    """Twin of :func:`transom.ops.rows.take`."""
    return torch.stack([item[rows] for item, rows in zip(x, index, strict=True)])


def membership(matching: Matching, count: int) -> Tensor:
    """0/1 matrix (B, M, N): does old token n belong to new token m?"""
    target = matching.target(count)
    kept = matching.keep.shape[1]
    return (target[:, None] == torch.arange(kept, device=target.device)[None, :, None]).float()


def merge(x: Tensor, matching: Matching, size: Tensor | None = None) -> Tensor:
    """Twin of :func:`transom.ops.merging.merge` with mode "mean": one matrix product."""
    weight = membership(matching, x.shape[1]).to(x.dtype)
    if size is not None:
        weight = weight * size.mT
    return (weight @ x) / weight.sum(-1, keepdim=True)


def complete(metric: Tensor, r: int, importance: Tensor, held: Tensor) -> list[tuple[int, int]]:
    """Twin of :func:`transom.ops.matching.complete` for one item: (source, destination) pairs.

    Args:
        metric: (N, c).
        r: tokens to remove.
        importance: (N,).
        held: (N,) bool, tokens that take no part.
    """
    rows = torch.nn.functional.normalize(metric, dim=-1)
    free = [i for i in range(len(metric)) if not held[i]]
    near = {(i, j): float(rows[i] @ rows[j]) for i in free for j in free if i < j}
    near |= {(j, i): value for (i, j), value in near.items()}
    best = {i: max(near[i, j] for j in free if j != i) for i in free}
    ranked = sorted(free, key=lambda i: -best[i])
    gives = {
        i: float(importance[i]) - max(near[i, j] for j in ranked[place + 1 :])
        for place, i in enumerate(ranked[:-1])
    }
    sources = sorted(gives, key=lambda i: (gives[i], i))[:r]
    stays = [i for i in free if i not in sources]
    return [(i, max(stays, key=lambda j: (near[i, j], -j))) for i in sources]


def ensemble(x: Tensor, matching: Matching, shares: Tensor, size: Tensor) -> Tensor:
    """Twin of :func:`transom.ops.merging.ensemble`: one pair at a time."""
    out = []
    for b, item in enumerate(x * size):
        kept = item[matching.keep[b]]
        total = size[b][matching.keep[b]]
        for i, (source, into) in enumerate(zip(matching.source[b], matching.into[b], strict=True)):
            of_source, of_target = 2 * shares[b, i]
            change = torch.zeros_like(kept)
            change[into] = of_source * item[source] + (of_target - 1) * item[matching.keep[b][into]]
            more = torch.zeros_like(total)
            more[into] = size[b, source]
            kept, total = kept + change, total + more
        out.append(kept / total)
    return torch.stack(out)


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, record: object = None
) -> Tensor:
    """Twin of :func:`transom.ops.attention.attend`: softmax(q kᵀ scale + bias) v.

    The record is not looked at; it lets this fill the slot `attention`.
    """
    logits = (q @ k.mT) * scale
    if bias is not None:
        logits = logits + bias
    return logits.softmax(-1) @ v


def relative_logits(
    q: Tensor, table: Tensor, queries: Tensor, keys: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Twin of :func:`transom.ops.relative.logits`: one lookup a pair.

    Args:
        q: (..., H, L, d).
        table: (2P, H, d).
        queries, keys: (L,) and (T,) places.
        bias: (2P, H).
    """
    offset = keys[None] - queries[:, None]
    row = (offset + len(table) // 2).clamp(0, len(table) - 1)
    out = torch.einsum("...hld,lthd->...hlt", q, table[row])
    return out if bias is None else out + bias[row].permute(2, 0, 1)


def batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, valid: Tensor | None = None
) -> Tensor:
    """Twin of :func:`transom.ops.token_norm.batch_norm` while training."""
    valid = torch.ones_like(x[..., 0]) if valid is None else valid
    out = torch.zeros_like(x)
    for channel in range(x.shape[-1]):
        values = x[..., channel][valid.bool()]
        normed = (values - values.mean()) / (values.var(correction=0) + eps).sqrt()
        out[..., channel][valid.bool()] = normed * weight[channel] + bias[channel]
    return out


def groups(matching: Matching, item: int) -> list[tuple[int, ...]]:
    """Of one batch item: each new token as its old position, then the sorted ones it took in."""
    keep, source, into = (part[item].tolist() for part in matching)
    members: dict[int, list[int]] = {new: [] for new in range(len(keep))}
    for old, new in zip(source, into, strict=True):
        members[new].append(old)
    return [(keep[new], *sorted(old)) for new, old in members.items()]


def alone(
    match: Callable[[Tensor], Matching], metric: Tensor, valid: Tensor
) -> list[list[tuple[int, ...]]]:
    """Twin of :mod:`transom.ops.padded`: match the real tokens (B, N, c) of each item by itself."""
    found = []
    for item, real in zip(metric, valid, strict=True):
        places = real.nonzero()[:, 0]
        one = groups(match(item[None, places]), 0)
        found.append([tuple(int(places[old]) for old in group) for group in one])
    return found
