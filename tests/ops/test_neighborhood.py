"""Neighborhood attention: the rule by brute force, and every path against the dense twin."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.strategies import generator
from transom.errors import SettingsError
from transom.ops import neighborhood, reference
from transom.ops.neighborhood import kernels, tiled, unfused
from transom.ops.neighborhood.rule import Axis


@st.composite
def windows(draw: DrawFn, most: int = 12) -> Axis:
    """Any window that fits its axis."""
    kernel, dilation = draw(st.integers(2, 5)), draw(st.integers(1, 3))
    least = kernel * dilation
    length = draw(st.integers(least, max(least, most)))
    return Axis(length, kernel, draw(st.integers(1, kernel)), dilation, draw(st.booleans()))


@st.composite
def cases(
    draw: DrawFn, dtype: torch.dtype
) -> tuple[list[Tensor], dict[str, Any], tuple[Axis, ...]]:
    """q, k, v and perhaps extra keys and values; settings; windows."""
    rank = draw(st.integers(1, 3))
    axes = tuple(draw(windows((30, 9, 5)[rank - 1])) for _ in range(rank))
    rng = generator(draw)
    batch, fewer, share = (draw(st.integers(1, 2)) for _ in range(3))
    width, other = draw(st.sampled_from([1, 4, 8])), draw(st.sampled_from([4, 8]))
    extra = draw(st.sampled_from([0, 1, 3]))
    grid = [axis.length for axis in axes]

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    given = [
        noise(batch, *grid, fewer * share, width),
        noise(batch, *grid, fewer, width),
        noise(batch, *grid, fewer, other),
    ]
    given += [noise(batch, extra, fewer, w) for w in (width, other) if extra]
    named = {
        "kernel_size": [axis.kernel for axis in axes],
        "stride": [axis.stride for axis in axes],
        "dilation": [axis.dilation for axis in axes],
        "is_causal": [axis.causal for axis in axes],
    }
    return given, named, axes


def run(tensors: list[Tensor], named: dict[str, Any], path: Any) -> tuple[Tensor, Tensor]:
    q, k, v, *extra = tensors
    more = dict(zip(("extra_k", "extra_v"), extra, strict=False))
    return neighborhood.attend(q, k, v, **named, **more, return_lse=True, path=path)


@given(windows(40))
def test_the_rule(axis: Axis) -> None:
    """Each query sees its group only: a full window that holds it, or what lies before it."""
    seen = neighborhood.mask(axis)
    assert seen.shape == (axis.length, axis.length)
    for x, row in enumerate(seen):
        keys = row.nonzero()[:, 0].tolist()
        assert {key % axis.dilation for key in keys} == {x % axis.dilation}
        assert keys == list(range(keys[0], keys[-1] + 1, axis.dilation))
        assert x in keys
        if axis.causal:
            assert keys[-1] == x
            assert len(keys) <= axis.kernel
            assert axis.stride > 1 or len(keys) == min(axis.kernel, x // axis.dilation + 1)
        else:
            assert len(keys) == axis.kernel
            if axis.stride == 1:
                own = range(x % axis.dilation, axis.length, axis.dilation)
                places = [own.index(key) for key in keys]
                centre = x // axis.dilation - axis.kernel // 2
                assert places[0] == min(max(centre, 0), len(own) - axis.kernel)


@given(cases(torch.float64), st.sampled_from([None, 1, 2, 3, 5]))
@settings(max_examples=120)
def test_tiles_are_the_dense_twin(case: Any, size: int | None) -> None:
    """Outputs, log-sum-exp and every gradient, for the chosen tiles and for forced ones."""
    tensors, named, _ = case
    tensors = [t.requires_grad_() for t in tensors]
    expected = run(tensors, named, "reference")
    weights = [torch.randn_like(t) for t in expected]
    slopes = torch.autograd.grad(_sum(expected, weights), tensors)
    with _tiles(size):
        got = run(tensors, named, "tiled")
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(_sum(got, weights), tensors), slopes)
        q, k, v, *extra = tensors
        more = dict(zip(("extra_k", "extra_v"), extra, strict=False))
        out = neighborhood.attend(q, k, v, **named, **more, path="tiled")
        torch.testing.assert_close(out, expected[0])
        alone = torch.autograd.grad((out * weights[0]).sum(), tensors)
        dense = neighborhood.attend(q, k, v, **named, **more, path="reference")
        torch.testing.assert_close(alone, torch.autograd.grad((dense * weights[0]).sum(), tensors))
        with torch.no_grad():
            torch.testing.assert_close(run(tensors, named, "tiled"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(data=st.data())
@settings(max_examples=40)
def test_precision(dtype: torch.dtype, data: st.DataObject) -> None:
    """As near to the truth as a few roundings of the inputs' precision, forward and backward."""
    tensors, named, _ = data.draw(cases(dtype))
    exact = [t.double().requires_grad_() for t in tensors]
    own = [t.requires_grad_() for t in tensors]
    expected = run(exact, named, "reference")
    weights = [torch.randn_like(t) for t in expected]
    got = run(own, named, "tiled")
    limit = 32 * torch.finfo(dtype).eps
    tolerance = {"atol": limit, "rtol": limit, "check_dtype": False}
    assert got[0].dtype == dtype
    torch.testing.assert_close(got, expected, **tolerance)
    slopes = torch.autograd.grad(_sum(expected, weights), exact)
    found = torch.autograd.grad(_sum(got, [w.to(dtype) for w in weights]), own)
    for a, b in zip(found, slopes, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(
            a, b, **{**tolerance, "atol": limit * (1 + b.abs().max().item())}
        )


def _sum(outputs: tuple[Tensor, ...], weights: list[Tensor]) -> Tensor:
    return torch.stack([(o * w).sum() for o, w in zip(outputs, weights, strict=True)]).sum()


@contextlib.contextmanager
def _tiles(size: int | None) -> Iterator[None]:
    """Force the number of queries of a tile along every axis."""
    with pytest.MonkeyPatch.context() as patch:
        if size is not None:
            patch.setattr(tiled, "sizes", lambda axes, *_: (size,) * len(axes))
        yield


def noise(*shape: int) -> list[Tensor]:
    """q, k, v."""
    return list(torch.randn(3, *shape, dtype=torch.float64))


def test_a_window_over_everything_is_attention() -> None:
    q, k, v = noise(2, 5, 6, 2, 4)
    flat = [t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)]
    expected = reference.attention(*flat, None, 0.5)
    out = neighborhood.attend(q, k, v, (5, 6)).flatten(1, 2).transpose(1, 2)
    torch.testing.assert_close(out, expected)


