"""The operators of benchmarks/attention.py, each with the forms it is held against."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from transom.ops import attention, neighborhood
from transom.papers.attention import complexformer as phases
from transom.papers.attention import gaam as gaussians
from transom.papers.attention.moa import window
from transom.papers.attention.moh import routing, skipping
from transom.papers.attention.rcmha import layer as relative
from transom.papers.attention.sparsifiner import predictor as sparse
from transom.papers.compression.quantizable import attention as clipping


@dataclass(frozen=True)
class Shape:
    """What an operator is measured on: a square grid of tokens.

    Attributes:
        side: of the grid; there are side² tokens.
        batch, heads, width: B, H and d of q, k and v.
    """

    side: int
    batch: int
    heads: int
    width: int
    dtype: torch.dtype
    device: torch.device

    @property
    def tokens(self) -> int:
        return self.side**2

    def random(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, side, side, H, d), views of one projection as in a host."""
        torch.manual_seed(0)
        size = (self.batch, self.side, self.side, 3, self.heads, self.width)
        q, k, v = torch.randn(size, device=self.device, dtype=self.dtype).unbind(3)
        return q, k, v


@dataclass(frozen=True)
class Form:
    """One way to compute.

    Attributes:
        run: the call; returns the output first.
        held: tensors that are ready before the call and count as its memory.
        exact: whether it gives what the form of this library gives.
    """

    run: Callable[[], Tensor]
    held: tuple[Tensor, ...] = ()
    exact: bool = True


@dataclass(frozen=True)
class Operator:
    """One entry of the table.

    Attributes:
        forms: from a shape to the forms by name; the first is this library's. They may be left
            out where `skip` says that they would not be measured.
        linear: whether time and memory of the first form have to grow linearly.
        bound: a form and a factor; the first form may take that many times its time at most.
    """

    forms: Callable[[Shape, set[str]], dict[str, Form]]
    linear: bool = True
    bound: tuple[str, float] | None = None


def fna(shape: Shape, skip: set[str]) -> dict[str, Form]:
    """2-D neighborhood attention, 7 x 7 keys a query."""
    q, k, v = shape.random()
    flat = [t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)]
    axes = neighborhood.axes((shape.side, shape.side), 7)
    choice = neighborhood.explain(q, k, v, 7)
    ready = {}
    if choice.tile is not None:
        ready = neighborhood.tiled.masks(axes, choice.tile, 0, shape.dtype, shape.device)
    held = tuple(mask for mask in ready.values() if mask is not None)
    forms = {
        "neighborhood": Form(lambda: neighborhood.attend(q, k, v, 7), held),
        "sdpa": Form(lambda: attention.attend(*flat), exact=False),
    }
    if "masked sdpa" not in skip:
        hidden = ~neighborhood.dense_mask(axes, shape.device)
        mask = torch.zeros(hidden.shape, dtype=shape.dtype, device=shape.device)
        mask.masked_fill_(hidden, float("-inf"))
        forms["masked sdpa"] = Form(lambda: _grid(attention.attend(*flat, mask), q), (mask,))
    table = _neighbours(axes, shape.device)
    forms["gather"] = Form(lambda: _gathered(q, k, v, table), (table,))
    if choice.path == "tiled" and "flex" not in choice.refused:
        forms["flex"] = Form(lambda: neighborhood.attend(q, k, v, 7, path="flex"))
    elif shape.device.type != "cpu":
        forms["tiled"] = Form(lambda: neighborhood.attend(q, k, v, 7, path="tiled"))
    return forms


def _grid(out: Tensor, like: Tensor) -> Tensor:
    return out.transpose(1, 2).reshape(like.shape)


def _neighbours(axes: tuple[neighborhood.Axis, ...], device: torch.device) -> Tensor:
    """(N, K) positions of the keys of each query."""
    rows, columns = (
        torch.tensor([range(*axis.window(i, axis.length)) for i in range(axis.length)])
        for axis in axes
    )
    places = rows[:, None, :, None] * axes[1].length + columns[None, :, None, :]
    return places.flatten(2).flatten(0, 1).to(device)


