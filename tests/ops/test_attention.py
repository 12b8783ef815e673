"""Fused and folded attention against the written-out one; the class row; exact copies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from torch import Tensor

from tests.ops.strategies import generator
from transom.ops import attention, merging, reference
from transom.ops.matching import Matching

WIDTHS = [8, 24, 63, 64]
Attend = Callable[..., Tensor]
FORMS = {"additive": attention.attend, "folded": attention.attend_folded}


def heads(width: int, count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """q, k, v (2, 3, count, width) and a key bias (2, 1, 1, count)."""
    q, k, v = (torch.randn(2, 3, count, width, dtype=torch.float64).to(dtype) for _ in range(3))
    size = torch.randint(1, 200, (2, count, 1)).float()
    bias = attention.key_bias(size, None, dtype)
    assert bias is not None
    return q, k, v, bias


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 7, 197])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward(form: str, count: int, width: int, dtype: torch.dtype) -> None:
    q, k, v, bias = heads(width, count, dtype)
    out = FORMS[form](q, k, v, bias)
    assert out.dtype == dtype
    assert out.shape == v.shape
    expected = reference.attention(q, k, v, bias, width**-0.5)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    scaled = FORMS[form](q, k, v, bias, scale=0.3)
    expected = reference.attention(q, k, v, bias, 0.3)
    torch.testing.assert_close(scaled, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(form: str, width: int, dtype: torch.dtype) -> None:
    """As far from the truth as one rounding of the output and of the bias, no further."""
    q, k, v, bias = heads(width, 65, dtype)
    exact = [t.float() for t in (q, k, v, bias)]
    expected = reference.attention(*exact, width**-0.5)
    out = FORMS[form](q, k, v, bias)
    assert out.dtype == dtype
    limit = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.float(), expected, atol=limit, rtol=limit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fold_keeps_a_precise_bias(dtype: torch.dtype) -> None:
    """Two channels carry what one number of half precision cannot."""
    q, k, v, _ = heads(64, 65, dtype)
    size = torch.randint(1, 5000, (2, 65, 1)).float()
    bias = attention.key_bias(size, None, torch.float32)
    assert bias is not None
    expected = reference.attention(q.float(), k.float(), v.float(), bias, 64**-0.5)
    folded = (attention.attend_folded(q, k, v, bias).float() - expected).abs().max()
    added = (attention.attend(q, k, v, bias.to(dtype)).float() - expected).abs().max()
    assert folded <= added + torch.finfo(dtype).eps


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", WIDTHS)
def test_backward(form: str, width: int) -> None:
    inputs = [t.requires_grad_() for t in heads(width, 7, torch.float64)[:3]]
    bias = heads(width, 7, torch.float64)[3]
    weight = torch.randn_like(inputs[2])
    tolerance = {"atol": 1e-6, "rtol": 1e-6}
    got = torch.autograd.grad((FORMS[form](*inputs, bias) * weight).sum(), inputs)
    out = reference.attention(*inputs, bias, width**-0.5)
    for a, b in zip(got, torch.autograd.grad((out * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("query", [0, 3])
def test_the_row_of_one_query(query: int) -> None:
    q, k, _, bias = heads(24, 11, torch.float64)
    pairs = torch.randn(2, 3, 11, 11, dtype=torch.float64)
    share = torch.tensor([0.5, -0.25, 1.0], dtype=torch.float64)
    for given_bias in (None, bias, pairs):
        logits = q @ k.mT * 0.2 + (0 if given_bias is None else given_bias)
        probs = logits.softmax(-1)[:, :, query]
        row = attention.row(q, k, given_bias, 0.2, query)
        torch.testing.assert_close(row, probs.mean(1))
        torch.testing.assert_close(row.sum(-1), torch.ones(2, dtype=torch.float64))
        weighed = attention.row(q, k, given_bias, 0.2, query, share)
        torch.testing.assert_close(weighed, (probs * share[:, None]).sum(1))


def test_a_bias_of_nothing() -> None:
    assert attention.key_bias(None, None, torch.float32) is None
    ones = attention.key_bias(torch.ones(2, 5, 1), None, torch.bfloat16)
    assert ones is not None
    assert ones.shape == (2, 1, 1, 5)
    assert ones.dtype == torch.bfloat16
    assert (ones == 0).all()


@given(st.data(), st.integers(2, 9), st.integers(1, 4), st.sampled_from(sorted(FORMS)))
def test_a_copy_merged_into_its_original_changes_no_other(
    data: DataObject, count: int, copies: int, form: str
) -> None:
    """Proportional attention is exact: merging equal tokens leaves every output as it was."""
    rng = generator(data.draw)
    x = torch.randn(2, count, 8, dtype=torch.float64, generator=rng)
    project = torch.randn(3, 8, 8, dtype=torch.float64, generator=rng)
    picked = data.draw(st.integers(0, count - 1))
    longer = torch.cat([x, x[:, picked : picked + 1].expand(-1, copies, -1)], 1)

    matching = Matching(
        torch.arange(count).expand(2, -1),
        torch.arange(count, count + copies).expand(2, -1),
        torch.full((2, copies), picked),
    )
    merged = merging.merge(longer, matching)
    torch.testing.assert_close(merged, x, atol=1e-12, rtol=0)
    size = merging.merged_size(None, matching, torch.float64)
    assert size[0, :, 0].tolist() == [1 + copies * (i == picked) for i in range(count)]

    def outputs(tokens: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = ((tokens @ p)[:, None] for p in project)
        if bias is None:
            return reference.attention(q, k, v, None, 8**-0.5)
        return FORMS[form](q, k, v, bias)

    bias = attention.key_bias(size, None, torch.float64)
    expected = outputs(longer, None)[:, :, :count]
    torch.testing.assert_close(outputs(merged, bias), expected, atol=1e-6, rtol=0)
    without = outputs(merged, torch.zeros(2, 1, 1, count, dtype=torch.float64))
    assert (without - expected).abs().max() > 1e-6, "the bias is not needed after all"
