"""Compiled CPU kernels of token reduction. :mod:`transom.ops.native` decides when they run.

Each does in one pass over arrays in the cache what its twin in plain torch does in several small
operators. One thread, float32, C-contiguous unless said; T tokens of c channels, positions int64.
Sums may be taken in any order; not-a-number and infinity are kept as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Places = NDArray[np.int64]
F = TypeVar("F", bound=Callable[..., Any])

ONE, HALF, SIXTH = np.float32(1), np.float32(1 / 2), np.float32(1 / 6)
A24TH, A120TH, A720TH = np.float32(1 / 24), np.float32(1 / 120), np.float32(1 / 720)
EIGHTH, TINY = np.float32(1 / 8), np.float32(1e-12)


def compiled(function: F) -> F:
    """The function as machine code, kept on disk where there is a place for it."""
    loose = {"contract", "nsz", "reassoc"}
    try:
        made: Any = njit(cache=True, fastmath=loose, nogil=True)(function)
    except RuntimeError:  # no folder that could be written
        made = njit(fastmath=loose, nogil=True)(function)
    kernel: F = made
    return kernel


@compiled
def unit(metric: Floats) -> Floats:
    """Rows of metric (T, c) scaled to length one; a zero row stays zero."""
    out = np.empty_like(metric)
    for n in range(metric.shape[0]):
        row, own = out[n], metric[n]
        square = np.float32(0)
        for c in range(metric.shape[1]):
            square += own[c] * own[c]
        scale = ONE / max(np.float32(math.sqrt(square)), TINY)
        for c in range(metric.shape[1]):
            row[c] = own[c] * scale
    return out


@compiled
def columns(rows: Floats, first: int, step: int) -> Floats:
    """Every step-th of rows (T, c) from the first on, as columns."""
    count = (rows.shape[0] - first + step - 1) // step
    out = np.empty((rows.shape[1], count), np.float32)
    for j in range(count):
        for c in range(rows.shape[1]):
            out[c, j] = rows[first + step * j, c]
    return out


@compiled
def two_products(a: Floats, b: Floats, t: Floats, x: Floats, y: Floats) -> None:
    """Products of rows a and b (c,) with the columns of t (c, T), into x and y.

    Two rows share what is loaded of t, and four channels what is loaded of x and y.
    """
    width, count = t.shape
    for j in range(count):
        x[j] = 0
        y[j] = 0
    whole = width - width % 4
    for c in range(0, whole, 4):
        a0, a1, a2, a3 = a[c], a[c + 1], a[c + 2], a[c + 3]
        b0, b1, b2, b3 = b[c], b[c + 1], b[c + 2], b[c + 3]
        t0, t1, t2, t3 = t[c], t[c + 1], t[c + 2], t[c + 3]
        for j in range(count):
            x[j] += a0 * t0[j] + a1 * t1[j] + a2 * t2[j] + a3 * t3[j]
            y[j] += b0 * t0[j] + b1 * t1[j] + b2 * t2[j] + b3 * t3[j]
    for c in range(whole, width):
        t0 = t[c]
        for j in range(count):
            x[j] += a[c] * t0[j]
            y[j] += b[c] * t0[j]


@compiled
def best_column(rows: Floats, places: Places, t: Floats, best: Floats, into: Places) -> None:
    """The column of t (c, T) most similar to each of rows[places] (K, c): how much, and which."""
    count = places.shape[0]
    x, y = np.empty(t.shape[1], np.float32), np.empty(t.shape[1], np.float32)
    for i in range(0, count, 2):
        k = min(i + 1, count - 1)
        two_products(rows[places[i]], rows[places[k]], t, x, y)
        for q in range(2):
            products, at = (x, i) if q == 0 else (y, k)
            most, place = products[0], 0
            for j in range(products.shape[0]):
                if products[j] > most:
                    most, place = products[j], j
            best[at], into[at] = most, place


@compiled
def list_true(chosen: NDArray[np.bool_], step: int, out: Places) -> None:
    """Places of what is true, times step, from the front of out on."""
    found = 0
    for i in range(chosen.shape[0]):
        if chosen[i]:
            out[found] = step * i
            found += 1


@compiled
def bipartite_one(
    metric: Floats, r: int, prefix: int, keep: Places, source: Places, into: Places
) -> None:
    """:func:`bipartite` of one item."""
    units = unit(metric)
    count = units.shape[0]
    even, odd = (count + 1) // 2, count // 2
    best, partner = np.empty(even, np.float32), np.empty(even, np.int64)
    best_column(units, np.arange(0, count, 2), columns(units, 1, 2), best, partner)
    for i in range(even):
        best[i] = -best[i]
    best[: (prefix + 1) // 2] = np.inf
    order = np.argsort(best, kind="mergesort")  # stable
    stays = np.ones(even, np.bool_)
    for q in range(r):
        i = order[q]
        stays[i] = False
        source[q], into[q] = 2 * i, even - r + partner[i]
    if prefix:
        list_true(stays, 2, keep)
    else:
        for q in range(r, even):
            keep[q - r] = 2 * order[q]
    for j in range(odd):
        keep[even - r + j] = 2 * j + 1


@compiled
def bipartite(
    metric: Floats, r: int, prefix: int, keep: Places, source: Places, into: Places
) -> None:
    """Twin of :func:`transom.ops.matching.bipartite` for at most one prefix token."""
    for b in range(metric.shape[0]):
        bipartite_one(metric[b], r, prefix, keep[b], source[b], into[b])


@compiled
def energy(units: Floats, margin: float, alpha: float, out: Floats) -> None:
    """Twin of :func:`transom.ops.matching.energy`, for cosines and margins from -1 to 1.

    Every row is summed by itself, though the matrix is symmetric: equal tokens get equal energies.
    """
    count = units.shape[0]
    t = columns(units, 0, 1)
    x, y = np.empty(count, np.float32), np.empty(count, np.float32)
    border, slope, part = np.float32(margin), np.float32(alpha), ONE / np.float32(count)
    for i in range(0, count, 2):
        k = min(i + 1, count - 1)
        two_products(units[i], units[k], t, x, y)
        for q in range(2):
            products, at = (x, i) if q == 0 else (y, k)
            total = np.float32(0)
            for j in range(count):
                above = products[j] - border
                below = above if above < 0 else np.float32(0)
                # exp(below) for -2 <= below <= 0: a series of exp(below / 8), to the eighth power
                w = below * EIGHTH
                e = A24TH + w * (A120TH + w * A720TH)
                e = ONE + w * (ONE + w * (HALF + w * (SIXTH + w * e)))
                e *= e
                e *= e
                total += above - below + slope * (e * e - ONE)
            out[at] = total * part


@compiled
def energy_pairs_one(
    metric: Floats,
    margin: float,
    alpha: float,
    r: int,
    prefix: int,
    keep: Places,
    source: Places,
    into: Places,
) -> None:
    """:func:`energy_pairs` of one item."""
    units = unit(metric[prefix:])
    count = units.shape[0]
    score = np.empty(count, np.float32)
    energy(units, margin, alpha, score)
    order = np.argsort(-score, kind="mergesort")  # stable
    givers, takers = order[: 2 * r : 2].copy(), order[1 : 2 * r : 2].copy()
    t = np.empty((units.shape[1], r), np.float32)
    for j in range(r):
        for c in range(units.shape[1]):
            t[c, j] = units[takers[j], c]
    best_column(units, givers, t, np.empty(r, np.float32), into)
    rest = count - 2 * r
    for i in range(prefix):
        keep[i] = i
    for i in range(rest):
        keep[prefix + i] = prefix + order[2 * r + i]
    for i in range(r):
        keep[prefix + rest + i] = prefix + takers[i]
        source[i] = prefix + givers[i]
        into[i] += prefix + rest


@compiled
def energy_pairs(
    metric: Floats,
    margin: float,
    alpha: float,
    r: int,
    prefix: int,
    keep: Places,
    source: Places,
    into: Places,
) -> None:
    """Twin of :func:`transom.ops.matching.by_energy` for its kind "pitome"."""
    for b in range(metric.shape[0]):
        energy_pairs_one(metric[b], margin, alpha, r, prefix, keep[b], source[b], into[b])


@compiled
def complete_one(
    graph: Floats,
    first: int,
    last: int,
    also: int,
    importance: Floats,
    keep: Places,
    source: Places,
    into: Places,
) -> None:
    """:func:`complete` of one item."""
    count, gone = graph.shape[0], source.shape[0]
    nothing = np.float32(-np.inf)
    held = np.ones(count, np.bool_)
    held[first:last] = False
    if also >= 0:
        held[also] = True
    best, sight = np.empty(count, np.float32), np.empty(count, np.float32)
    for i in range(count):
        for j in range(i):  # the two directions of a pair may have been rounded differently
            similar = max(graph[i, j], graph[j, i])
            graph[i, j] = graph[j, i] = nothing if held[i] or held[j] else similar
        graph[i, i] = nothing
    for i in range(count):
        best[i] = nothing
        for j in range(count):
            best[i] = max(best[i], graph[i, j])
    rank = np.empty(count, np.int64)
    order = np.argsort(-best, kind="mergesort")  # stable
    for i in range(count):
        rank[order[i]] = i
    for i in range(count):
        own, most = rank[i], nothing
        for j in range(count):
            if rank[j] > own and graph[i, j] > most:
                most = graph[i, j]
        sight[i] = importance[i] - most
    order = np.argsort(sight, kind="mergesort")
    stays = np.ones(count, np.bool_)
    for q in range(gone):
        source[q] = order[q]
        stays[order[q]] = False
    list_true(stays, 1, keep)
    for q in range(gone):
        row, place = graph[source[q]], 0
        for k in range(keep.shape[0]):
            if row[keep[k]] > row[keep[place]]:
                place = k
        into[q] = place


@compiled
def complete(
    graph: Floats,
    first: int,
    last: int,
    also: Places,
    importance: Floats,
    keep: Places,
    source: Places,
    into: Places,
) -> None:
    """Twin of :func:`transom.ops.matching.complete` behind the product of the units.

    Tokens before the first, from the last on and at also (-1 for none) take no part. The graph
    is written over.
    """
    for b in range(graph.shape[0]):
        complete_one(graph[b], first, last, also[b], importance[b], keep[b], source[b], into[b])


@compiled
def merge(
    x: Floats,
    size: Floats,
    keep: Places,
    source: Places,
    into: Places,
    out: Floats,
    total: Floats,
) -> None:
    """Twin of :func:`transom.ops.merging.merge_by_size`; sizes (B, N, 1)."""
    for b in range(x.shape[0]):
        stays, gone = keep[b], source[b]
        for m in range(stays.shape[0]):
            total[b, m, 0] = size[b, stays[m], 0]
            row, own = out[b, m], x[b, stays[m]]
            for c in range(row.shape[0]):
                row[c] = own[c]
        for q in range(gone.shape[0]):
            total[b, into[b, q], 0] += size[b, gone[q], 0]
        for q in range(gone.shape[0]):
            m = into[b, q]
            part = size[b, gone[q], 0] / total[b, m, 0]
            row, own, more = out[b, m], x[b, stays[m]], x[b, gone[q]]
            for c in range(row.shape[0]):
                row[c] += (more[c] - own[c]) * part
