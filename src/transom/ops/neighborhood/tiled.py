"""Tiles of queries against the box of keys that any of them sees: O(N·K) work and memory.

The queries of a tile share most of their keys, and these form a box: a strided slice of the grid.
One tile is therefore an ordinary small attention over its box of k and v, with a mask for the part
of the box that a single query does not see. No index table, no copy of a window per query; only
a few tiles live at a time, and one in the backward pass, which makes its weights once more.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.ops.neighborhood.rule import Axis

# One tile costs about as much as this many multiply-adds beside its own; below this many queries
# a matrix product runs at half its speed. Both measured on one core of a server CPU.
_TILE_COST = 7e5
_HALF_SPEED = 12
# Tiles of one kind go through one call, so that threads share tiles and not the rows of one. Their
# copies of keys and values hold this many numbers at most, or those of one tile.
_ROOM = 1 << 17


@dataclass(frozen=True)
class Span:
    """A tile along one axis.

    Attributes:
        queries: where they lie.
        keys: where the box of their keys lies.
        seen: first key and the one behind the last inside the box, for each query.
    """

    queries: slice
    keys: slice
    seen: tuple[tuple[int, int], ...]

    @property
    def box(self) -> int:
        """Keys in the box."""
        return max(stop for _, stop in self.seen)

    @property
    def full(self) -> bool:
        """Whether every query sees the whole box."""
        return all(pair == (0, self.box) for pair in self.seen)

    def mask(self, device: torch.device) -> Tensor:
        """(queries, keys) bool."""
        key = torch.arange(self.box, device=device)
        return torch.stack([(key >= start) & (key < stop) for start, stop in self.seen])


def spans(axis: Axis, size: int) -> tuple[Span, ...]:
    """The axis cut into tiles of about `size` queries, each inside one dilation group."""
    found = []
    for remainder in range(axis.dilation):
        n = axis.group(remainder)
        count = -(-n // size)
        edges = [n * j // count for j in range(count + 1)]
        for first, behind in itertools.pairwise(edges):
            seen = [axis.window(i, n) for i in range(first, behind)]
            start, stop = seen[0][0], seen[-1][1]
            found.append(
                Span(
                    _strided(remainder, first, behind, axis.dilation),
                    _strided(remainder, start, stop, axis.dilation),
                    tuple((a - start, b - start) for a, b in seen),
                )
            )
    return tuple(found)


def _strided(remainder: int, start: int, stop: int, step: int) -> slice:
    return slice(remainder + start * step, remainder + (stop - 1) * step + 1, step)


def sizes(axes: tuple[Axis, ...], heads: int, width: int, extra: int = 0) -> tuple[int, ...]:
    """Queries of a tile along every axis, by the cheapest of a few dozen cuts.

    The batch is not asked, so that an image is cut the same whatever comes with it.

    Args:
        axes: the windows.
        heads: number of them.
        width: of a head.
        extra: keys that every query sees as well.
    """
    find = _sizes if torch.compiler.is_compiling() else _remembered_sizes
    return find(axes, heads, width, extra)


def _sizes(axes: tuple[Axis, ...], heads: int, width: int, extra: int) -> tuple[int, ...]:
    choices = []
    for axis in axes:
        n = axis.group(0)
        cuts = {
            -(-n // count) for count in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128) if count <= n
        }
        cuts |= {size for size in (2, 4, 8, 16, 32, 64, axis.stride) if size <= n}
        choices.append(sorted(cuts))
    return min(
        itertools.product(*choices),
        key=lambda cut: _cost(axes, cut, heads, width, extra),
    )


_remembered_sizes = functools.lru_cache(maxsize=64)(_sizes)


def _cost(axes: Sequence[Axis], cut: Sequence[int], heads: int, width: int, extra: int) -> float:
    tiles, queries, keys = 1, 1, 1
    for axis, size in zip(axes, cut, strict=True):
        n = axis.group(0)
        tiles *= axis.dilation * -(-n // size)
        queries *= size
        keys *= min(size + axis.kernel - 1, n)
    return tiles * (_TILE_COST + 2 * heads * (queries + _HALF_SPEED) * (keys + extra) * width)


@dataclass(frozen=True)
class Tile:
    """One tile of the grid.

    Attributes:
        spans: one an axis.
        kind: tiles of one kind have the same mask.
    """

    spans: tuple[Span, ...]

    @property
    def kind(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """What the mask depends on."""
        return tuple(span.seen for span in self.spans)

    @property
    def queries(self) -> tuple[slice, ...]:
        """Index of the queries into (B, *S, ...)."""
        return (slice(None), *(span.queries for span in self.spans))

    @property
    def keys(self) -> tuple[slice, ...]:
        """Index of the box into (B, *S, ...)."""
        return (slice(None), *(span.keys for span in self.spans))


def plan(axes: tuple[Axis, ...], cut: tuple[int, ...]) -> tuple[Tile, ...]:
    """All tiles of the grid."""
    lines = [spans(axis, size) for axis, size in zip(axes, cut, strict=True)]
    return tuple(Tile(one) for one in itertools.product(*lines))


_remembered = functools.lru_cache(maxsize=32)(plan)


def tiles(axes: tuple[Axis, ...], cut: tuple[int, ...]) -> tuple[Tile, ...]:
    """:func:`plan`, remembered from call to call."""
    return plan(axes, cut) if torch.compiler.is_compiling() else _remembered(axes, cut)


Masks = dict[Any, Tensor | None]


def masks(
    axes: tuple[Axis, ...],
    cut: tuple[int, ...],
    extra: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Masks:
    """The additive mask (Q, E + R) of each kind of tile; None where everything is seen."""
    kinds = {tile.kind: tile for tile in tiles(axes, cut)}
    return {kind: _mask(tile, extra, dtype, device) for kind, tile in kinds.items()}


def _mask(tile: Tile, extra: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    if all(span.full for span in tile.spans):
        return None
    seen = torch.ones(1, 1, dtype=torch.bool, device=device)
    for span in tile.spans:
        one = span.mask(device)
        seen = (seen[:, None, :, None] & one[None, :, None, :]).flatten(2).flatten(0, 1)
    hidden = F.pad(~seen, (extra, 0))
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill(hidden, -torch.inf)


@functools.lru_cache(maxsize=16)
def _remembered_masks(
    axes: tuple[Axis, ...],
    cut: tuple[int, ...],
    extra: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Masks:
    with torch.inference_mode(False):  # they outlive the call
        return masks(axes, cut, extra, dtype, device)


@dataclass(frozen=True)
class Inputs:
    """What a tile reads: q, k, v (B, *S, H, d) and the extra keys and values (B, E, H, d)."""

    q: Tensor
    k: Tensor
    v: Tensor
    extra_k: Tensor | None
    extra_v: Tensor | None

    @property
    def extra(self) -> int:
        """Number of extra keys."""
        return 0 if self.extra_k is None else self.extra_k.shape[1]

    def queries(self, *tiles: Tile, of: Tensor | None = None) -> Tensor:
        """(T·B, H, Q, d) of q, or of another tensor of its layout, for T tiles of one kind."""
        x = self.q if of is None else of
        return _stacked([x[tile.queries] for tile in tiles]).transpose(1, 2)

    def keys(self, *tiles: Tile) -> Tensor:
        """(T·B, H, E + R, d)."""
        return self._box(self.k, self.extra_k, tiles)

    def values(self, *tiles: Tile) -> Tensor:
        """(T·B, H, E + R, d)."""
        return self._box(self.v, self.extra_v, tiles)

    def _box(self, x: Tensor, extra: Tensor | None, tiles: Sequence[Tile]) -> Tensor:
        box = _stacked([x[tile.keys] for tile in tiles])
        if extra is not None:
            box = torch.cat([extra.repeat(len(tiles), 1, 1, 1), box], 1)
        share = self.q.shape[-2] // x.shape[-2]
        return (box if share == 1 else box.repeat_interleave(share, 2)).transpose(1, 2)

    def groups(
        self, axes: tuple[Axis, ...], dtype: torch.dtype, room: int
    ) -> Iterator[tuple[tuple[Tile, ...], Tensor | None]]:
        """Tiles of one kind with their mask, as many as have room for their keys and values."""
        steps = sorted(self.steps(axes, dtype), key=lambda step: step[0].kind)
        for _, same in itertools.groupby(steps, key=lambda step: step[0].kind):
            found = list(same)
            size = self.k[found[0][0].keys].numel() + self.v[found[0][0].keys].numel()
            count = max(1, room // max(1, size))
            for first in range(0, len(found), count):
                some = found[first : first + count]
                yield tuple(tile for tile, _ in some), some[0][1]

    def steps(
        self, axes: tuple[Axis, ...], dtype: torch.dtype
    ) -> Iterator[tuple[Tile, Tensor | None]]:
        """Every tile with its mask."""
        cut = sizes(axes, self.q.shape[-2], self.q.shape[-1], self.extra)
        # tensors of a tracer or of another mode must not outlive their call
        plain = type(self.q) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
        make = _remembered_masks if plain else masks
        made = make(axes, cut, self.extra, dtype, self.q.device)
        for tile in tiles(axes, cut):
            yield tile, made[tile.kind]


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """T parts (B, *S, H, d) of the grid as (T·B, S, H, d); one that is whole in memory as it is."""
    x = parts[0] if len(parts) == 1 else torch.stack(list(parts)).flatten(0, 1)
    return x.flatten(1, -3)


def forward(
    given: Inputs, axes: tuple[Axis, ...], scale: float, lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Outputs (B, *S, H, d) and, when asked for, log-sum-exp (B, *S, H) in at least float32."""
    q, v = given.q, given.v
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    sums = q.new_empty(q.shape[:-1], dtype=_wide(q.dtype)) if lse else None
    # where logits are made, they are what takes room: one tile at a time
    dtype, room = (q.dtype, _ROOM) if sums is None else (sums.dtype, 0)
    for group, mask in given.groups(axes, dtype, room):
        query, key, value = given.queries(*group), given.keys(*group), given.values(*group)
        if sums is None:
            y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        else:
            logits = _logits(query, key, mask, scale)
            total = logits.logsumexp(-1)
            y = (logits - total[..., None]).exp_().to(value.dtype) @ value
            _put(sums, group, total.transpose(1, 2))
        _put(out, group, y.transpose(1, 2))
    return out, sums