def test_a_stride_of_the_window_is_attention_inside_blocks() -> None:
    q, k, v = noise(1, 6, 8, 2, 4)

    def blocks(x: Tensor) -> Tensor:
        return x.unflatten(2, (2, 4)).unflatten(1, (2, 3)).transpose(2, 3).flatten(3, 4)

    out = blocks(neighborhood.attend(q, k, v, (3, 4), (3, 4)))
    flat = [blocks(t).transpose(3, 4) for t in (q, k, v)]
    torch.testing.assert_close(out.transpose(3, 4), reference.attention(*flat, None, 0.5))


def test_no_future_frame_reaches_the_past() -> None:
    q, k, v = noise(1, 6, 4, 4, 1, 4)
    v.requires_grad_()
    out = neighborhood.attend(q, k, v, (3, 2, 2), is_causal=(True, False, False))
    for frame in range(6):
        (slope,) = torch.autograd.grad(out[:, frame].sum(), v, retain_graph=True)
        reached = slope.abs().sum((0, 2, 3, 4, 5)).nonzero()[:, 0].tolist()
        assert reached == list(range(max(frame - 2, 0), frame + 1))


def test_queries_inside_move_with_their_keys() -> None:
    q, k, v = noise(1, 30, 1, 4)
    moved = neighborhood.attend(*(t.roll(4, 1) for t in (q, k, v)), 5, dilation=2)
    out = neighborhood.attend(q, k, v, 5, dilation=2)
    torch.testing.assert_close(moved[:, 8:26], out[:, 4:22])
    assert not torch.allclose(moved[:, 4:], out[:, :26])


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple) else (out,):
            if isinstance(one, Tensor):
                self.numbers = max(self.numbers, one.numel())
        return out


