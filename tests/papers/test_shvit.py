"""SHViT: what only single-head attention and its network need."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import transom
from tests.common.hosts import randomised
from transom.errors import SettingsError
from transom.papers.attention.shvit import SHSA, SHViT, SingleHead, convert
from transom.papers.attention.shvit.attention import ConvBN
from transom.papers.attention.shvit.method import Mixer
from transom.slots import Ask
from transom.tokens import Layout, Record


def varied(model: Any) -> Any:
    """The module in evaluation mode with every parameter and statistic drawn."""
    randomised(model)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            noise = torch.rand(module.num_features, generator=generator)
            module.running_mean.copy_(noise - 0.5)
            module.running_var.copy_(noise.flip(0) + 0.5)
    return model


def small(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "embed_dim": (16, 24, 24),
        "partial_dim": (4, 6, 8),
        "depth": (1, 1, 2),
        "num_classes": 5,
    }
    torch.manual_seed(0)
    return varied(SHViT(**{**settings, **changes}))


@pytest.mark.parametrize("distillation", [False, True])
@pytest.mark.parametrize("by", ["fuse", "timm"])
@torch.no_grad()
def test_folded_for_inference(distillation: bool, by: str) -> None:
    model, x = small(distillation=distillation), torch.randn(2, 3, 96, 80)
    expected, before = model(x), list(model.modules())
    if by == "timm":
        model = timm.utils.reparameterize_model(model)
    else:
        assert model.fuse() is model
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in model.modules())
    assert len(list(model.modules())) < len(before)
    heads = model.get_classifier()
    assert all(isinstance(h, nn.Linear) for h in (heads if distillation else [heads]))
    again = model.fuse()(x)
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_library_s_own_fold_knows_these_norms() -> None:
    model, x = small(), torch.randn(2, 3, 64, 64)
    folded = transom.fold(model, x)
    torch.testing.assert_close(folded(x), model(x), atol=1e-5, rtol=1e-5)


def test_a_folded_model_exports() -> None:
    model, x = small().fuse(), torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(program(x), model(x))


@pytest.mark.parametrize(("size", "pixels"), [("s1", 96), ("s4", 64)])
@torch.no_grad()
def test_timms_own_model_is_the_same(size: str, pixels: int) -> None:
    if not timm.is_model(f"shvit_{size}"):
        pytest.skip("this timm has no SHViT")
    theirs = varied(timm.create_model(f"shvit_{size}", num_classes=7))
    ours = timm.create_model(f"shvit_{size}_official", num_classes=7).eval()
    ours.load_state_dict(convert(theirs.state_dict()), strict=True)
    x = torch.randn(2, 3, pixels, pixels)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_by_differences(batch: int, training: bool) -> None:
    """Also for a batch of one, whose strides torch's batch norm may misread."""
    shsa = varied(SHSA(16, 4, 6)).double().train(training)
    x = torch.randn(batch, 16, 2, 3, dtype=torch.float64, requires_grad=True)
    record = Record(Layout(0, None, 6))
    assert torch.autograd.gradcheck(shsa, (x,))
    h = torch.randn(batch, 6, 16, dtype=torch.float64, requires_grad=True)
    ask = Ask(record=record)
    assert torch.autograd.gradcheck(lambda h: Mixer(shsa)(h, ask), (h,))


@torch.no_grad()
def test_tokens_are_positions() -> None:
    shsa, x = varied(SHSA(16, 4, 6)), torch.randn(2, 16, 5, 3)
    torch.testing.assert_close(shsa.tokens(x.flatten(2).mT), shsa(x).flatten(2).mT)


@torch.no_grad()
def test_channels_that_do_not_attend_pass_by() -> None:
    shsa, x = varied(SHSA(16, 4, 6)), torch.randn(2, 16, 5, 3)
    seen: list[Tensor] = []
    shsa.proj[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    shsa(x)
    assert torch.equal(seen[0][:, 6:], x[:, 6:])
    assert not torch.isclose(seen[0][:, :6], x[:, :6]).any()
    nn.init.zeros_(shsa.qkv.bn.weight[:8])
    nn.init.zeros_(shsa.qkv.bn.bias[:8])
    shsa(x)
    attended = seen[1][:, :6].flatten(2)
    average = shsa.qkv(shsa.pre_norm(x[:, :6]))[:, 8:].mean((2, 3))
    torch.testing.assert_close(attended, average[..., None].expand_as(attended))


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_padding_takes_no_part(training: bool) -> None:
    short = varied(SHSA(16, 4, 6)).train(training)
    long = copy.deepcopy(short)
    h = torch.randn(2, 5, 16)
    expected = Mixer(short)(h, Ask(record=Record(Layout(0, None, 5))))
    valid = torch.arange(8).expand(2, -1) < 5
    bias = torch.zeros(2, 1, 1, 8).masked_fill(~valid[:, None, None], float("-inf"))
    ask = Ask(bias=bias, record=Record(Layout(0, None, 8), valid=valid))
    got = Mixer(long)(torch.cat([h, torch.full((2, 3, 16), 9.0)], 1), ask)
    torch.testing.assert_close(got[:, :5], expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(long.buffers(), short.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_distillation() -> None:
    model, x = small(distillation=True), torch.randn(2, 3, 64, 64)
    one, two = model.train()(x)
    assert one.shape == two.shape == (2, 5)
    (one.sum() + 2 * two.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        pooled = model.eval().forward_head(model.forward_features(x), pre_logits=True)
        expected = (model.head(pooled) + model.head_dist(pooled)) / 2
        torch.testing.assert_close(model(x), expected)
        model.reset_classifier(3)
        assert model(x).shape == (2, 3)
        assert len(model.get_classifier()) == 2


def test_branches_of_blocks_begin_with_nothing() -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("shvit_s1_official")
    for stage, first in ((model.blocks1, 0), (model.blocks2, 3), (model.blocks3, 3)):
        x = torch.randn(2, stage[-1].conv.m.c.in_channels, 4, 4)
        for block in stage[first:]:
            assert torch.equal(block.eval()(x), x)
    merging = model.blocks2[1]
    assert all((m.bn.weight == 1).all() for m in merging.modules() if isinstance(m, ConvBN))


@torch.no_grad()
def test_fewer_features_are_the_same_features() -> None:
    whole, short = small(), small()
    assert short.prune_intermediate_layers([0, 1]) == [0, 1]
    x = torch.randn(1, 3, 64, 64)
    expected = whole.forward_intermediates(x, [0, 1], intermediates_only=True, stop_early=True)
    got = short.forward_intermediates(x, [0, 1], intermediates_only=True)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    assert short(x).shape == (1, 24, 2, 2), "features without a classifier, unpooled"


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SettingsError, match="3 values"):
        small(depth=(1, 1))
    with pytest.raises(SettingsError, match="type of a block"):
        small(types=("i", "s", "x"))
    with pytest.raises(SettingsError, match="partial_dim"):
        SHSA(8, 4, 9)
    with pytest.raises(SettingsError, match="pooled"):
        small(global_pool="")
    with pytest.raises(SettingsError, match="NCHW"):
        small().forward_intermediates(torch.randn(1, 3, 64, 64), output_fmt="NLC")
    for settings in ({"partial_ratio": 0.0}, {"partial_ratio": 1.5}, {"qk_dim": 0}):
        with pytest.raises(SettingsError):
            SingleHead(**settings)
