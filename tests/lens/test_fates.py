"""Token fates on a picture."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

import transom
from transom.errors import DataError, TokensError
from transom.lens.fates import draw_fates
from transom.tokens import Layout

GRID = Layout(prefix=1, grid=(2, 3), count=7)


def picture(height: int = 40, width: int = 60) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    return pixels.astype(np.uint8)


def test_patches_that_stay_alone_are_untouched() -> None:
    image = picture()
    drawn = draw_fates(image, torch.arange(7), GRID)
    assert np.array_equal(drawn, image) and drawn is not image


def test_merged_patches_share_their_mean_and_are_outlined() -> None:
    image = picture()
    index = torch.tensor([0, 1, 1, 2, 3, 4, 5])  # the first two patches became one token
    drawn = draw_fates(image, index, GRID)
    mean = image[:20, :40].reshape(-1, 3).astype(float).mean(0)
    assert np.abs(drawn[10, 10] - mean).max() <= 1
    assert np.array_equal(drawn[5:15, 5:35].reshape(-1, 3).std(0), np.zeros(3))  # no line between
    assert not np.array_equal(drawn[19, 10], drawn[10, 10])  # a line towards the patch below
    assert np.array_equal(drawn[20:], image[20:]) and np.array_equal(drawn[:, 40:], image[:, 40:])


def test_patches_far_apart_in_one_group() -> None:
    image = picture()
    drawn = draw_fates(image, torch.tensor([0, 1, 2, 3, 4, 5, 1]), GRID)
    assert np.array_equal(drawn[10, 10], drawn[30, 50])


def test_dropped_patches() -> None:
    image = picture()
    index = np.array([0, -1, 1, 2, 3, 4, 5])
    dim = draw_fates(image, index, GRID)
    assert dim[:20, :20].mean() < 0.3 * image[:20, :20].mean()
    assert np.array_equal(dim[:, 20:], image[:, 20:])
    assert (draw_fates(image, index, GRID, dropped="hide")[:20, :20] == 128).all()


def test_sizes_that_are_no_multiple_of_the_grid() -> None:
    assert draw_fates(picture(41, 67), torch.full((7,), -1), GRID).shape == (41, 67, 3)


def test_the_trace_of_a_real_call() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, depth=2, embed_dim=24, num_heads=2
    ).eval()
    transom.apply(model, "tome", r=16)
    with torch.inference_mode(), transom.trace(model) as trace:
        model(torch.randn(2, 3, 32, 32))
    record = trace.tokens[-1]
    assert record.index is not None
    image = picture(64, 64)
    drawn = draw_fates(image, record.index[1], record.layout)
    share = (drawn != image).any(-1).mean()
    assert 33 / 64 <= share < 1  # 32 patches moved into at least one other


@pytest.mark.parametrize(
    ("image", "index", "layout", "error", "message"),
    [
        (picture().astype(float), torch.arange(7), GRID, DataError, "float64"),
        (picture()[..., 0], torch.arange(7), GRID, DataError, r"\(H, W, 3\)"),
        (picture(1, 60), torch.arange(7), GRID, DataError, "1×60 pixels"),
        (picture(), torch.arange(6), GRID, TokensError, r"shape \(6,\)"),
        (picture(), torch.zeros(2, 7), GRID, TokensError, "index"),
        (picture(), torch.arange(7), Layout(1, None, 7), TokensError, "grid"),
    ],
)
def test_bad_input(
    image: np.ndarray, index: torch.Tensor, layout: Layout, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        draw_fates(image, index, layout)
