"""Aligned relative logits against a lookup of every pair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from torch import Tensor

from tests.ops.strategies import generator
from transom.ops import reference, relative

DTYPES = [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)]
Case = tuple[Tensor, Tensor, Tensor]


def drawn(data: DataObject, count: int, reach: int, dtype: torch.dtype) -> Case:
    """q (B, H, L, d), a table (2P, H, d) and its biases (2P, H)."""
    rng = generator(data.draw)
    batch, heads, width = (data.draw(st.integers(1, 3)) for _ in range(3))
    shapes = ((batch, heads, count, width), (2 * reach, heads, width), (2 * reach, heads))
    q, table, bias = (torch.randn(s, generator=rng).to(dtype) for s in shapes)
    return q, table, bias


@pytest.mark.parametrize(("dtype", "limit"), DTYPES)
@given(st.data(), st.integers(1, 7), st.integers(0, 5), st.integers(1, 14))
def test_a_sequence(
    dtype: torch.dtype, limit: float, data: DataObject, count: int, memory: int, reach: int
) -> None:
    """Any length, keys in front, behind or neither, and tables that are long enough or not."""
    case = drawn(data, count, reach, dtype)
    full = torch.promote_types(dtype, torch.float32)
    ours = [t.clone().requires_grad_() for t in case]
    plain = [t.to(full).requires_grad_() for t in case]
    keys = count + memory
    first = data.draw(st.sampled_from([None, *range(memory + 1)]))
    got = relative.logits(ours[0], ours[1], keys, ours[2], first)
    places = torch.arange(keys)
    asking = places[memory if first is None else first :][:count]
    expected = reference.relative_logits(plain[0], plain[1], asking, places, plain[2])
    assert got.dtype == dtype
    torch.testing.assert_close(got.to(full), expected, atol=limit, rtol=limit)
    cotangent = torch.randn(expected.shape, generator=generator(data.draw), dtype=full)
    (got.to(full) * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    for a, b in zip(ours, plain, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad.to(full), b.grad, atol=4 * limit, rtol=4 * limit)


@pytest.mark.parametrize(("dtype", "limit"), DTYPES)
@given(st.data(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_a_grid(
    dtype: torch.dtype, limit: float, data: DataObject, h: int, w: int, reach: int
) -> None:
    q, rows, down = drawn(data, h * w, reach, dtype)
    columns, across = rows.flip(0) * 0.5, down.flip(0) * 2
    full = torch.promote_types(dtype, torch.float32)
    ours = [t.clone().requires_grad_() for t in (q, rows, columns, down, across)]
    plain = [t.to(full).requires_grad_() for t in (q, rows, columns, down, across)]
    got = relative.grid_logits(*ours[:3], (h, w), (ours[3], ours[4]))
    y = torch.arange(h).repeat_interleave(w)
    x = torch.arange(w).repeat(h)
    a, b, c, d, e = plain
    expected = reference.relative_logits(a, b, y, y, d) + reference.relative_logits(a, c, x, x, e)
    assert got.dtype == dtype
    torch.testing.assert_close(got.to(full), expected, atol=limit, rtol=limit)
    cotangent = torch.randn(expected.shape, generator=generator(data.draw), dtype=full)
    (got.to(full) * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad.to(full), theirs.grad, atol=6 * limit, rtol=6 * limit)


def test_one_grid_row_is_a_sequence() -> None:
    q, table = torch.randn(2, 3, 5, 4), torch.randn(16, 3, 4)
    none = torch.zeros_like(table)
    got = relative.grid_logits(q, none, table, (1, 5))
    torch.testing.assert_close(got, relative.logits(q, table, 5))
