"""Row moves against their plain twins, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from torch import Tensor

from tests.ops.strategies import features, generator
from transom.ops import reference, rows

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64]


def positions(data: DataObject, batch: int, count: int) -> Tensor:
    """(batch, K) positions, with repetitions, K from 0 to twice the number of rows."""
    k = data.draw(st.integers(0, 2 * count))
    return torch.randint(0, count, (batch, k), generator=generator(data.draw))


def added(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Twin of rows.add_, one row at a time."""
    out = x.clone()
    for item in range(len(x)):
        for place, value in zip(index[item], values[item], strict=True):
            out[item, place] += value
    return out


@given(st.data(), st.integers(1, 3), st.integers(1, 9), st.sampled_from(DTYPES))
def test_take(data: DataObject, batch: int, count: int, dtype: torch.dtype) -> None:
    x = (100 * data.draw(features(batch, count))).to(dtype)
    index = positions(data, batch, count)
    before = x.clone()
    out = rows.take(x, index)
    assert torch.equal(out, reference.take(x, index))
    assert out.is_contiguous()
    out += 1
    assert torch.equal(x, before), "the result shares memory with the input"


@given(st.data(), st.integers(1, 3), st.integers(1, 9))
def test_add(data: DataObject, batch: int, count: int) -> None:
    x = data.draw(features(batch, count, torch.float64))
    index = positions(data, batch, count)
    values = torch.randn(*index.shape, x.shape[2], dtype=x.dtype, generator=generator(data.draw))
    expected = added(x, index, values)
    out = rows.add_(x, index, values)
    assert out is x
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "expanded"])
def test_take_of_any_strides(layout: str) -> None:
    x = torch.randn(3, 5, 7)
    if layout == "permuted":
        x = torch.randn(5, 3, 7).transpose(0, 1)
    elif layout == "expanded":
        x = torch.randn(1, 5, 7).expand(3, -1, -1)
    index = torch.tensor([[0, 4], [2, 2], [3, 1]])
    assert torch.equal(rows.take(x, index), reference.take(x, index))


@given(st.data(), st.integers(1, 2), st.integers(1, 4))
def test_gradients(data: DataObject, batch: int, count: int) -> None:
    x = data.draw(features(batch, count, torch.float64)).requires_grad_()
    index = positions(data, batch, count)
    torch.autograd.gradcheck(lambda t: rows.take(t, index), x)
    values = torch.randn(*index.shape, x.shape[2], dtype=x.dtype).requires_grad_()
    torch.autograd.gradcheck(lambda t, v: rows.add_(t.clone(), index, v), (x, values))


def test_nothing_but_the_named_rows_is_read() -> None:
    """Rows nobody asked for are NaN; none of it may arrive."""
    x = torch.full((2, 6, 3), torch.nan)
    x[:, 1::2] = torch.randn(2, 3, 3)
    assert rows.take(x, torch.tensor([[1, 3], [5, 5]])).isfinite().all()
    rows.add_(x, torch.tensor([[1], [3]]), torch.ones(2, 1, 3))
    assert torch.equal(x.isnan().any(-1), torch.tensor([[True, False] * 3] * 2))
