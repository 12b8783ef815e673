"""Unified Normalization: outliers, restarts, padding, and its T2T-ViT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import transom
from tests.common.hosts import HOSTS, images
from transom.errors import SettingsError, TokensError
from transom.papers.compression.unified_norm import UnifiedNormLayer, convert


def batch(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def layer(**settings: Any) -> UnifiedNormLayer:
    return UnifiedNormLayer(6, **settings).double().train()


def test_an_outlier_is_skipped_and_counted() -> None:
    made, free = (layer(warmup_iters=5, outlier_filtration=on) for on in (True, False))
    for step in range(20):
        for each in (made, free):
            each(batch(step, 4, 20, 6))
    before, skipped = made.running_var.clone(), int(made.skip_counter)
    x = 50 * batch(20, 4, 20, 6)
    y, smeared = made(x), free(x)
    assert int(made.skip_counter) == skipped + 1
    assert int(free.skip_counter) == 0
    # the batch is normed by itself, and the window remembers what was usual
    torch.testing.assert_close(y, x / (x.square().mean((0, 1)) + 1e-5).sqrt())
    torch.testing.assert_close(made.buffer_x2[int(made.iters) % 4], before)
    assert free.buffer_x2.max() > 1000
    assert smeared.abs().max() > 3 * y.abs().max()


def test_early_steps_are_plain() -> None:
    made, x = layer(), batch(0, 4, 20, 6)
    moment = x.square().mean((0, 1))
    torch.testing.assert_close(made(x), x / (moment + 1e-5).sqrt())
    torch.testing.assert_close(made.running_var, 0.9 * torch.ones(6).double() + 0.1 * moment)


def test_late_steps_are_smoothed() -> None:
    made = layer(warmup_iters=0, outlier_filtration=False, window_size=(3, 2))
    moments = []
    for step in range(6):
        x = batch(step, 4, 20, 6) * (1 + step)
        moments.append(x.square().mean((0, 1)))
        y = made(x)
    smooth = torch.stack(moments[-3:]).log().mean(0).exp()
    torch.testing.assert_close(y, x / (smooth + 1e-5).sqrt())


def test_no_smoothing_in_a_window_of_one() -> None:
    made, x = layer(window_size=1, warmup_iters=0), batch(0, 4, 20, 6)
    for scale in (1, 3):
        expected = x * scale / ((x * scale).square().mean((0, 1)) + 1e-5).sqrt()
        torch.testing.assert_close(made(x * scale), expected)
    assert int(made.skip_counter) == 0


def test_padding_does_not_count() -> None:
    x, mask = batch(0, 2, 5, 6), torch.tensor([[False] * 5, [False, False, True, True, True]])
    made, other = layer(), layer()
    made(x, mask)
    other(x[~mask])
    torch.testing.assert_close(made.running_var, other.running_var)
    torch.testing.assert_close(made.buffer_x2, other.buffer_x2)


def test_a_restart_warms_up_anew() -> None:
    made, x = layer(warmup_iters=3, outlier_filtration=False), batch(0, 4, 20, 6)
    for step in range(8):
        made(batch(step, 4, 20, 6))
    made.restart()
    torch.testing.assert_close(made(3 * x), 3 * x / ((3 * x).square().mean((0, 1)) + 1e-5).sqrt())
    assert int(made.iters) == 1


def test_gradients_without_smoothing_follow_the_moving_average() -> None:
    """In the first step a tenth of the projection on z is taken out, as published."""
    made, x = layer(), batch(0, 4, 20, 6).requires_grad_()
    cotangent = batch(1, 4, 20, 6)
    made(x).backward(cotangent)
    deviation = (x.detach().square().mean((0, 1)) + 1e-5).sqrt()
    z = x.detach() / deviation
    share = 0.1 * (cotangent * z).mean((0, 1))
    torch.testing.assert_close(x.grad, (cotangent - share * z) / deviation)


def network(**settings: Any) -> Any:
    shape = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5, "token_dim": 8}
    torch.manual_seed(0)
    return timm.create_model("T2t_vit_14_all_un1d", **{"img_size": 64, **shape, **settings})


def pixels(count: int, *size: int) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def test_every_norm_of_the_network_is_replaced() -> None:
    model = network()
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    assert sum(isinstance(module, UnifiedNormLayer) for module in model.modules()) == 4 + 4 + 1


@torch.no_grad()
def test_the_network_folds_without_a_norm_left() -> None:
    model = network().double()
    for step in range(3):
        model.train()(pixels(2, 64, 64).double() * (1 + step))
    model.eval()
    for norm in model.modules():
        if isinstance(norm, UnifiedNormLayer):
            norm.bias.normal_()
    folded, x = transom.fold(model), pixels(2, 64, 64).double()
    names = {type(module).__name__ for module in folded.modules()}
    assert not names & {"UnifiedNormLayer", "Scale", "LayerNorm"}
    torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_other_sizes_of_images() -> None:
    model = network().eval()
    with pytest.raises(TokensError, match="set_input_size"):
        model(pixels(1, 32, 64))
    model.set_input_size((32, 64))
    built = network(img_size=(32, 64)).eval()
    built.load_state_dict(model.state_dict())
    x = pixels(1, 32, 64)
    torch.testing.assert_close(built(x), model(x))
    with pytest.raises(SettingsError, match="16"):
        model.set_input_size((40, 64))
    with pytest.raises(SettingsError, match="16"):
        network(patch_size=10)


def test_official_names() -> None:
    model = network()
    official = {
        n.replace("patch_embed.", "tokens_to_token."): t for n, t in model.state_dict().items()
    }
    assert "tokens_to_token.attention1.w" in official
    model.load_state_dict(convert(official))


def test_checkpointing_repeats_a_training_step() -> None:
    model = network().double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    other, x = copy.deepcopy(model), pixels(2, 64, 64).double()
    other.set_grad_checkpointing()
    for each in (model, other):
        each(x).square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(b.grad, a.grad, msg=name)
    for (name, a), b in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(b, a, msg=name)


def test_a_host_keeps_its_scale_and_shift() -> None:
    model: Any = HOSTS["timm-class"]()
    transom.apply(model, "unified-norm")
    own = model.transom["unified-norm"][0]
    assert torch.equal(own.weight, model.blocks[0].norm1.weight)
    assert torch.equal(own.bias, model.blocks[0].norm1.bias)
    assert model(images("timm-class")).isfinite().all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"window_size": 0},
        {"window_size": (4, 0)},
        {"warmup_iters": -1},
        {"eps": 0.0},
        {"momentum": 1.0},
    ],
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        transom.apply(HOSTS["timm-class"](), "unified-norm", **wrong)
