"""Curvature against dense matrices, the muP rules, and a small sweep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.errors import FitError, SettingsError
from transom.papers.lens.lr_transfer import (
    Curvature,
    Readout,
    ResidualNet,
    groups,
    half_squared_error,
    picture,
    rescale,
    spectrum,
    sweep,
    tangent_kernel,
    top_eigenvalues,
    trace,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def case() -> tuple[ResidualNet, Callable[[], Tensor]]:
    net = ResidualNet(3, 5, 2, generator=rng()).double()
    x = torch.randn(7, 3, generator=rng(1)).double()
    y = torch.randn(7, generator=rng(2)).double()
    return net, lambda: half_squared_error(net(x), y)


def dense(here: Curvature) -> Tensor:
    return torch.stack([here(v) for v in torch.eye(here.size).double()])


def test_spectrum_is_that_of_the_dense_hessian(
    case: tuple[ResidualNet, Callable[[], Tensor]],
) -> None:
    net, loss = case
    here = Curvature(loss, net.parameters())
    hessian = dense(here)
    torch.testing.assert_close(hessian, hessian.T)
    wanted = torch.linalg.eigvalsh(hessian).flip(0)
    got = spectrum(here, here.gradient, here.size, generator=rng())
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)
    top = top_eigenvalues(here, 3, tolerance=1e-6)
    torch.testing.assert_close(top, wanted[:3], rtol=1e-5, atol=0)
    torch.testing.assert_close(trace(here, None), wanted.sum())


def test_lanczos_finds_multiplicities() -> None:
    values = torch.tensor([3.0, 3, 3, 1, 1, 0, 0, -2]).double()
    got = spectrum(lambda v: values * v, values, 8, generator=rng())
    torch.testing.assert_close(got, values.sort(descending=True).values)


def test_random_signs_estimate_the_trace(
    case: tuple[ResidualNet, Callable[[], Tensor]],
) -> None:
    net, loss = case
    here = Curvature(loss, net.parameters())
    diagonal = dense(here)
    spread = (2 * (diagonal.square().sum() - diagonal.diagonal().square().sum()) / 400).sqrt()
    assert (trace(here, 400) - trace(here, None)).abs() < 4 * spread


@pytest.mark.parametrize("softmax", [False, True])
def test_kernel_has_the_spectrum_of_gauss_newton(softmax: bool) -> None:
    torch.manual_seed(0)
    # for a model that is linear in its parameters the Hessian is its Gauss-Newton part
    model, x, label = nn.Linear(4, 3).double(), torch.randn(6, 4).double(), torch.arange(6) % 3

    def loss() -> Tensor:
        if softmax:
            return F.cross_entropy(model(x), label)
        return 0.5 * model(x).square().sum() / len(x)

    here = Curvature(loss, model.parameters())
    kernel = tangent_kernel(lambda: model(x), model.parameters(), softmax=softmax)
    wanted = torch.linalg.eigvalsh(dense(here)).flip(0)
    got = torch.linalg.eigvalsh(kernel).flip(0)
    torch.testing.assert_close(got[: here.size], wanted, rtol=1e-8, atol=1e-10)


def test_scaled_sharpness_at_the_start_is_the_same_in_all_widths_of_both() -> None:
    x, y = torch.randn(8, 4, generator=rng(1)), torch.zeros(8)
    for regime in ("mup", "ntk"):
        found = []
        for width in (256, 512):
            net = ResidualNet(4, width, 2, regime, generator=rng(5))
            here = Curvature(lambda net=net: half_squared_error(net(x), y), net.parameters())
            found.append(float(top_eigenvalues(here)[0]) * net.gamma**2)
        assert found[0] == pytest.approx(found[1], rel=0.25)


def vit(width: int) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        embed_dim=width,
        depth=1,
        num_heads=width // 8,
        num_classes=5,
    )
    model.head = Readout(width, 5)
    return model


def test_rules_on_a_vit() -> None:
    wide, base = vit(32), vit(8)
    before = {name: p.detach().clone() for name, p in wide.named_parameters()}
    ratios = rescale(wide, base)
    after = dict(wide.named_parameters())
    torch.testing.assert_close(after["head.weight"], 2 * before["head.weight"])
    torch.testing.assert_close(after["blocks.0.mlp.fc1.bias"], 2 * before["blocks.0.mlp.fc1.bias"])
    assert torch.equal(after["blocks.0.mlp.fc1.weight"], before["blocks.0.mlp.fc1.weight"])
    rates = {
        id(p): (g["lr"], g["weight_decay"])
        for g in groups(wide, ratios, 0.1, weight_decay=0.01)
        for p in g["params"]
    }
    assert len(rates) == len(after)
    assert rates[id(after["blocks.0.attn.qkv.weight"])] == (0.025, 0.04)
    for name in ("head.weight", "pos_embed", "blocks.0.norm1.weight", "patch_embed.proj.weight"):
        assert rates[id(after[name])] == (0.1, 0.01)
    with pytest.raises(FitError, match="before"):
        rescale(wide, base)
    # a fused kernel has no second derivative: the Hessian of attention still comes out
    images = torch.randn(2, 3, 16, 16, generator=rng())
    here = Curvature(lambda: F.cross_entropy(wide(images), torch.tensor([0, 1])), after.values())
    assert top_eigenvalues(here, tolerance=1e-2) > 0


def test_logits_of_a_readout_shrink_with_its_ratio() -> None:
    torch.manual_seed(0)
    readout, base = nn.Sequential(Readout(32, 4, output_mult=3.0)), nn.Sequential(Readout(8, 4))
    x, plain = torch.randn(2, 32), readout[0]
    before = F.linear(x, plain.weight) * 3, plain.bias.detach().clone()
    rescale(readout, base)
    torch.testing.assert_close(readout(x), before[0] / 2 + 2 * before[1])


def test_all_regimes_are_one_network_where_it_is_narrow() -> None:
    x = torch.randn(6, 4, generator=rng())
    outs = {}
    for regime in ("mup", "ntk", "standard"):
        for width in (8, 32):
            net = ResidualNet(4, width, 2, regime, narrow=8, generator=rng(1))
            outs[regime, width] = net(x)
            assert net.rates(0.5)[1] == pytest.approx(0.5 * (8 if regime == "ntk" else width))
    for regime in ("ntk", "standard"):
        torch.testing.assert_close(outs[regime, 8], outs["mup", 8])
        torch.testing.assert_close(outs[regime, 32], 2 * outs["mup", 32])


def test_standard_is_ordinary_training_with_one_learning_rate() -> None:
    """Weights of deviation 1/sqrt(fan in) under plain gradient descent take the same course."""
    x, y = torch.randn(9, 4, generator=rng()).double(), torch.randn(9, generator=rng(2)).double()
    net = ResidualNet(4, 6, 1, "standard", generator=rng(1)).double()
    plain = [(p / p.shape[-1] ** 0.5).detach().requires_grad_() for p in net.parameters()]

    def outputs() -> Tensor:
        h = x @ plain[0].T
        h = h + h.tanh() @ plain[1].T
        return h.tanh() @ plain[2]

    sharp = Curvature(lambda: half_squared_error(outputs(), y), plain)
    ours = Curvature(lambda: half_squared_error(net(x), y), net.parameters(), net.rates(1.0))
    torch.testing.assert_close(top_eigenvalues(ours), top_eigenvalues(sharp))
    optimizer = torch.optim.SGD(plain, lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        half_squared_error(outputs(), y).backward()
        optimizer.step()
        grads = torch.autograd.grad(half_squared_error(net(x), y), list(net.parameters()))
        with torch.no_grad():
            for p, g, rate in zip(net.parameters(), grads, net.rates(0.05), strict=True):
                p -= rate * g
    torch.testing.assert_close(net(x), outputs())


def test_a_sweep_is_kept_and_drawn(tmp_path: Path) -> None:
    found = sweep(
        (8, 32), (0.5, 2.0, 1e4), steps=20, watched_steps=20, depth=1, samples=16, seeds=1
    )
    for regime in ("mup", "ntk", "standard"):
        assert list(found.sharpness[regime]) == [8, 32]
        assert all(len(v) == len(found.steps) == 3 for v in found.sharpness[regime].values())
        assert found.best(regime)[32] < 2  # the last rate diverges
        assert found.losses[regime][32][2] == float("inf")
        assert found.variation(regime, 0) >= 0
    assert found.sharpness["mup"][8] == pytest.approx(found.sharpness["ntk"][8], rel=1e-4)
    assert picture(found, tmp_path / "sweep.png").stat().st_size > 5000


@pytest.mark.slow
def test_rate_and_sharpness_stay_put_in_mup_and_drift_without() -> None:
    """The paper's claim. The card asks for a best rate within one step of a grid of factor 2."""
    found = sweep((32, 64, 128), (0.25, 0.5, 1.0, 2.0, 4.0, 8.0), samples=96, every=25)
    varies = {regime: found.variation(regime, 50) for regime in found.losses}
    assert varies["mup"] < 0.15
    assert varies["ntk"] > 3 * varies["mup"] and varies["standard"] > 3 * varies["mup"]
    assert max(found.best("mup").values()) - min(found.best("mup").values()) <= 1
    assert found.drift("standard") <= 0.25
    # wider networks sharpen less in NTK and start sharper in the standard scaling
    ends = {regime: [v[-1] for v in found.sharpness[regime].values()] for regime in varies}
    assert ends["ntk"] == sorted(ends["ntk"], reverse=True) and ends["ntk"][0] > 3 * ends["ntk"][-1]
    starts = [v[0] for v in found.sharpness["standard"].values()]
    assert starts == sorted(starts)
    # progressive sharpening on the way to the edge of stability, which is not passed
    for values in found.sharpness["mup"].values():
        assert 5 * values[0] < values[-1] < 2.2 / found.watched