def _put(target: Tensor, group: Sequence[Tile], y: Tensor) -> None:
    """What was computed for tiles, (T·B, Q, ...), to its place in (B, *S, ...)."""
    for tile, part in zip(group, y.chunk(len(group)), strict=True):
        place = target[tile.queries]
        place.copy_(part.reshape(place.shape))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _logits(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    wide = _wide(query.dtype)
    logits = (query.to(wide) * scale) @ key.to(wide).mT
    return logits if mask is None else logits + mask


class Tiled(torch.autograd.Function):
    """The same with a backward pass that keeps q, k, v and nothing of size N·K."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extra_k: Tensor | None,
        extra_v: Tensor | None,
        axes: tuple[Axis, ...],
        scale: float,
        lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(q, k, v, extra_k, extra_v)
        ctx.axes, ctx.scale = axes, scale
        return forward(Inputs(q, k, v, extra_k, extra_v), axes, scale, lse)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        given, wide = Inputs(*saved), _wide(saved[0].dtype)
        gradients = [
            None if t is None else torch.zeros(t.shape, dtype=wide, device=t.device) for t in saved
        ]
        dq, *d_boxes = gradients
        assert dq is not None
        for tile, mask in given.steps(ctx.axes, wide):
            query, key = given.queries(tile).to(wide), given.keys(tile).to(wide)
            value, dy = given.values(tile).to(wide), given.queries(tile, of=d_out).to(wide)
            weight = _logits(query, key, mask, ctx.scale).softmax(-1)  # (B, H, Q, E + R)
            d_value = weight.mT @ dy
            d_weight = dy @ value.mT
            mean = (weight * d_weight).sum(-1, keepdim=True)
            if d_lse is not None:
                mean = mean - given.queries(tile, of=d_lse[..., None]).to(wide)
            d_logits = d_weight.sub_(mean).mul_(weight).mul_(ctx.scale)
            part = (d_logits @ key).transpose(1, 2)
            dq[tile.queries] = part.reshape(dq[tile.queries].shape)
            d_key = d_logits.mT @ query
            for box, extra, change in zip(d_boxes[:2], d_boxes[2:], (d_key, d_value), strict=True):
                _give(box, extra, change.transpose(1, 2), tile, given.extra)
        made = zip(saved, gradients, strict=True)
        return *(None if g is None else g.to(t.dtype) for t, g in made), None, None, None


def _give(box: Tensor | None, extra: Tensor | None, change: Tensor, tile: Tile, count: int) -> None:
    """Add the gradient (B, E + R, H, d) of a tile's keys to where they came from."""
    assert box is not None
    change = change.unflatten(2, (box.shape[-2], -1)).sum(3)
    if extra is not None:
        extra += change[:, :count]
    target = box[tile.keys]
    target += change[:, count:].reshape(target.shape)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axes: tuple[Axis, ...],
    scale: float,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    *,
    lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Twin of :func:`transom.ops.neighborhood.reference.attend`, one tile at a time.

    Args:
        q, k, v: (B, *S, H, d), heads of k and v may be fewer.
        axes: the windows; S are their lengths.
        scale: of the logits.
        extra_k, extra_v: (B, E, H, d) that every query sees as well.
        lse: whether the log-sum-exp is wanted.

    Returns:
        (B, *S, H, d) and the log-sum-exp (B, *S, H), or None.
    """
    given = [t for t in (q, k, v, extra_k, extra_v) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return Tiled.apply(q, k, v, extra_k, extra_v, axes, scale, lse)
    return forward(Inputs(q, k, v, extra_k, extra_v), axes, scale, lse)
