"""Batch statistics of tokens, and folding them, against the definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

from transom.ops import reference, token_norm


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape).double()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("padded", [False, True])
def test_batch_norm_in_training(padded: bool) -> None:
    x, weight, bias = draw(2, 7, 5), draw(5), draw(5)
    valid = torch.rand(2, 7) > 0.3 if padded else None
    mean, var = torch.zeros(5).double(), torch.ones(5).double()
    y = token_norm.batch_norm(
        x, mean, var, weight, bias, training=True, momentum=0.2, eps=1e-3, valid=valid
    )
    torch.testing.assert_close(y, reference.batch_norm(x, weight, bias, 1e-3, valid))
    tokens = x.flatten(0, 1) if valid is None else x[valid]
    torch.testing.assert_close(mean, 0.2 * tokens.mean(0))
    torch.testing.assert_close(var, 0.8 + 0.2 * tokens.var(0))


@pytest.mark.parametrize("affine", [False, True])
def test_a_batch_norm_is_its_scale_and_shift(affine: bool) -> None:
    x, mean, var = draw(3, 5), draw(5), torch.rand(5).double() + 0.5
    weight, bias = (draw(5), draw(5)) if affine else (None, None)
    scale, shift = token_norm.batch_norm_affine(mean, var, weight, bias, 1e-3)
    expected = F.batch_norm(x, mean, var, weight, bias, False, 0.1, 1e-3)
    torch.testing.assert_close(x * scale + shift, expected)


@pytest.mark.parametrize("biased", [False, True])
def test_into_the_next_map(biased: bool) -> None:
    x, scale, shift = draw(2, 5, 6, 6), draw(5), draw(5)
    moved = x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    bias = draw(4) if biased else None
    matrix, kernel = draw(4, 5), draw(4, 5, 3, 2)
    new = token_norm.into_next(matrix, bias, scale, shift)
    torch.testing.assert_close(
        F.linear(x.permute(0, 2, 3, 1), *new), F.linear(moved.permute(0, 2, 3, 1), matrix, bias)
    )
    new = token_norm.into_next(kernel, bias, scale, shift)
    torch.testing.assert_close(F.conv2d(x, *new), F.conv2d(moved, kernel, bias))


@pytest.mark.parametrize("biased", [False, True])
def test_into_the_previous_map(biased: bool) -> None:
    x, scale, shift = draw(2, 4, 6, 6), draw(6), draw(6)
    kernel, bias = draw(6, 2, 3, 3), draw(6) if biased else None
    new = token_norm.into_previous(kernel, bias, scale, shift)
    expected = F.conv2d(x, kernel, bias, padding=1, groups=2)
    expected = expected * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    torch.testing.assert_close(F.conv2d(x, *new, padding=1, groups=2), expected)


def test_knows_the_second_pass_of_checkpointing() -> None:
    seen = []

    def run(x: Tensor) -> Tensor:
        seen.append(token_norm.recomputing())
        return x.square()

    x = torch.ones(2, requires_grad=True)
    torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False).sum().backward()
    assert seen == [False, True]
