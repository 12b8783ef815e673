"""The door to the compiled CPU kernels of :mod:`transom.ops.kernels`.

Between two large matrix products a CPU needs longer to find its way into one more small operator
than the operator itself takes, and a token step is made of forty. Where numba is installed
(``pip install transom[native]``) the steps below are one kernel each. Plain torch code is their
twin, and what runs everywhere else: in training, for many items, on other devices and types, in
compiled and exported models, and while something watches the operators, such as a FLOP counter.

The first call compiles a kernel, which takes seconds; the result is kept on disk.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

log = logging.getLogger(__name__)

FEW = 8
"""Items of a batch up to which one thread here is as fast as all of torch's."""


def serves(*tensors: Tensor) -> bool:
    """Whether kernels may stand in for torch operators on these tensors.

    Args:
        tensors: (B, ...), all that a kernel would read.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    watched = (
        torch._C._get_tracing_state() is not None
        or _get_current_dispatch_mode() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )
    fit = not watched and all(
        type(tensor) is Tensor
        and tensor.dtype == torch.float32
        and tensor.is_cpu
        and tensor.shape[0] <= FEW
        for tensor in tensors
    )
    return fit and _kernels() is not None


@cache
def _kernels() -> Any:
    """The module of the kernels; None where numba is missing or does not work."""
    if find_spec("numba") is None:
        return None
    try:
        from transom.ops import kernels
    except ImportError as error:
        log.warning("numba cannot be imported, so token steps run in plain torch: %s", error)
        return None
    return kernels


Fields = tuple[Tensor, Tensor, Tensor]  # of a matching


def _room(batch: int, count: int, r: int) -> Fields:
    keep, source, into = (torch.empty(batch, size, dtype=torch.int64) for size in (count - r, r, r))
    return keep, source, into


def bipartite(metric: Tensor, r: int, prefix: int) -> Fields:
    """Twin of :func:`transom.ops.matching.bipartite` behind its checks, for 0 or 1 prefix token."""
    batch, count, _ = metric.shape
    keep, source, into = _room(batch, count, r)
    own = metric.contiguous().numpy()
    _kernels().bipartite(own, r, prefix, keep.numpy(), source.numpy(), into.numpy())
    return keep, source, into


def energy_pairs(metric: Tensor, margin: float, alpha: float, r: int, prefix: int) -> Fields:
    """Twin of :func:`transom.ops.matching.by_energy` for its kind "pitome"."""
    batch, count, _ = metric.shape
    keep, source, into = _room(batch, count, r)
    own, found = metric.contiguous().numpy(), (keep.numpy(), source.numpy(), into.numpy())
    _kernels().energy_pairs(own, float(margin), float(alpha), r, prefix, *found)
    return keep, source, into


def complete(
    graph: Tensor, importance: Tensor | None, r: int, first: int, last: int, also: Tensor | None
) -> Fields:
    """Twin of :func:`transom.ops.matching.complete` for at least two tokens.

    Args:
        graph: (B, N, N) cosines, which are written over.
        importance: (B, N); None when all tokens matter alike.
        r: at most half of the tokens that take part.
        first, last: tokens before and from there on take no part.
        also: (B,) one more token in each item that does not; None for no other.
    """
    batch, count, _ = graph.shape
    keep, source, into = _room(batch, count, r)
    if importance is None:
        importance = torch.zeros(batch, count)
    if also is None:
        also = torch.full((batch,), -1)
    arrays = [t.contiguous().numpy() for t in (also, importance, keep, source, into)]
    _kernels().complete(graph.contiguous().numpy(), first, last, *arrays)
    return keep, source, into


def merge(
    x: Tensor, size: Tensor | None, keep: Tensor, source: Tensor, into: Tensor
) -> tuple[Tensor, Tensor]:
    """Twin of :func:`transom.ops.merging.merge_by_size`, given the fields of the matching."""
    batch, count, width = x.shape
    kept = keep.shape[1]
    out, total = torch.empty(batch, kept, width), torch.empty(batch, kept, 1)
    if size is None:
        size = torch.ones(batch, count, 1)
    # arrays that are parts of wider ones would each be compiled for anew
    arrays = [t.contiguous().numpy() for t in (x, size, keep, source, into)]
    _kernels().merge(*arrays, out.numpy(), total.numpy())
    return out, total
