"""Shift equivariance: the roll written out, and logits of every circular shift."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from timm.models.twins import Twins
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import transom
from tests.common.cases import anatomy, close, same, unchanged
from tests.common.hosts import HOSTS, call, images, randomised
from tests.ops.strategies import generator
from transom.errors import FitError, HostError, TokensError
from transom.papers.attention.shift_equivariance import (
    AnchoredPatchEmbed,
    CircularPosition,
    PolyTwins,
    PolyViT,
    anchor,
    anchor_tokens,
    anchor_twins,
    norms,
    reference,
    release_twins,
)

few = settings(deadline=None, derandomize=True, max_examples=60)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@few
@given(st.data(), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_anchoring_is_a_roll(
    dtype: torch.dtype, data: DataObject, p: int, q: int, invariant: bool
) -> None:
    """Rectangles and strides of two numbers; values only move, so everything is exact."""
    rng = generator(data.draw)
    batch, channels = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    height, width = p * data.draw(st.integers(1, 4)), q * data.draw(st.integers(1, 4))
    x = torch.randn(batch, channels, height, width, generator=rng).to(dtype)
    ours, plain = (x.clone().requires_grad_() for _ in range(2))
    got, expected = anchor(ours, (p, q), invariant), reference(plain, (p, q), invariant)
    assert torch.equal(got, expected)
    cotangent = torch.randn(x.shape, generator=rng).to(dtype)
    for y in (got, expected):
        (y * cotangent).sum().backward()
    assert ours.grad is not None and plain.grad is not None
    assert torch.equal(ours.grad, plain.grad)


@few
@given(st.data(), st.integers(1, 4), st.integers(1, 4))
def test_a_shift_before_is_a_shift_of_whole_steps_behind(data: DataObject, p: int, q: int) -> None:
    rng = generator(data.draw)
    height, width = p * data.draw(st.integers(1, 4)), q * data.draw(st.integers(1, 4))
    x = torch.randn(2, 3, height, width, generator=rng)
    shift = (data.draw(st.integers(0, height)), data.draw(st.integers(0, width)))
    y, moved = anchor(x, (p, q)), anchor(x.roll(shift, (2, 3)), (p, q))
    for a, b in zip(y, moved, strict=True):
        steps = [(i, j) for i in range(0, height, p) for j in range(0, width, q)]
        assert any(torch.equal(a.roll(step, (1, 2)), b) for step in steps)
    once = anchor(x, (p, q), invariant=True)
    again = anchor(x.roll(shift, (2, 3)), (p, q), invariant=True)
    assert torch.equal(once, again)


def test_norms_of_polyphases() -> None:
    x = torch.randn(2, 3, 4, 6)
    expected = [x[:, :, a::2, b::3].flatten(1).norm(dim=1) for a in range(2) for b in range(3)]
    torch.testing.assert_close(norms(x, (2, 3)), torch.stack(expected, 1))
    strongest = norms(anchor(x, (2, 3)), (2, 3))
    assert (strongest.argmax(1) == 0).all()
    assert not (norms(x, (2, 3)).argmax(1) == 0).all()


def test_the_first_of_equal_polyphases_is_taken() -> None:
    flat = torch.ones(1, 2, 6, 6)
    assert torch.equal(anchor(flat, 3), flat)
    two = torch.zeros(1, 1, 4, 4)
    two[..., 0, 1] = two[..., 1, 0] = 1.0
    assert torch.equal(anchor(two, 2), two.roll(-1, 3))


def test_a_grid_of_tokens_is_a_map() -> None:
    x = torch.randn(3, 5, 6, 8)
    tokens = anchor_tokens(x.flatten(2).mT, (6, 8), (3, 2))
    torch.testing.assert_close(tokens.mT.unflatten(2, (6, 8)), anchor(x, (3, 2)))


def test_a_stride_that_does_not_divide_is_refused() -> None:
    with pytest.raises(TokensError, match="9 x 8 cannot be anchored at stride 4 x 4"):
        anchor(torch.randn(1, 3, 9, 8), 4)


@pytest.mark.parametrize("grid", [(1, 1), (2, 5), (4, 4)])
@torch.no_grad()
def test_positions_go_around_the_border(grid: tuple[int, int]) -> None:
    position = CircularPosition(6)
    x = torch.randn(2, grid[0] * grid[1], 6)
    y = position(x, grid)
    taps, bias = position.proj.weight[:, 0], position.proj.bias
    assert bias is not None
    expected = x.unflatten(1, grid) + bias
    for i in range(3):
        for j in range(3):
            expected = expected + x.unflatten(1, grid).roll((1 - i, 1 - j), (1, 2)) * taps[:, i, j]
    torch.testing.assert_close(y, expected.flatten(1, 2), atol=1e-5, rtol=1e-5)
    strided = CircularPosition(6, stride=2)
    strided.load_state_dict(position.state_dict())
    half = (y - x).unflatten(1, grid)[:, ::2, ::2].flatten(1, 2)
    torch.testing.assert_close(strided(x, grid), half, atol=1e-5, rtol=1e-5)
    with pytest.raises(TokensError, match="positions of a"):
        position(x, (grid[0] + 1, grid[1]))


def every_shift(image: Tensor, rows: int, columns: int) -> Tensor:
    """(rows·columns, 3, H, W): all circular shifts of one image (3, H, W)."""
    return torch.stack([image.roll((i, j), (1, 2)) for i in range(rows) for j in range(columns)])


def spread(model: nn.Module, shifts: Tensor) -> float:
    """How far the logits of shifted images are apart."""
    with torch.no_grad():
        logits = torch.cat([model(part) for part in shifts.split(128)])
    assert logits.abs().max() > 0.05
    return float((logits - logits[:1]).abs().max())


def vit(kind: type[VisionTransformer], **changes: Any) -> nn.Module:
    settings: dict[str, Any] = {
        "img_size": (16, 24),
        "patch_size": (4, 8),
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 5,
    }
    return randomised(kind(**{**settings, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reg_tokens": 2},
        {"class_token": False, "global_pool": "avg"},
        {"class_token": False, "global_pool": "map"},
        {"dynamic_img_size": True},
    ],
    ids=["class", "registers", "average", "map", "dynamic"],
)
def test_every_shift_gives_a_vit_the_same_logits(changes: dict[str, Any]) -> None:
    shifts = every_shift(torch.randn(3, 16, 24), 16, 24)
    assert spread(vit(PolyViT, **changes), shifts) < 1e-5
    assert spread(vit(VisionTransformer, **changes), shifts) > 1e-2


@torch.no_grad()
def test_the_parts_of_the_vit_are_all_needed() -> None:
    """Without the anchoring, or with positions that stop at the border, shifts show again."""
    shifts = every_shift(torch.randn(3, 16, 24), 16, 24)
    model: Any = vit(PolyViT)
    model.pos_conv.proj.padding_mode = "zeros"
    assert spread(model, shifts) > 1e-3
    model.pos_conv.proj.padding_mode = "circular"
    assert spread(model, shifts) < 1e-5
    model.patch_embed.__class__ = AnchoredPatchEmbed.__mro__[1]
    assert spread(model, shifts) > 1e-3


def twins(kind: type[nn.Module] = Twins, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 2,
        "embed_dims": (8, 12, 16),
        "num_heads": (2, 2, 4),
        "mlp_ratios": (2, 2, 2),
        "depths": (2, 2, 2),
        "sr_ratios": (4, 2, 1),
        "wss": (4, 4, 2),
        "num_classes": 5,
    }
    return randomised(kind(**{**settings, **changes}))


@pytest.mark.parametrize("windows", [(4, 4, 2), None], ids=["svt", "pcpvt"])
def test_every_shift_gives_twins_the_same_logits(windows: Any) -> None:
    shifts = every_shift(torch.randn(3, 32, 32), 32, 32)
    model = twins(wss=windows)
    before, keys, plain = anatomy(model), list(model.state_dict()), spread(model, shifts)
    assert plain > 1e-2
    weights = copy.deepcopy(model.state_dict())
    assert anchor_twins(model) is model
    assert spread(model, shifts) < 1e-5
    assert list(model.state_dict()) == keys
    double = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert spread(double, shifts) < 1e-5, "the copy leans on the original"
    release_twins(double)
    assert spread(double, shifts) == plain
    release_twins(model)
    model.load_state_dict(weights)
    assert anatomy(model) == before
    assert spread(model, shifts) == plain


def test_a_model_of_its_own_is_the_anchored_one() -> None:
    model = twins(PolyTwins)
    other = twins()
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = anchor_twins(other)(x)
        assert torch.equal(model(x), expected)
        assert torch.equal(model.forward_head(model.forward_features(x)), expected)
        last, maps = model.forward_intermediates(x)
        assert torch.equal(model.forward_head(last), expected)
    assert [m.shape[1:] for m in maps] == [(8, 16, 16), (12, 8, 8), (16, 4, 4)]


def test_each_image_is_anchored_alone() -> None:
    model = twins(PolyTwins)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        alone = torch.cat([model(image[None]) for image in x])
        torch.testing.assert_close(model(x), alone, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_anchored_is_refused() -> None:
    model = twins()
    with pytest.raises(HostError, match="expected a Twins"):
        anchor_twins(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(FitError, match="not anchored"):
        release_twins(model)
    anchor_twins(model)
    with pytest.raises(FitError, match="anchored already"):
        anchor_twins(model)
    odd = twins(sr_ratios=(3, 2, 1))
    before = anatomy(odd)
    with pytest.raises(FitError, match="ends with an attention of stride 3"):
        anchor_twins(odd)
    assert anatomy(odd) == before
    with pytest.raises(TokensError, match="cannot be anchored"):
        model(torch.randn(1, 3, 40, 40))


def test_training_reaches_every_parameter() -> None:
    for model in (vit(PolyViT).train(), twins(PolyTwins).train()):
        size = (16, 24) if isinstance(model, PolyViT) else (32, 32)
        model(torch.randn(2, 3, *size)).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_models_compile_to_one_graph() -> None:
    for model, size in ((vit(PolyViT), (16, 24)), (twins(PolyTwins), (32, 32))):
        x = torch.randn(2, 3, *size)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
        torch.compiler.reset()


@pytest.mark.parametrize(
    "host",
    [
        *("timm-class", "timm-registers", "timm-average", "timm-distilled", "timm-dynamic"),
        *("timm-rich", "hf-vit", "hf-deit", "hf-dinov2-registers", "hf-clip-vision", "hf-siglip"),
    ],
)
@pytest.mark.parametrize("norm", [True, False])
def test_every_shift_gives_a_fitted_host_the_same_logits(host: str, norm: bool) -> None:
    model = HOSTS[host]()
    plain, before = call(model, images(host)), anatomy(model)
    shifts = every_shift(torch.randn(3, 32, 32), 32, 32)[:: 7 if norm else 5]

    def logits(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([_read(model, part) for part in x.split(128)])

    apart = logits(shifts)
    assert (apart - apart[:1]).abs().max() > 1e-2
    transom.apply(model, "shift-equivariance", norm=norm)
    together = logits(shifts)
    assert (together - together[:1]).abs().max() < 1e-5
    other = logits(torch.randn(1, 3, 32, 32))
    assert (other - together[:1]).abs().max() > 1e-3, "every image looks alike"
    transom.remove(model)
    assert anatomy(model) == before
    assert same(call(model, images(host)), plain)


def _read(model: nn.Module, x: Tensor) -> Tensor:
    """What a host makes of its class token or of the average."""
    out = model(x)
    if isinstance(out, Tensor):
        return out
    return out.image_embeds if hasattr(out, "image_embeds") else out.logits


@pytest.mark.parametrize("host", ["timm-class", "timm-dynamic", "hf-vit", "hf-clip-vision"])
@torch.no_grad()
def test_the_host_keeps_its_weights_and_prefix_positions(host: str) -> None:
    """With nothing but its table of positions gone, a host whose table is zero is itself."""
    model, x = HOSTS[host](), images(host)
    for name, parameter in model.named_parameters():
        if "pos_embed" in name or "position_embedding" in name:
            flat = parameter.view(-1, parameter.shape[-1])
            flat[1:] = 0  # the class token keeps a position
    patch = 8
    anchored = anchor(x, patch)
    expected = call(model, anchored)
    transom.apply(model, "shift-equivariance", norm=False, init="zero")
    close(call(model, x), expected)


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("timm-rotary", "adds positions in its own way"),
        ("hf-dinov2-backbone", "come out shifted"),
    ],
)
def test_hosts_without_such_a_front_are_refused(host: str, reason: str) -> None:
    model = HOSTS[host]()
    with unchanged(model), pytest.raises(FitError, match=reason):
        transom.apply(model, "shift-equivariance")


def test_overlapping_patches_are_refused() -> None:
    model: Any = HOSTS["timm-class"]()
    model.patch_embed.proj.stride = (4, 4)
    model.pos_embed.data = torch.zeros(1, 50, 32)
    before = anatomy(model)
    with pytest.raises(FitError, match="overlap"):
        transom.apply(model, "shift-equivariance", check=False)
    assert anatomy(model) == before


@torch.no_grad()
def test_it_fits_beside_a_method_in_the_blocks_and_goes_alone() -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")
    plain, before = call(model, x), anatomy(model)
    transom.apply(model, "tome", r=2)
    merged = call(model, x)
    transom.apply(model, "shift-equivariance")
    assert [f.slug for f in transom.fittings(model)] == ["tome", "shift-equivariance"]
    both = call(model, x)
    assert not same(both, merged)
    close(call(model, x.roll((3, 5), (2, 3))), both)
    transom.remove(model, "shift-equivariance")
    assert same(call(model, x), merged)
    transom.remove(model)
    assert anatomy(model) == before
    assert same(call(model, x), plain)


def test_blocks_cannot_be_chosen_for_what_is_in_front_of_them() -> None:
    with pytest.raises(FitError, match="cannot restrict"):
        transom.apply(HOSTS["timm-class"](), "shift-equivariance", where=1)
    model = transom.apply(HOSTS["timm-class"](), "shift-equivariance")
    with pytest.raises(FitError, match="parameters of its own"):
        transom.adjust(model, norm=False)
