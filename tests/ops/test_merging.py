"""Merging and spreading against their plain twins, and what must hold for every matching."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from torch import Tensor

from tests.ops.strategies import features, generator, matchings
from transom.ops import merging, reference
from transom.ops.matching import Matching

BATCH, COUNT = st.integers(1, 3), st.integers(1, 13)


def sizes(data: DataObject, batch: int, count: int, dtype: torch.dtype) -> Tensor | None:
    """(batch, count, 1) whole numbers, or None."""
    if data.draw(st.booleans()):
        return None
    return torch.randint(1, 9, (batch, count, 1), generator=generator(data.draw)).to(dtype)


def merged(x: Tensor, matching: Matching, mode: str) -> Tensor:
    """Sum or maximum over each group, one token at a time."""
    out = reference.take(x, matching.keep)
    for item in range(len(x)):
        for old, new in zip(matching.source[item], matching.into[item], strict=True):
            a, b = out[item, new], x[item, old]
            out[item, new] = a + b if mode == "sum" else torch.maximum(a, b)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(st.data(), BATCH, COUNT)
def test_mean(dtype: torch.dtype, data: DataObject, batch: int, count: int) -> None:
    x = data.draw(features(batch, count, dtype))
    matching, size = data.draw(matchings(batch, count)), sizes(data, batch, count, dtype)
    out = merging.merge(x, matching, size=size)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    expected = reference.merge(x, matching, size)
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(st.data(), BATCH, COUNT)
def test_mean_in_half_precision(
    dtype: torch.dtype, data: DataObject, batch: int, count: int
) -> None:
    """A few roundings away from the mean in float32, however large the group."""
    x = data.draw(features(batch, count)).to(dtype)
    matching, size = data.draw(matchings(batch, count)), sizes(data, batch, count, torch.float32)
    out = merging.merge(x, matching, size=size)
    assert out.dtype == dtype
    expected = reference.merge(x.float(), matching, size)
    limit = 8 * torch.finfo(dtype).eps * max(1.0, float(x.abs().max()))
    torch.testing.assert_close(out.float(), expected, atol=limit, rtol=0)


@pytest.mark.parametrize("mode", ["sum", "max"])
@given(st.data(), BATCH, COUNT)
def test_other_reductions(mode: Any, data: DataObject, batch: int, count: int) -> None:
    x = data.draw(features(batch, count, torch.float64))
    matching = data.draw(matchings(batch, count))
    expected = merged(x, matching, mode)
    torch.testing.assert_close(merging.merge(x, matching, mode), expected)


@given(st.data(), st.integers(1, 2), st.integers(1, 5), st.sampled_from(["mean", "sum", "max"]))
def test_gradients(data: DataObject, batch: int, count: int, mode: Any) -> None:
    x = data.draw(features(batch, count, torch.float64)).requires_grad_()
    matching, size = data.draw(matchings(batch, count)), sizes(data, batch, count, torch.float64)
    size = size if mode == "mean" else None
    assert torch.autograd.gradcheck(lambda t: merging.merge(t, matching, mode, size), x)
    if mode == "mean":
        weight = torch.randn(batch, matching.keep.shape[1], x.shape[2], dtype=x.dtype)
        (one,) = torch.autograd.grad((merging.merge(x, matching, size=size) * weight).sum(), x)
        (two,) = torch.autograd.grad((reference.merge(x, matching, size) * weight).sum(), x)
        torch.testing.assert_close(one, two)


@given(st.data(), BATCH, COUNT)
def test_the_input_is_left_alone(data: DataObject, batch: int, count: int) -> None:
    x = data.draw(features(batch, count))
    before, matching = x.clone(), data.draw(matchings(batch, count))
    for mode in ("mean", "sum", "max"):
        merging.merge(x, matching, mode)  # type: ignore[arg-type]
    assert torch.equal(x, before)


@given(st.data(), BATCH, COUNT)
def test_equal_tokens_merge_to_themselves(data: DataObject, batch: int, count: int) -> None:
    x = data.draw(features(batch, 1)).expand(-1, count, -1)
    matching = data.draw(matchings(batch, count))
    out = merging.merge(x, matching)
    assert torch.equal(out, x[:, : out.shape[1]])


@given(st.data(), BATCH, COUNT)
def test_sizes_sum_to_the_count(data: DataObject, batch: int, count: int) -> None:
    matching, size = (
        data.draw(matchings(batch, count)),
        sizes(data, batch, count, torch.float32),
    )
    out = merging.merged_size(size, matching, torch.float32)
    total = torch.full((batch, 1), float(count)) if size is None else size.sum(1)
    assert torch.equal(out.sum(1), total)
    member = reference.membership(matching, count)
    ones = torch.ones(batch, count, 1) if size is None else size
    assert torch.equal(out, member @ ones)


@given(st.data(), BATCH, COUNT)
def test_spread_gives_each_token_its_group(data: DataObject, batch: int, count: int) -> None:
    matching = data.draw(matchings(batch, count))
    y = data.draw(features(batch, matching.keep.shape[1]))
    target = matching.target(count)
    out = merging.spread(y, target)
    for item in range(batch):
        for old in range(count):
            assert torch.equal(out[item, old], y[item, target[item, old]])


@given(st.data(), BATCH, COUNT)
def test_spread_of_dropped_tokens(data: DataObject, batch: int, count: int) -> None:
    matching = data.draw(matchings(batch, count))
    nothing = matching.source[:, :0]
    target = Matching(matching.keep, nothing, nothing).target(count)
    y = data.draw(features(batch, matching.keep.shape[1]))
    gone = target < 0
    assert (merging.spread(y, target)[gone] == 0).all()
    missing = torch.full((batch, count, y.shape[2]), torch.nan)
    missing[gone] = 7.0
    out = merging.spread(y, target, missing)
    assert (out[gone] == 7).all()
    assert torch.equal(reference.take(out, matching.keep), y)