def _gathered(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """The naive form: a copy of its keys and values for every query."""
    query, key, value = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
    near_k, near_v = key[:, :, table], value[:, :, table]  # (B, H, N, K, d)
    logits = (near_k @ query[..., None])[..., 0] * q.shape[-1] ** -0.5
    return _grid((logits.softmax(-1)[..., None, :] @ near_v)[..., 0, :], q)


def moh(shape: Shape, skip: set[str]) -> dict[str, Form]:
    """Half of the heads for each token, evenly spread: a quarter shared, a quarter routed."""
    q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in shape.random())
    shared = chosen = max(shape.heads // 4, 1)
    score = torch.randn(shape.batch, shape.tokens, shape.heads - shared, device=shape.device)
    probability = score.softmax(-1).to(shape.dtype)
    mask = routing.top(probability, chosen)
    gate = torch.cat([torch.ones_like(probability[..., :shared]), probability * mask], -1)
    gates = routing.Gates(gate, probability, mask)

    scale = shape.width**-0.5

    def form(path: skipping.Path) -> Form:
        return Form(lambda: skipping.attend(q, k, v, gates, None, scale, path=path))

    return {
        "moh": form("auto"),
        "moh dense": form("dense"),
        "moh skip": form("skip"),
        "sdpa": Form(lambda: attention.attend(q, k, v), exact=False),
    }


def heads_first(shape: Shape) -> list[Tensor]:
    """q, k, v (B, H, N, d)."""
    return [t.flatten(1, 2).transpose(1, 2) for t in shape.random()]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Form:
    """The kernel of torch on the same q, k, v."""
    return Form(lambda: attention.attend(q, k, v), exact=False)


def gaam(shape: Shape, skip: set[str]) -> dict[str, Form]:
    """The gate on the values, 4 heads of 5 Gaussians over the channels; alone and in attention."""
    q, k, v = heads_first(shape)
    rng = torch.Generator().manual_seed(0)
    gated = gaussians.GatedAttention(gaussians.GAAM(), rng).to(shape.device, shape.dtype)
    gate = gated.value_gate
    assert gate is not None
    x = v.transpose(1, 2).flatten(2)

    def naive() -> Tensor:
        heads = zip(gate.attention_heads, x.chunk(len(gate.attention_heads), -1), strict=True)
        return torch.cat(
            [c * gaussians.reference(c, h.mean_offsets, h.c, -1) for h, c in heads], -1
        )

    def whole() -> Tensor:
        return gated(q, k, v, bias=None, scale=shape.width**-0.5, record=None)

    return {
        "gaam": Form(lambda: gate(x)[0]),
        "naive": Form(naive),
        "gaam in attention": Form(whole, exact=False),
        "sdpa": plain(q, k, v),
    }


def rcmha(shape: Shape, skip: set[str]) -> dict[str, Form]:
    """Convolved q, k, v and the relative terms of a sequence."""
    given = heads_first(shape)
    rows = torch.randn(2 * shape.tokens, shape.heads, shape.width + 1, device=shape.device) / 4
    table, of = rows.to(shape.dtype).split([shape.width, 1], -1)
    extra = table[0]
    filters = [torch.randn(shape.width, 1, 3, device=shape.device).to(shape.dtype) for _ in "qkv"]
    zero, scale = filters[0].new_zeros(shape.width), shape.width**-0.5

    def convolved() -> list[Tensor]:
        return [relative.convolve(x, w, zero) for x, w in zip(given, filters, strict=True)]

    forms = {
        "rcmha": Form(
            lambda: relative.attend_along(
                *convolved(), table, of[..., 0], scale=scale, extra=extra
            ),
            (table, of),
        ),
        "sdpa": plain(*given),
    }
    if "naive" not in skip:
        forms["naive"] = Form(
            lambda: relative.reference(*convolved(), extra, table, of[..., 0], None, scale),
            (table, of),
        )
    return forms


def complexformer(shape: Shape, skip: set[str]) -> dict[str, Form]:
    """Phases stretched and shifted, with those of the places of a sequence."""
    q, k, v = heads_first(shape)
    pairs = shape.width // 2
    delta, shift = (torch.rand(2, shape.heads, pairs, device=shape.device) + 0.5).unbind(0)
    g, scale = phases.frequencies(pairs).to(shape.device), shape.width**-0.5
    places = torch.arange(shape.tokens, device=shape.device)

    def ours() -> Tensor:
        angle = phases.angles(places, g)
        turned = phases.turn(q, delta, shift, angle), phases.turn(k, delta, None, angle)
        return attention.attend(*turned, v, scale=scale)

    def naive() -> Tensor:
        logits = phases.reference(q, k, delta, shift, g.float()) * scale
        return logits.softmax(-1).to(v.dtype) @ v

    return {"complexformer": Form(ours), "sdpa": plain(q, k, v), "naive": Form(naive)}


def _predicted(shape: Shape) -> tuple[sparse.MaskPredictor, list[Tensor]]:
    """For 64 keys a query, or a quarter of them where that is less."""
    budget = sparse.Budget(min(0.25, 64 / shape.tokens))
    made = sparse.MaskPredictor(shape.width, shape.tokens, budget=budget).eval()
    return made.to(shape.device, shape.dtype), heads_first(shape)


def sparsifiner(shape: Shape, skip: set[str]) -> dict[str, Form]:
    """The prediction, which is one of all pairs, and attention to what it chose."""
    predictor, (q, k, v) = _predicted(shape)
    scale = shape.width**-0.5
    held = (predictor.proj_n, predictor.proj_back_n)

    def naive() -> Tensor:
        found = predictor(q, k, None, 0)
        return sparse.masked(q, k, v, found.mask, scale)

    return {
        "sparsifiner": Form(
            lambda: sparse.predicted(predictor, q, k, v, scale=scale, prefix=0), held
        ),
        "sdpa": plain(q, k, v),
        "naive": Form(naive, held),
    }


def chosen(shape: Shape, skip: set[str]) -> dict[str, Form]:
    """Attention of Sparsifiner to 64 keys that are chosen already."""
    q, k, v = heads_first(shape)
    keys, scale = min(64, shape.tokens // 4), shape.width**-0.5
    size = (shape.batch, shape.heads, shape.tokens, keys)
    # one key of each of as many parts of all: no key twice
    start = torch.arange(keys, device=shape.device) * (shape.tokens // keys)
    index = start + torch.randint(shape.tokens // keys, size, device=shape.device)
    forms = {
        "sparsifiner chosen": Form(lambda: sparse.gathered(q, k, v, index, scale), (index,)),
        "sdpa": plain(q, k, v),
    }
    if "masked sdpa" not in skip:
        every = (*size[:3], shape.tokens)
        mask = torch.zeros(every, dtype=torch.bool, device=shape.device).scatter(-1, index, True)
        forms["masked sdpa"] = Form(lambda: sparse.masked(q, k, v, mask, scale), (mask,))
    return forms


def moa(shape: Shape, skip: set[str]) -> dict[str, Form]:
    """Causal windows: 64 tokens at the start for every query, and 256 or 512 behind it by head."""
    q, k, v = heads_first(shape)
    half = shape.heads // 2
    local, sinks = [4] * half + [8] * (shape.heads - half), [1] * shape.heads
    forms = {
        "moa": Form(lambda: window.windowed(q, k, v, local, sinks, 64)),
        "causal sdpa": Form(
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), exact=False
        ),
    }
    if "masked sdpa" not in skip:
        places = torch.arange(shape.tokens, device=shape.device)
        seen = window.window_mask(places, local, sinks, 64)
        mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -math.inf)
        forms["masked sdpa"] = Form(lambda: attention.attend(q, k, v, mask[None]), (mask,))
    return forms


def quantizable(shape: Shape, skip: set[str]) -> dict[str, Form]:
    """Clipped softmax, which makes the matrix of weights, with gamma -4 / N."""
    q, k, v = heads_first(shape)
    scale, gamma = shape.width**-0.5, -4 / shape.tokens
    return {
        "quantizable": Form(lambda: clipping.attend(q, k, v, None, scale, gamma)),
        "sdpa": plain(q, k, v),
    }


OPERATORS: dict[str, Operator] = {
    "fna": Operator(fna),
    "moh": Operator(moh, linear=False, bound=("moh dense", 1.1)),
    "moa": Operator(moa),
    "sparsifiner": Operator(sparsifiner, linear=False),
    "chosen": Operator(chosen),
    "gaam": Operator(gaam),
    "rcmha": Operator(rcmha, linear=False),
    "complexformer": Operator(complexformer, linear=False),
    "quantizable": Operator(quantizable, linear=False),
}