@pytest.mark.slow
def test_over_depths_only_the_factor_for_depth_holds_the_sharpness_still() -> None:
    found = sweep((2, 4, 8, 16), (2.0, 4.0, 8.0), over="depth", width=48, samples=96, every=25)
    varies = {regime: found.variation(regime) for regime in found.losses}
    assert list(varies) == ["depth-mup", "mup"]
    assert varies["depth-mup"] < 0.25 and varies["mup"] > 2 * varies["depth-mup"]
    starts = {r: [v[0] for v in found.sharpness[r].values()] for r in varies}
    assert max(starts["depth-mup"]) < 1.5 * min(starts["depth-mup"])
    assert starts["mup"] == sorted(starts["mup"]) and starts["mup"][-1] > 5 * starts["mup"][0]


def test_refusals() -> None:
    with pytest.raises(SettingsError, match="watched_steps=0"):
        sweep((8,), (0.5,), watched_steps=0)
    with pytest.raises(SettingsError, match="'height'"):
        sweep(over="height")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="diverges at the"):
        sweep((8,), (0.5,), watched=1e4, steps=2, depth=1)
    net = ResidualNet(2, 2, 1)
    with pytest.raises(SettingsError, match="2 steps for 3 parameters"):
        Curvature(lambda: net(torch.ones(1, 2)).sum(), net.parameters(), [1.0, 1.0])
    with pytest.raises(SettingsError, match="regime"):
        ResidualNet(2, 2, 1, "ntp")  # type: ignore[arg-type]
    with pytest.raises(FitError, match="Readout"):
        rescale(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(FitError, match="architecture"):
        rescale(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
