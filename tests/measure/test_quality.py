"""Measures of quality: known values, shapes, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from transom.errors import DataError
from transom.measure import quality


def test_top_k() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    labels = torch.tensor([0, 1, 0])
    assert quality.top_k(logits, labels).tolist() == [1, 0, 0]
    assert quality.top_k(logits, labels, 2).tolist() == [1, 1, 0]
    assert quality.top_k(logits, labels, 5).tolist() == [1, 1, 1]  # fewer than 5 classes


def test_agreement_of_classes_and_of_places() -> None:
    a, b = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[0.0, 5.0], [0.0, 5.0]])
    assert quality.agreement(a, b).tolist() == [1, 0]
    dense = torch.zeros(1, 2, 2, 2)
    dense[:, 1, 0, 0] = 1
    assert quality.agreement(dense, torch.zeros_like(dense)).tolist() == [0.75]


def test_cosine_and_correlation() -> None:
    x = torch.randn(4, 1, 5, 5)
    assert torch.allclose(quality.cosine(x, 3 * x), torch.ones(4).double())
    assert torch.allclose(quality.correlation(x, 3 * x + 7), torch.ones(4).double())
    assert torch.allclose(quality.correlation(x, -x), -torch.ones(4).double())
    y = torch.randn(4, 1, 5, 5)
    pairs = torch.stack([x.flatten(1), y.flatten(1)], dim=1).double()  # (4, 2, 25)
    expected = torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs])
    assert torch.allclose(quality.correlation(x, y), expected)


def test_correlation_of_constant_maps() -> None:
    one = torch.ones(1, 4, 4)
    assert quality.correlation(one, one).tolist() == [1]
    assert quality.correlation(one, torch.randn(1, 4, 4)).tolist() == [0]


def test_differences() -> None:
    a = torch.zeros(2, 3, 3)
    b = torch.stack([torch.ones(3, 3), torch.zeros(3, 3)])
    assert quality.mean_absolute_difference(a, b).tolist() == [1, 0]
    logits = torch.tensor([[0.0, 0.0]])
    shifted = torch.tensor([[math.log(3.0), 0.0]])  # probabilities 3/4 and 1/4
    assert quality.kl(logits, logits).item() == 0
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert quality.kl(logits, shifted).item() == pytest.approx(expected, abs=1e-6)


def test_small_distances_are_not_lost_in_rounding() -> None:
    x = torch.randn(1, 1000)
    moved = x.clone()
    moved[0, 0] += 1e-3
    assert 0 < 1 - quality.cosine(x, moved).item() < 1e-6


@pytest.mark.parametrize("measure", [quality.cosine, quality.correlation, quality.kl])
def test_other_shapes_are_refused_with_both_named(measure: object) -> None:
    with pytest.raises(DataError, match=r"\(2, 5, 8\).*\(2, 9, 8\).*restore='end'"):
        measure(torch.randn(2, 5, 8), torch.randn(2, 9, 8))  # type: ignore[operator]


def test_labels_beyond_the_head_are_refused() -> None:
    with pytest.raises(DataError, match="from 0 to 7, but the head has 3 classes"):
        quality.top_k(torch.randn(2, 3), torch.tensor([0, 7]))
    with pytest.raises(DataError, match=r"logits \(B, C\) and labels \(B,\)"):
        quality.top_k(torch.randn(2, 3), torch.tensor([0]))
