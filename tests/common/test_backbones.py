"""What every backbone must be: a good citizen of timm, of the published size."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from transom import registry
from transom.registry import Backbone

ALL = [(slug, backbone) for slug, several in registry.backbones().items() for backbone in several]


def named(pairs: list[tuple[str, Backbone]]) -> list[Any]:
    return [pytest.param(backbone, id=f"{slug}-{backbone.name}") for slug, backbone in pairs]


@functools.cache
def weight(name: str) -> float:
    """Parameters in millions."""
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters()) / 1e6


def smallest() -> list[tuple[str, Backbone]]:
    """The lightest backbone of each room, as far as sizes are published; else the first."""
    rooms = registry.backbones().items()
    return [(slug, min(several, key=lambda b: b.params or float("inf"))) for slug, several in rooms]


each = pytest.mark.parametrize("backbone", named(ALL))
light = pytest.mark.parametrize("backbone", named(smallest()))


def build(backbone: Backbone, **options: Any) -> nn.Module:
    """The model in eval mode, with norms, scales and biases that are not what they begin as."""
    torch.manual_seed(0)
    model = timm.create_model(backbone.name, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1:
                parameter.add_(torch.rand_like(parameter) * 0.2)
    return model


def images(backbone: Backbone, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, backbone.size, backbone.size, generator=generator)


def rounding(published: float) -> float:
    """Half a unit of the last digit that was published."""
    digits = len(f"{published:g}".partition(".")[2])
    return 0.5 * 10.0**-digits


@each
def test_has_the_published_parameters(backbone: Backbone) -> None:
    if backbone.params is None:
        pytest.skip("no number of parameters is published")
    have = weight(backbone.name)
    assert abs(have - backbone.params) <= max(rounding(backbone.params), 0.01 * backbone.params)


@each
def test_has_the_published_cost(backbone: Backbone) -> None:
    if backbone.gmacs is None:
        pytest.skip("no cost is published")
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(backbone.name).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, backbone.size, backbone.size))
    have = counter.get_total_flops() / 2e9
    assert abs(have - backbone.gmacs) <= max(rounding(backbone.gmacs), 0.06 * backbone.gmacs)


@each
def test_is_registered_with_a_configuration(backbone: Backbone) -> None:
    assert timm.is_model(backbone.name)
    with torch.device("meta"):
        model = timm.create_model(backbone.name, num_classes=7)
    cfg = model.pretrained_cfg
    assert cfg["input_size"] == (3, backbone.size, backbone.size)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for name in _several(cfg["classifier"]):
        assert name in modules
    for name in _several(cfg["first_conv"]):
        assert f"{name}.weight" in parameters


def _several(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


@light
@torch.no_grad()
def test_forward_is_head_after_features(backbone: Backbone) -> None:
    model, x = build(backbone, num_classes=7), images(backbone)
    out = model(x)
    assert out.shape == (2, 7)
    assert out.isfinite().all()
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), out)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)


@light
@torch.no_grad()
def test_classifier_can_be_changed(backbone: Backbone) -> None:
    model, x = build(backbone), images(backbone, 1)
    assert isinstance(model.get_classifier(), nn.Module)
    model.reset_classifier(5)
    assert model(x).shape == (1, 5)
    assert model.num_classes == 5
    model.reset_classifier(0)
    assert model(x).shape == (1, model.head_hidden_size)


@light
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(backbone: Backbone) -> None:
    model, x = build(backbone), images(backbone, 3)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), atol=1e-4, rtol=1e-4)


@light
def test_every_parameter_has_a_gradient(backbone: Backbone) -> None:
    model, x = build(backbone, num_classes=7).train(), images(backbone)
    model(x).square().mean().backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@light
def test_checkpointing_changes_no_gradient(backbone: Backbone) -> None:
    x = images(backbone)
    expected = build(backbone, num_classes=7)
    model = copy.deepcopy(expected)
    model.set_grad_checkpointing(True)
    # eval mode keeps drop path and batch statistics out of the comparison
    for each_model in (expected, model):
        each_model(x).square().mean().backward()
    for (name, a), b in zip(expected.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=name)


@light
@torch.no_grad()
def test_intermediates_are_maps_of_the_run(backbone: Backbone) -> None:
    model, x = build(backbone), images(backbone, 1)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert len(maps) >= 2
    for found in maps:
        assert found.dim() == 4
        assert found.isfinite().all()
    (last,) = model.forward_intermediates(x, indices=1, intermediates_only=True)
    torch.testing.assert_close(last, maps[-1])


@light
@torch.no_grad()
def test_features_only(backbone: Backbone) -> None:
    model = timm.create_model(backbone.name, features_only=True).eval()
    maps = model(images(backbone, 1))
    assert len(maps) == len(model.feature_info.channels())
    for found, channels, stride in zip(
        maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        side = -(-backbone.size // stride)
        assert found.shape == (1, channels, side, side)


@light
def test_groups_hold_every_parameter(backbone: Backbone) -> None:
    with torch.device("meta"):
        model = timm.create_model(backbone.name)
    for coarse in (False, True):
        groups = timm.models.group_parameters(model, model.group_matcher(coarse=coarse))
        held = sorted(name for names in groups.values() for name in names)
        assert held == sorted(name for name, _ in model.named_parameters())
        assert len(groups) > 2


@light
@torch.no_grad()
def test_bfloat16(backbone: Backbone) -> None:
    model, x = build(backbone), images(backbone, 1)
    expected = model(x)
    got = model.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert torch.cosine_similarity(got.float(), expected, -1).min() > 0.98


@pytest.mark.slow
@light
@torch.no_grad()
def test_compiles_in_one_graph(backbone: Backbone) -> None:
    model, x = build(backbone), images(backbone, 1)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@light
@torch.no_grad()
def test_exports_to_onnx(backbone: Backbone, tmp_path: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = build(backbone), images(backbone, 1)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(path))
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(x), atol=1e-3, rtol=1e-3)


@light
def test_loads_its_own_state(backbone: Backbone) -> None:
    a, b = build(backbone), timm.create_model(backbone.name).eval()
    b.load_state_dict(a.state_dict(), strict=True)
    x = images(backbone, 1)
    with torch.no_grad():
        assert torch.equal(a(x), b(x))


def _converters() -> list[str]:
    return [slug for slug, room in registry.rooms().items() if room.backbones]


@pytest.mark.parametrize("slug", _converters())
def test_conversion_keeps_what_is_ours(slug: str) -> None:
    """A state dict that has our names already is its own conversion."""
    room = registry.rooms()[slug]
    light = min(room.backbones, key=lambda b: b.params or float("inf"))
    state = timm.create_model(light.name).state_dict()
    converted = state if room.convert is None else room.convert(dict(state))
    assert list(converted) == list(state)
    assert all(torch.equal(converted[name], state[name]) for name in state)
