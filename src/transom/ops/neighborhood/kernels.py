"""The paths that compile or call a kernel: flex attention, and the package natten."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from transom.ops.neighborhood.rule import Axis

_HALF_OR_SINGLE = (torch.float32, torch.float16, torch.bfloat16)


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def flex_refuses(q: Tensor, k: Tensor, v: Tensor, *, lse: bool) -> str | None:
    """Why flex attention cannot run here; None if it can."""
    if q.dtype not in _HALF_OR_SINGLE:
        return f"flex attention has no {q.dtype}"
    if q.device.type == "cpu" and _wants_gradient(q, k, v):
        return "flex attention has no gradient on CPUs"
    if q.device.type == "cpu" and lse:
        return "flex attention gives no log-sum-exp on CPUs"
    if q.device.type not in ("cpu", "cuda"):
        return f"flex attention was not tried on {q.device.type}"
    return None


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def bounds(axis: Axis, device: torch.device) -> tuple[Tensor, Tensor]:
    """First key and last key (L,) of the window of each query, as positions of the axis."""
    first, last = [], []
    for x in range(axis.length):
        remainder = x % axis.dilation
        start, stop = axis.window(x // axis.dilation, axis.group(remainder))
        first.append(remainder + start * axis.dilation)
        last.append(remainder + (stop - 1) * axis.dilation)
    return torch.tensor(first, device=device), torch.tensor(last, device=device)


def _seen(axes: Sequence[Axis], extra: int, device: torch.device) -> Callable[..., Tensor]:
    """Does the query see the key? Both count row-major, keys with the extra ones in front."""
    tables = [bounds(axis, device) for axis in axes]
    sizes = [math.prod(a.length for a in axes[i + 1 :]) for i in range(len(axes))]

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        here = key - extra
        inside = here >= 0
        place = here.clamp(min=0)
        for axis, size, (first, last) in zip(axes, sizes, tables, strict=True):
            x = query // size % axis.length
            y = place // size % axis.length
            inside = inside & (y >= first[x]) & (y <= last[x])
            if axis.dilation > 1:
                inside = inside & (x % axis.dilation == y % axis.dilation)
        return inside | (here < 0)

    return seen


@functools.lru_cache(maxsize=16)
def _block_mask(axes: tuple[Axis, ...], extra: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    count = math.prod(axis.length for axis in axes)
    seen = _seen(axes, extra, device)
    return create_block_mask(seen, None, None, count, count + extra, device=device)


def flex(
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
    """Compiled flex attention; arguments and result as those of the tiles."""
    from torch.nn.attention.flex_attention import AuxRequest

    last = len(axes)
    query, key, value = (t.flatten(1, last) for t in (q, k, v))
    extra = 0
    if extra_k is not None and extra_v is not None:
        extra = extra_k.shape[1]
        key, value = torch.cat([extra_k, key], 1), torch.cat([extra_v, value], 1)
    made = _compiled()(
        *(t.transpose(1, 2).contiguous() for t in (query, key, value)),
        block_mask=_block_mask(axes, extra, q.device),
        scale=scale,
        enable_gqa=q.shape[-2] != k.shape[-2],
        return_aux=AuxRequest(lse=True) if lse else None,
    )
    grid = q.shape[1:-2]
    out, sums = (made[0], made[1].lse) if lse else (made, None)
    if sums is not None:
        sums = sums.transpose(1, 2).unflatten(1, grid)
    return out.transpose(1, 2).unflatten(1, grid), sums


def natten_refuses(q: Tensor, k: Tensor, v: Tensor, *, lse: bool) -> str | None:
    """Why the package natten cannot run here; None if it can."""
    if not q.is_cuda:
        return "the kernels of natten need a GPU"
    if importlib.util.find_spec("natten") is None:
        return "the package natten is not installed"
    package = importlib.import_module("natten")
    if "return_lse" not in inspect.signature(getattr(package, "na2d", print)).parameters:
        return "the installed natten is older than 0.21"
    if not getattr(package, "HAS_LIBNATTEN", False):
        return "the installed natten came without its CUDA library"
    if q.dtype not in _HALF_OR_SINGLE:
        return f"natten has no {q.dtype}"
    if lse and _wants_gradient(q, k, v):
        return "natten gives no gradient of the log-sum-exp"
    return None


def natten(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axes: tuple[Axis, ...],
    scale: float,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernels of the paper's authors; arguments and result as those of the reference."""
    package = importlib.import_module("natten")
    run = getattr(package, f"na{len(axes)}d")
    out, lse = run(
        q,
        k,
        v,
        kernel_size=tuple(a.kernel for a in axes),
        stride=tuple(a.stride for a in axes),
        dilation=tuple(a.dilation for a in axes),
        is_causal=tuple(a.causal for a in axes),
        scale=scale,
        additional_keys=extra_k,
        additional_values=extra_v,
        return_lse=True,
    )
    return out, lse
