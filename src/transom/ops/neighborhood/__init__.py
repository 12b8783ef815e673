"""Neighborhood attention on 1-D, 2-D and 3-D grids: every query sees a full window of keys.

    out = attend(q, k, v, kernel_size=7)                  # q, k, v: (B, h, w, H, d)
    out, lse = attend(..., dilation=(2, 1), is_causal=(True, False), return_lse=True)

At the borders a window is shifted inwards, so that it always holds `kernel_size` keys an axis; on
a causal axis it ends at the query and is cut at the start. With dilation d a query sees keys of
its own remainder modulo d; with stride s, s neighbouring queries share one window. Extra keys and
values (class token, text) join the softmax of every query.

Four paths compute the same. :func:`explain` tells which one is taken and why.

========= ===================================== ===========================================
path      how                                   needs
========= ===================================== ===========================================
reference all N² logits, then a mask            memory
tiled     blocks of queries against a box of    nothing; the path of CPUs
          keys (:mod:`.tiled`)
flex      compiled flex attention with a block  a compiler; on CPUs no gradient and no
          mask (:mod:`.kernels`)                log-sum-exp
natten    the kernels of the paper's authors    the package natten with its CUDA library
========= ===================================== ===========================================

Source: Hassani et al., Faster Neighborhood Attention, NeurIPS 2024; stride and extra keys from the
authors' package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args, overload

from torch import Tensor

from transom.errors import SettingsError
from transom.ops.neighborhood import kernels, reference, tiled
from transom.ops.neighborhood.reference import dense_mask as dense_mask
from transom.ops.neighborhood.rule import Axis as Axis
from transom.ops.neighborhood.rule import Bools, Ints
from transom.ops.neighborhood.rule import axes as axes
from transom.ops.neighborhood.rule import mask as mask

Path = Literal["reference", "tiled", "flex", "natten"]
PATHS: tuple[Path, ...] = get_args(Path)


@dataclass(frozen=True)
class Choice:
    """Which path is taken.

    Attributes:
        path: the one taken.
        why: it was.
        refused: the others that cannot run here, each with the reason.
        keys: that one query sees, extra ones included.
        tokens: of the grid.
        tile: queries of a tile along every axis, on the tiled path.
    """

    path: Path
    why: str
    refused: dict[Path, str]
    keys: int
    tokens: int
    tile: tuple[int, ...] | None

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.why}; a query sees {self.keys} keys of {self.tokens} tokens"]
        if self.tile is not None:
            lines.append(f"tiles of {' x '.join(map(str, self.tile))} queries")
        return "\n".join([*lines, *(f"not {path}: {why}" for path, why in self.refused.items())])


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    *,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    return_lse: bool = False,
) -> Choice:
    """Which path :func:`attend` takes for these arguments, and why.

    Only shapes, dtypes, devices and whether gradients are wanted are looked at; tensors on the
    device "meta" do for a CPU.
    """
    found = axes(q.shape[1:-2], kernel_size, stride, dilation, is_causal)
    _check(q, k, v, extra_k, extra_v)
    path, why, refused = _choose(q, k, v, return_lse)
    extra = 0 if extra_k is None else extra_k.shape[1]
    return Choice(
        path,
        why,
        refused,
        keys=math.prod([axis.kernel for axis in found]) + extra,
        tokens=math.prod([axis.length for axis in found]),
        tile=tiled.sizes(found, q.shape[-2], q.shape[-1], extra) if path == "tiled" else None,
    )


def _choose(q: Tensor, k: Tensor, v: Tensor, lse: bool) -> tuple[Path, str, dict[Path, str]]:
    """The path, why, and the others that cannot run."""
    reasons: dict[Path, str | None] = {
        "natten": kernels.natten_refuses(q, k, v, lse=lse),
        "flex": kernels.flex_refuses(q, k, v, lse=lse),
    }
    refused = {path: why for path, why in reasons.items() if why is not None}
    if "natten" not in refused:
        return "natten", "the package natten has kernels for this GPU", refused
    if "flex" not in refused and q.is_cuda:
        return "flex", "on a GPU one compiled kernel beats a launch for every tile", refused
    return "tiled", "memory O(tokens * keys), and no kernel that has to be compiled", refused


def _check(q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None) -> None:
    if (extra_k is None) != (extra_v is None):
        raise SettingsError("extra_k and extra_v come together; here only one of them is given")
    grid = q.shape[:-2]
    heads, fewer = q.shape[-2], k.shape[-2]
    if k.shape[:-2] != grid or v.shape[:-1] != k.shape[:-1] or q.shape[-1] != k.shape[-1]:
        raise SettingsError(
            f"q, k, v are {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; expected "
            "(B, *grid, heads, width) with one batch and grid, and one width of q and k"
        )
    if heads % fewer:
        raise SettingsError(
            f"q has {heads} heads and k has {fewer}; expected a number that divides {heads}"
        )
    if extra_k is not None and extra_v is not None:
        expected = (q.shape[0], extra_k.shape[1], fewer)
        if extra_k.shape != (*expected, k.shape[-1]) or extra_v.shape != (*expected, v.shape[-1]):
            raise SettingsError(
                f"extra_k and extra_v are {tuple(extra_k.shape)} and {tuple(extra_v.shape)}; "
                f"expected (B, extra, heads, width) as in k {tuple(k.shape)} and v"
            )


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Ints,
    stride: Ints = ...,
    dilation: Ints = ...,
    is_causal: Bools = ...,
    *,
    scale: float | None = ...,
    extra_k: Tensor | None = ...,
    extra_v: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    path: Path | None = ...,
) -> Tensor: ...


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Ints,
    stride: Ints = ...,
    dilation: Ints = ...,
    is_causal: Bools = ...,
    *,
    scale: float | None = ...,
    extra_k: Tensor | None = ...,
    extra_v: Tensor | None = ...,
    return_lse: Literal[True],
    path: Path | None = ...,
) -> tuple[Tensor, Tensor]: ...


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Ints,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    *,
    scale: float | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    return_lse: bool = False,
    path: Path | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention.

    Args:
        q: (B, *S, H, d) with the grid S of one to three axes.
        k, v: (B, *S, H', d), where H' divides H; v may have a width of its own.
        kernel_size: keys that a query sees, at least 2; one value, or one an axis.
        stride: neighbouring queries that share a window, at most kernel_size.
        dilation: distance between the keys of a window.
        is_causal: whether keys behind the query are hidden.
        scale: of the logits; 1/sqrt(d) when None.
        extra_k, extra_v: (B, E, H', d) that every query sees as well.
        return_lse: whether the natural log of the sum of the exponentials is wanted.
        path: one of PATHS; chosen when None.

    Returns:
        (B, *S, H, d), and (B, *S, H) when return_lse is set.

    Raises:
        SettingsError: a shape or a window is out of range, or the path cannot run here.
    """
    found = axes(q.shape[1:-2], kernel_size, stride, dilation, is_causal)
    _check(q, k, v, extra_k, extra_v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    taken = _taken(path, q, k, v, return_lse)
    lse: Tensor | None
    if taken == "tiled":
        out, lse = tiled.attend(q, k, v, found, scale, extra_k, extra_v, lse=return_lse)
    elif taken == "flex":
        out, lse = kernels.flex(q, k, v, found, scale, extra_k, extra_v, lse=return_lse)
    elif taken == "natten":
        out, lse = kernels.natten(q, k, v, found, scale, extra_k, extra_v)
    else:
        out, lse = reference.attend(q, k, v, found, scale, extra_k, extra_v)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _taken(path: Path | None, q: Tensor, k: Tensor, v: Tensor, lse: bool) -> Path:
    if path is None:
        return _choose(q, k, v, lse)[0]
    if path not in PATHS:
        raise SettingsError(f"path is {path!r}; expected one of {', '.join(PATHS)}, or None")
    refusals = {"natten": kernels.natten_refuses, "flex": kernels.flex_refuses}
    why = refusals[path](q, k, v, lse=lse) if path in refusals else None
    if why is not None:
        raise SettingsError(f"path {path!r} cannot run here: {why}; leave path out to choose")
    return path


def full(shape: Sequence[int], kernel_size: Ints, dilation: Ints) -> bool:
    """Whether a window that is not causal covers the whole grid."""
    return all(
        a.dilation == 1 and a.kernel == a.length for a in axes(shape, kernel_size, 1, dilation)
    )