@pytest.mark.parametrize("lse", [False, True])
def test_tiles_make_nothing_that_grows_faster_than_the_tokens(lse: bool) -> None:
    """Backward included; all logits of the larger grid would be 25 million numbers."""
    largest = []
    for side in (28, 56):
        q, k, v = (torch.randn(1, side, side, 2, 16, requires_grad=True) for _ in range(3))
        with Largest() as seen:
            out = neighborhood.attend(q, k, v, 7, return_lse=lse, path="tiled")
            (out if isinstance(out, Tensor) else out[0]).sum().backward()
        largest.append(seen.numbers)
    assert largest[1] <= 4 * largest[0]
    assert largest[1] < 200_000


@pytest.mark.parametrize(
    ("shape", "named", "extra"),
    [
        ((150,), {"kernel_size": 9, "dilation": 2}, 0),
        ((12, 13), {"kernel_size": (4, 5), "stride": (2, 1), "is_causal": (True, False)}, 3),
        ((5, 6, 6), {"kernel_size": (2, 3, 3), "dilation": (1, 2, 1)}, 0),
    ],
)
@torch.no_grad()
def test_flex_is_the_dense_twin(shape: tuple[int, ...], named: Any, extra: int) -> None:
    torch.compiler.reset()
    q = torch.randn(1, *shape, 2, 16)
    k, v = torch.randn(2, 1, *shape, 1, 16)
    more = list(torch.randn(2, 1, extra, 1, 16)) if extra else []
    extras = dict(zip(("extra_k", "extra_v"), more, strict=False))
    expected = neighborhood.attend(q, k, v, **named, **extras, path="reference")
    out = neighborhood.attend(q, k, v, **named, **extras, path="flex")
    torch.testing.assert_close(out, expected)
    torch.compiler.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["flex", "natten", "tiled"])
def test_on_a_gpu(path: Any, dtype: torch.dtype) -> None:
    if path == "natten":
        pytest.importorskip("natten")
    named = {"kernel_size": 7, "dilation": (2, 1)}
    exact = [t.cuda().requires_grad_() for t in noise(2, 24, 28, 4, 32)]
    own = [t.detach().to(dtype).requires_grad_() for t in exact]
    limit = max(64 * torch.finfo(dtype).eps, 2e-3)  # matrix units round float32 as well
    with torch.no_grad():
        sums = run(own, named, path)[1]
    torch.testing.assert_close(
        sums, run(exact, named, "reference")[1], atol=limit, rtol=limit, check_dtype=False
    )
    expected = neighborhood.attend(*exact, **named, path="reference")
    got = neighborhood.attend(*own, **named, path=path)
    torch.testing.assert_close(got, expected, atol=limit, rtol=limit, check_dtype=False)
    slopes = torch.autograd.grad(expected.sum(), exact)
    for a, b in zip(torch.autograd.grad(got.sum(), own), slopes, strict=True):
        torch.testing.assert_close(a, b, atol=4 * limit, rtol=4 * limit, check_dtype=False)


