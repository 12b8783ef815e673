"""Neighborhood attention on hosts: what a patch and a prefix token see."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import transom
from tests.common.hosts import HOSTS, call, images, timm_vit
from transom.errors import SettingsError, TokensError
from transom.ops import neighborhood, reference
from transom.papers.attention.fna import FNA, Near, NeighborhoodAttention1D
from transom.tokens import Layout, Record


def operate(near: Near, prefix: int, grid: tuple[int, int], bias: Tensor | None) -> None:
    """Hold the operator against dense attention with a mask."""
    count = prefix + grid[0] * grid[1]
    q, k, v = torch.randn(3, 2, 3, count, 8, dtype=torch.float64)
    seen = neighborhood.dense_mask(neighborhood.axes(grid, (3, 2), (2, 1), (1, 2)))
    seen = F.pad(seen, (prefix, 0, prefix, 0), value=True)
    hidden = torch.zeros(count, count, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    expected = reference.attention(q, k, v, hidden if bias is None else hidden + bias, 0.3)
    out = near(q, k, v, bias=bias, scale=0.3, record=Record(Layout(prefix, grid, count)))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("biased", [False, True])
def test_patches_see_near_and_the_prefix_sees_all(prefix: int, biased: bool) -> None:
    near = Near((3, 2), (2, 1), (1, 2), (False, False))
    bias = torch.randn(1, 3, prefix + 20, prefix + 20, dtype=torch.float64) if biased else None
    operate(near, prefix, (4, 5), bias)


@torch.no_grad()
def test_a_window_over_the_grid_changes_nothing() -> None:
    model, x = HOSTS["timm-registers"](), images("timm-registers")
    plain = call(model, x)
    transom.apply(model, "fna", kernel_size=4)
    torch.testing.assert_close(call(model, x), plain, atol=1e-5, rtol=1e-5)
    transom.adjust(model, kernel_size=(4, 2))
    assert (call(model, x)[0] - plain[0]).abs().max() > 1e-3


@torch.no_grad()
def test_a_far_patch_is_not_seen() -> None:
    """Without a class token and with one block, an image changes only around what was changed."""
    model = timm_vit(class_token=False, num_classes=0, global_pool="", depth=1, img_size=64)
    transom.apply(model, FNA(3))
    x = torch.randn(1, 3, 64, 64)
    other = x.clone()
    other[..., :8, :8] = 0
    apart = (model(x) - model(other)).abs().sum(-1).reshape(8, 8) > 0
    # windows at the border are shifted: the patches at 0 and 1 see the one at 0
    assert apart.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_what_is_refused() -> None:
    for settings in ({"kernel_size": 1}, {"stride": 8}, {"dilation": 0}, {"kernel_size": (3, 1)}):
        with pytest.raises(SettingsError, match="expected"):
            FNA(**settings)
    module = NeighborhoodAttention1D(8, 2, 3)
    with pytest.raises(TokensError, match="1 axes"):
        module(torch.zeros(1, 4, 4, 8))
    with pytest.raises(SettingsError, match="num_heads"):
        NeighborhoodAttention1D(8, 3, 3)
