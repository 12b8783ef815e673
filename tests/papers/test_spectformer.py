"""What the spectral gate means: a circular convolution, on any grid."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor

import transom
from transom.errors import FitError, SettingsError
from transom.papers.attention.spectformer import (
    HierarchicalSpectFormer,
    IsotropicSpectFormer,
    filtered,
    filtered_by_matrices,
    resized,
)
from transom.papers.attention.spectformer.isotropic import fitted_state

GRIDS = [(6, 5), (5, 6), (4, 4), (1, 4), (1, 1)]


def drawn(h: int, w: int) -> tuple[Tensor, Tensor]:
    """A map (2, h, w, 3) and a weight for it, in float64."""
    generator = torch.Generator().manual_seed(h * 10 + w)
    x = torch.randn(2, h, w, 3, generator=generator, dtype=torch.float64)
    return x, torch.randn(h, w // 2 + 1, 3, 2, generator=generator, dtype=torch.float64)


def ones(h: int, w: int) -> Tensor:
    weight = torch.zeros(h, w // 2 + 1, 3, 2, dtype=torch.float64)
    weight[..., 0] = 1
    return weight


@pytest.mark.parametrize("grid", GRIDS)
def test_a_weight_of_one_changes_nothing(grid: tuple[int, int]) -> None:
    x, _ = drawn(*grid)
    torch.testing.assert_close(filtered(x, ones(*grid)), x)


def test_a_phase_is_a_shift() -> None:
    x, _ = drawn(6, 5)
    angle = -2 * torch.pi * 2 * torch.arange(6, dtype=torch.float64) / 6
    weight = torch.stack([angle.cos(), angle.sin()], -1)[:, None, None].expand(6, 3, 3, 2)
    torch.testing.assert_close(filtered(x, weight.contiguous()), x.roll(2, 1))


@pytest.mark.parametrize("grid", GRIDS)
def test_is_a_circular_convolution(grid: tuple[int, int]) -> None:
    (h, w), (x, weight) = grid, drawn(*grid)
    kernel = torch.fft.irfft2(torch.view_as_complex(weight), s=grid, dim=(0, 1))
    expected = sum(kernel[a, b] * x.roll((a, b), (1, 2)) for a in range(h) for b in range(w))
    torch.testing.assert_close(filtered(x, weight), expected)


@pytest.mark.parametrize("grid", GRIDS)
def test_matrices_give_the_same_with_gradients(grid: tuple[int, int]) -> None:
    both = []
    for form in (filtered, filtered_by_matrices):
        x, weight = (t.requires_grad_() for t in drawn(*grid))
        y = form(x, weight)
        both.append((y, *torch.autograd.grad(y.sin().sum(), (x, weight))))
    torch.testing.assert_close(both[0], both[1])


@pytest.mark.parametrize("larger", [(8, 8), (9, 7), (6, 9)])
@pytest.mark.parametrize("grid", [(6, 5), (5, 6), (4, 4)])
def test_resized_filter_keeps_its_kernel(grid: tuple[int, int], larger: tuple[int, int]) -> None:
    x, weight = drawn(*grid)
    grown = resized(weight, grid, larger)
    assert grown.shape == (larger[0], larger[1] // 2 + 1, 3, 2)
    torch.testing.assert_close(filtered(x, resized(grown, larger, grid)), filtered(x, weight))
    torch.testing.assert_close(resized(ones(*grid), grid, larger), ones(*larger))


def small(kind: str, size: int = 64) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "isotropic":
        return IsotropicSpectFormer(size, 8, embed_dim=24, depth=3, alpha=2, num_classes=3).eval()
    dims = (8, 8, 16, 16)
    return HierarchicalSpectFormer(
        size,
        stem_hidden_dim=8,
        embed_dims=dims,
        num_heads=(1, 1, 2, 2),
        mlp_ratios=(2,) * 4,
        depths=(1,) * 4,
        num_classes=3,
    ).eval()


@pytest.mark.parametrize("kind", ["isotropic", "hierarchical"])
@torch.no_grad()
def test_another_image_size_is_the_same_in_every_way(kind: str) -> None:
    """For one call, in place, and when the state dict is loaded into a model of that size."""
    x = torch.randn(2, 3, 96, 96)
    model = small(kind)
    expected = model(x)
    built = small(kind, 96)
    built.load_state_dict(fitted_state(model.state_dict(), built))
    torch.testing.assert_close(built(x), expected)
    model.set_input_size(96)
    torch.testing.assert_close(model(x), expected)
    assert model(torch.randn(1, 3, 80, 48)).shape == (1, 3)


@torch.no_grad()
def test_token_labels_count_half() -> None:
    model, x = small("hierarchical"), torch.randn(2, 3, 64, 64)
    tokens = model.forward_features(x)
    expected = model.head(tokens[:, 0]) + 0.5 * model.aux_head(tokens[:, 1:]).amax(1)
    torch.testing.assert_close(model(x), expected)


@torch.no_grad()
def test_pruned_features_are_those_of_the_whole() -> None:
    torch.manual_seed(0)
    model = timm.create_model("spectformer_h_s", features_only=True, out_indices=(0, 2)).eval()
    torch.manual_seed(0)
    whole = timm.create_model("spectformer_h_s").eval()
    x = torch.randn(1, 3, 64, 64)
    expected = whole.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    torch.testing.assert_close(model(x), expected)
    assert sum(p.numel() for p in model.parameters()) < 0.7 * sum(
        p.numel() for p in whole.parameters()
    )


@torch.no_grad()
def test_prefix_tokens_wait_for_the_attention_blocks() -> None:
    host = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval()
    transom.apply(host, "spectformer", alpha=1)
    mixer = transom.fittings(host)[0].fills[0].mixer
    seen: list[Tensor] = []
    mixer.register_forward_hook(lambda module, args, out: seen.append(out))
    host(torch.randn(1, 3, 64, 64))
    assert not seen[0][:, 0].any()
    assert seen[0][:, 1:].any()


def test_heads_have_to_divide_the_width() -> None:
    with pytest.raises(SettingsError, match="heads"):
        IsotropicSpectFormer(embed_dim=256, num_heads=6)
    with pytest.raises(SettingsError, match="alpha"):
        IsotropicSpectFormer(depth=2, alpha=3)


def test_a_class_token_needs_attention_somewhere() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2
    )
    with pytest.raises(FitError, match="never see a patch"):
        transom.apply(model, "spectformer", alpha=3)
    transom.apply(model, "spectformer")
    assert [bool(f.slots()) for f in transom.fittings(model)[0].fills] == [True, False, False]