def test_the_choice_is_explained() -> None:
    q = torch.empty(1, 56, 56, 4, 32, device="meta")
    choice = neighborhood.explain(q, q, q, 7, extra_k=q[:, :2, 0], extra_v=q[:, :2, 0])
    assert (choice.path, choice.keys, choice.tokens) == ("tiled", 51, 3136)
    assert choice.tile is not None
    assert 16 <= math.prod(choice.tile) <= 256
    assert "natten" in choice.refused
    assert str(choice).startswith("tiled: ")
    q = torch.zeros(1, 56, 56, 4, 32, dtype=torch.float64, requires_grad=True)
    assert "float64" in neighborhood.explain(q, q, q, 7).refused["flex"]
    with pytest.raises(SettingsError, match=r"'flex' cannot run here.*float64"):
        neighborhood.attend(q, q, q, 7, path="flex")
    assert "gradient" in (kernels.flex_refuses(q.float(), q, q, lse=False) or "")
    assert "log-sum-exp" in (kernels.flex_refuses(*[q.detach().float()] * 3, lse=True) or "")


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ({"kernel_size": 1}, "kernel_size is 1"),
        ({"kernel_size": 7}, "spans 7 positions, but the axis has 6"),
        ({"kernel_size": 3, "dilation": 3}, "spans 9 positions"),
        ({"kernel_size": 3, "stride": 4}, "stride 4"),
        ({"kernel_size": (3, 3, 3)}, "3 values for 2 axes"),
        ({"kernel_size": 3, "path": "fast"}, "path is 'fast'"),
        ({"kernel_size": 3, "extra_k": torch.zeros(1, 2, 2, 4)}, "come together"),
    ],
)
def test_what_is_refused(named: dict[str, Any], says: str) -> None:
    q = torch.zeros(1, 6, 7, 2, 4)
    with pytest.raises(SettingsError, match=says):
        neighborhood.attend(q, q, q, **named)


def test_shapes_that_do_not_meet() -> None:
    q = torch.zeros(1, 6, 7, 4, 4)
    for k, v in ((q[..., :3, :], q[..., :3, :]), (q[:, 1:], q[:, 1:]), (q[..., 1:], q)):
        with pytest.raises(SettingsError, match="expected"):
            neighborhood.attend(q, k, v, 3)
    extra = torch.zeros(1, 2, 3, 4)
    with pytest.raises(SettingsError, match="extra_k"):
        neighborhood.attend(q, q, q, 3, extra_k=extra, extra_v=extra)
    with pytest.raises(SettingsError, match="4 axes"):
        neighborhood.attend(*[torch.zeros(1, 3, 3, 3, 3, 1, 4)] * 3, 3)


def unfolded(x: Tensor, size: int) -> Tensor:
    """Windows copied out: (B, h, w, H, d) to (B, h, w, H, d, size²)."""
    flat = x.permute(0, 3, 4, 1, 2).flatten(1, 2)
    copies = F.unfold(flat, size, padding=size // 2)
    return (
        copies.unflatten(1, (*x.shape[3:], -1))
        .unflatten(-1, x.shape[1:3])
        .permute(0, 4, 5, 1, 2, 3)
    )


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 3, 5]), st.integers(0, 99))
@settings(max_examples=40)
def test_cut_windows_are_copied_out_ones(h: int, w: int, size: int, seed: int) -> None:
    """Logits and sums of windows that are cut at the borders, and their gradients."""
    rng = torch.Generator().manual_seed(seed)

    def draw(width: int) -> Tensor:
        made = torch.randn(2, h, w, 2, width, generator=rng, dtype=torch.float64)
        return made.requires_grad_()

    q, k, v, weight = draw(3), draw(3), draw(3), draw(size**2)
    pairs = (
        (unfused.window_logits(q, k, size), (q[..., None] * unfolded(k, size)).sum(-2), (q, k)),
        (
            unfused.window_sum(weight, v, size),
            (unfolded(v, size) * weight[..., None, :]).sum(-1),
            (weight, v),
        ),
    )
    for got, expected, inputs in pairs:
        torch.testing.assert_close(got, expected)
        slope = torch.randn(got.shape, generator=rng, dtype=torch.float64)
        torch.testing.assert_close(
            torch.autograd.grad((got * slope).sum(), inputs),
            torch.autograd.grad((expected * slope).sum(), inputs),
        )
    seen = (unfolded(torch.ones_like(k), size) > 0)[0, :, :, 0, 0]
    assert torch.equal(unfused.inside((h, w), size), seen)
