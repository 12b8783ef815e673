"""Apply a matching to features: merge rows, and spread them again.

A merge touches only the rows that something flows into: the kept rows are copied and the
differences of the sources added, which is the weighted mean written as an update,
``y = y + sum_i (x_i - y) * s_i / S``. Only `max` needs another reduction.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from transom.ops import native, rows
from transom.ops.matching import Matching

Mode = Literal["mean", "sum", "max"]


def merged_size(size: Tensor | None, matching: Matching, dtype: torch.dtype) -> Tensor:
    """How many original tokens each token stands for after the merge.

    Args:
        size: (B, N, 1) before it; None when every token stands for itself.
        matching: of N tokens.
        dtype: of the result when `size` is None.

    Returns:
        (B, M, 1).
    """
    batch, kept = matching.keep.shape
    if size is None:
        ones = torch.ones((), dtype=dtype, device=matching.keep.device)
        flat = ones.expand(batch, kept).scatter_add(
            1, matching.into, ones.expand(batch, matching.into.shape[1])
        )
        return flat[..., None]
    flat = size[..., 0]
    out = flat.gather(1, matching.keep)
    return out.scatter_add(1, matching.into, flat.gather(1, matching.source))[..., None]


def merge(
    x: Tensor,
    matching: Matching,
    mode: Mode = "mean",
    size: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """Merge the sources of a matching into the tokens that stay.

    Args:
        x: (B, N, D).
        matching: of N tokens.
        mode: "mean" over a destination and its sources, "sum", or "max".
        size: (B, N, 1) weights of the mean; None for equal weights.
        total: (B, M, 1) of `merged_size` for these weights, if it is there already.

    Returns:
        (B, M, D).
    """
    kept = rows.take(x, matching.keep)
    source = rows.take(x, matching.source)
    if mode == "sum":
        return rows.add_(kept, matching.into, source)
    if mode == "max":
        index = matching.into[..., None].expand_as(source)
        return kept.scatter_reduce(1, index, source, "amax", include_self=True)
    precise = torch.promote_types(x.dtype, torch.float32)
    if total is None:
        total = merged_size(size, matching, precise)
    whole = total.gather(1, matching.into[..., None]).to(precise)
    part = None if size is None else size.gather(1, matching.source[..., None])
    share = whole.reciprocal() if part is None else part / whole
    change = (source - rows.take(kept, matching.into)) * share.to(x.dtype)
    return rows.add_(kept, matching.into, change)


def merge_by_size(x: Tensor, matching: Matching, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean of each group by size, and the sizes of the groups.

    Args:
        x: (B, N, D).
        matching: of N tokens.
        size: (B, N, 1) float32; None when every token stands for itself.

    Returns:
        (B, M, D), and (B, M, 1) float32.
    """
    if native.serves(x) and (size is None or native.serves(size)):
        return native.merge(x, size, *matching)
    total = merged_size(size, matching, torch.float32)
    return merge(x, matching, "mean", size, total), total


def ensemble(
    x: Tensor,
    matching: Matching,
    shares: Tensor,
    size: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """CrossGET's weighted ensemble: sums of size·x in which each pair is weighted anew.

    A destination d with sources s becomes, for shares w that add up to one in each pair,

        (n_d x_d + sum_s [ 2 w_s n_s x_s + (2 w_d - 1) n_d x_d ]) / (n_d + sum_s n_s)

    which is the mean where w = 1/2. With several sources the correction of the destination is
    added once a source, so the weights add up to one only in the mean over both shares.

    Args:
        x: (B, N, D).
        matching: of N tokens.
        shares: (B, R, 2) of each source and of its destination.
        size: (B, N, 1), n above; None for ones.
        total: (B, M, 1) of `merged_size` for these sizes, if it is there already.

    Returns:
        (B, M, D).
    """
    precise = torch.promote_types(x.dtype, torch.float32)
    if total is None:
        total = merged_size(size, matching, precise)
    whole = x if size is None else x * size.to(x.dtype)
    kept, source = rows.take(whole, matching.keep), rows.take(whole, matching.source)
    of_source, of_target = (2 * shares).to(x.dtype).unbind(-1)
    target = rows.take(kept, matching.into)
    change = of_source[..., None] * source + (of_target[..., None] - 1) * target
    return rows.add_(kept, matching.into, change) / total.to(x.dtype)


def spread(y: Tensor, target: Tensor, missing: Tensor | None = None) -> Tensor:
    """Give every old token the features of the token it flowed into.

    Args:
        y: (B, M, D) after a reduction.
        target: (B, N) new position of every old token, -1 where it was dropped.
        missing: (B, N, D) features of dropped tokens; zeros when None.

    Returns:
        (B, N, D).
    """
    out = rows.take(y, target.clamp(min=0))
    gone = (target < 0)[..., None]
    return torch.where(gone, out.new_zeros(()) if missing is None else missing, out)
