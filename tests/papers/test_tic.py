"""MSA-Conv against a loop over pixels, and what happens at borders."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import Tensor

import transom
from transom.errors import SettingsError
from transom.papers.attention.tic import WindowAttention
from transom.papers.attention.tic.operator import (
    MSAConv2d,
    rolled,
    unfolded,
    window_dots,
    window_sum,
    windows,
)
from transom.tokens import Layout, Record


def looped(
    q: Tensor, k: Tensor, v: Tensor, kernel: tuple[int, int], dilation: int, *, masked: bool = False
) -> Tensor:
    """The operator as its equation says it, pixel by pixel, on (C, h, w)."""
    h, w = q.shape[-2:]
    out = torch.zeros_like(v)
    for y in range(h):
        for x in range(w):
            logits, values = [], []
            for a in range(kernel[0]):
                for b in range(kernel[1]):
                    i, j = (
                        y + dilation * (a - kernel[0] // 2),
                        x + dilation * (b - kernel[1] // 2),
                    )
                    inside = 0 <= i < h and 0 <= j < w
                    if inside:
                        logits.append(q[:, y, x] @ k[:, i, j])
                        values.append(v[:, i, j])
                    elif not masked:
                        logits.append(q.new_zeros(()))
                        values.append(torch.zeros_like(v[:, 0, 0]))
            out[:, y, x] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


def drawn(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return q, k, v


@pytest.mark.parametrize("kernel", [(3, 3), (5, 1), (1, 5), (1, 1)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_is_the_loop(kernel: tuple[int, int], dilation: int) -> None:
    q, k, v = drawn(2, 4, 6, 7)
    weight = window_dots(q, k, kernel, dilation).softmax(1)
    got = window_sum(weight, v, kernel, dilation)
    for item in range(2):
        expected = looped(q[item], k[item], v[item], kernel, dilation)
        torch.testing.assert_close(got[item], expected)


def test_one_operator_gives_the_same_windows() -> None:
    x = drawn(2, 4, 6, 7)[0]
    for kernel, dilation in ((3, 1), ((5, 1), 2), ((1, 3), (2, 3))):
        expected = torch.stack(windows(x, kernel, dilation), 2)
        assert torch.equal(unfolded(x, kernel, dilation), expected)


def test_compiled_block_is_the_block() -> None:
    block = MSAConv2d(10, 10, num_heads=5, shift=True).eval()
    x = torch.randn(1, 10, 8, 8)
    program = torch.export.export(block, (x,))
    torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.parametrize(("border", "part"), [("zero", 4 / 9), ("mask", 1.0)])
def test_a_corner_tells_the_border_rules_apart(border: str, part: float) -> None:
    """With equal logits of 0 the four neighbours inside share the mass, or get 4 of 9 parts."""
    operator = WindowAttention(3, 1, border == "mask")
    v = torch.ones(1, 1, 16, 2)
    record = Record(Layout(0, (4, 4), 16))
    q = torch.zeros_like(v)
    y = operator(q, q, v, bias=None, scale=1.0, record=record)
    assert y[0, 0, 0, 0].item() == pytest.approx(part)
    assert y[0, 0, 5, 0].item() == pytest.approx(1)


def test_heads_and_prefix_of_a_host() -> None:
    """Patches see their window and the prefix, the prefix sees everything."""
    q, k, v = drawn(1, 2, 2 + 20, 3)
    record = Record(Layout(2, (4, 5), 22))
    y = WindowAttention(3, 1, True)(q, k, v, bias=None, scale=0.5, record=record)
    allowed = torch.ones(22, 22, dtype=torch.bool)
    places = torch.cartesian_prod(torch.arange(4), torch.arange(5))
    near = (places[:, None] - places).abs().amax(-1) <= 1
    allowed[2:, 2:] = near
    logits = (q @ k.mT * 0.5).masked_fill(~allowed, -math.inf)
    torch.testing.assert_close(y, logits.softmax(-1) @ v)


@pytest.mark.parametrize("rows", [1, 22])
@pytest.mark.parametrize("kernel", [5, 7, 9, 255])
def test_bias_of_a_host_is_taken_from_the_window(rows: int, kernel: int) -> None:
    """Up to windows that reach over all rows (7), or over everything (9, 255)."""
    q, k, v = drawn(1, 2, 22, 3)
    bias = torch.randn(1, 2, rows, 22, dtype=torch.float64)
    record = Record(Layout(2, (4, 5), 22))
    places = torch.cartesian_prod(torch.arange(4), torch.arange(5))
    far = (places[:, None] - places).abs().amax(-1) > kernel // 2
    logits = q @ k.mT * 0.5 + bias
    logits[..., 2:, 2:].masked_fill_(far, -math.inf)
    y = WindowAttention(kernel, 1, True)(q, k, v, bias=bias, scale=0.5, record=record)
    torch.testing.assert_close(y, logits.softmax(-1) @ v)


def test_groups_of_heads_look_in_five_directions() -> None:
    x = torch.randn(1, 5, 1, 8, 12)
    moved = rolled(x)
    for head, shift in enumerate(((0, 0), (-2, 0), (2, 0), (0, -3), (0, 3))):
        assert torch.equal(moved[:, head], x[:, head].roll(shift, (-2, -1)))


@torch.no_grad()
def test_images_of_any_size() -> None:
    model = timm.create_model("tic_tiny", num_classes=3).eval()
    for size in ((32, 32), (50, 70), (33, 129)):
        assert model(torch.randn(1, 3, *size)).shape == (1, 3)


def test_even_windows_are_refused() -> None:
    with pytest.raises(SettingsError, match="odd"):
        transom.apply(timm.create_model("vit_tiny_patch16_224", depth=1), "tic", kernel=4)
    with pytest.raises(SettingsError, match="heads"):
        MSAConv2d(16, 16, num_heads=5)
