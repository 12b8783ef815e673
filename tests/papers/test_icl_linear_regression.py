"""In-context regression: closed forms against the definitions, patterns, and a short training."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import softmax

from transom.errors import SettingsError
from transom.papers.lens.icl_linear_regression import (
    CausalStack,
    InContextAttention,
    approximate_loss,
    circuits,
    debiased_gradient_step,
    gradient_flow,
    optimal_mu,
    patterns,
    picture,
    reduced,
    ridge_risk,
    run,
    sample,
    sample_tasks,
)

D, L, S = 4, 30, 0.1


@pytest.fixture
def heads() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    mu, omega = torch.randn(2, 3, generator=rng, dtype=torch.float64) * 0.3
    return mu.requires_grad_(), omega.requires_grad_()


def test_flow_is_the_gradient_of_half_the_loss(heads: tuple[torch.Tensor, torch.Tensor]) -> None:
    mu, omega = heads
    wanted = torch.autograd.grad(approximate_loss(mu, omega, D, L, S) / 2, heads)
    for got, expected in zip(gradient_flow(mu, omega, D, L, S), wanted, strict=True):
        torch.testing.assert_close(got, expected)


def test_optimal_mu_has_no_gradient(heads: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, omega = heads
    best = optimal_mu(omega.detach(), D, L, S).requires_grad_()
    (slope,) = torch.autograd.grad(approximate_loss(best, omega.detach(), D, L, S), best)
    assert slope.abs().max() < 1e-9


def test_opposite_heads_are_a_debiased_gradient_step() -> None:
    prompts = sample(64, L, D, S, generator=torch.Generator().manual_seed(0))
    x, y, query = (
        t.double() for t in (prompts.z[..., :D], prompts.z[..., D], prompts.query[:, 0, :D])
    )
    errors = []
    for small in (1e-2, 1e-3):
        mu = torch.tensor([0.5, -0.5]).double()
        got = reduced(mu, torch.tensor([small, -small]).double(), x, y, query)
        want = debiased_gradient_step(0.5, small, x, y, query)
        errors.append(float((got - want).norm() / want.norm()))
    assert errors[1] < 1e-4
    assert errors[1] < errors[0] / 50  # no term of second order: the heads cancel it


def planted(mu: list[float], omega: list[float]) -> InContextAttention:
    layer = InContextAttention(D + 1, len(mu)).double()
    eye = torch.eye(D + 1)
    eye[D, D] = 0
    with torch.no_grad():
        layer.q_proj.weight.copy_(torch.cat([w * math.sqrt(D + 1) * eye for w in omega]))
        layer.k_proj.weight.copy_(eye.repeat(len(mu), 1))
        layer.v_proj.weight.copy_(torch.eye(D + 1).repeat(len(mu), 1))
        layer.o_proj.weight.zero_()
        layer.o_proj.weight[0, D :: D + 1] = torch.tensor(mu).double()
    return layer


def test_planted_patterns_are_read_back_and_compute_the_reduced_model() -> None:
    mu, omega = [0.9, -0.9, 0.01], [0.4, -0.4, 0.001]
    layer = planted(mu, omega)
    found = circuits(
        layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight, layer.o_proj.weight, 3
    )
    scores = patterns(found, D)
    torch.testing.assert_close(scores.omega, torch.tensor(omega).double())
    torch.testing.assert_close(scores.mu[:, 0], torch.tensor(mu).double())
    assert max(scores.off_diagonal, scores.unequal, scores.elsewhere) < 1e-6
    assert scores.roles() == ["positive", "negative", "dummy"]
    prompts = sample(8, L, D, S, generator=torch.Generator().manual_seed(3))
    z, query = prompts.z.double(), prompts.query.double()
    wanted = reduced(scores.mu[:, 0], scores.omega, z[..., :D], z[..., D], query[:, 0, :D])
    torch.testing.assert_close(layer(query, z).flatten(), wanted)


@pytest.mark.parametrize("bias", [False, True])
def test_layer_is_attention_of_projected_tokens(bias: bool) -> None:
    torch.manual_seed(0)
    layer = InContextAttention(5, 3, 2, bias=bias).double()
    z, query = torch.randn(2, 9, 5).double(), torch.randn(2, 1, 5).double()
    heads = []
    for h in range(3):
        q, k, v = (
            part(x)[..., 5 * h : 5 * h + 5]
            for part, x in ((layer.q_proj, query), (layer.k_proj, z), (layer.v_proj, z))
        )
        heads.append(softmax(q @ k.mT / math.sqrt(5), -1) @ v)
    torch.testing.assert_close(layer(query, z), layer.o_proj(torch.cat(heads, -1)))


def test_only_the_released_stack_sees_the_future() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 8, 5)
    changed = x.clone()
    changed[:, -1] += 5
    for double, leaks in ((False, False), (True, True)):
        model = CausalStack(2, 5, 2, double_softmax=double)
        a, b = (model.attention_layers[0](v)[:, :-1] for v in (x, changed))
        assert torch.equal(a, b) is not leaks


def test_tied_layers_share_their_weights() -> None:
    tied, free = (CausalStack(3, 5, 2, tied=t) for t in (True, False))
    count = [sum(p.numel() for p in m.parameters()) for m in (tied, free)]
    assert count[1] - 5 == 3 * (count[0] - 5)


def test_two_tasks_use_their_own_covariates() -> None:
    prompts = sample_tasks(16, 40, 6, (4, 3), 0.0, generator=torch.Generator().manual_seed(0))
    x, y = prompts.z[..., :6].double(), prompts.z[..., 6:].double()
    for i, part in enumerate((x[..., :4], x[..., 3:])):
        beta = torch.linalg.lstsq(part, y[..., i : i + 1]).solution
        assert (part @ beta - y[..., i : i + 1]).abs().max() < 1e-4


def test_risk_at_its_limits() -> None:
    assert ridge_risk(1e-6, S) == pytest.approx(S, rel=1e-4)
    assert ridge_risk(1e6, S) == pytest.approx(1 + S, rel=1e-4)
    with pytest.raises(SettingsError, match="ratio"):
        ridge_risk(0, S)


def test_a_short_training_finds_the_patterns(tmp_path: Path) -> None:
    found = run(d=3, length=24, steps=600, batch=64, lr=1e-2)
    assert found.error[24] < found.single[24]
    assert found.error[96] < found.error[24]
    assert found.linear[96] > 2 * found.linear[24]
    assert found.agreement > 0.99
    assert max(found.patterns.sum, found.patterns.off_diagonal, found.patterns.elsewhere) < 0.1
    assert sorted(found.patterns.roles()) == ["negative", "positive"]
    assert picture(found, tmp_path / "icl.png").stat().st_size > 5000


def test_refusals() -> None:
    with pytest.raises(SettingsError, match="even"):
        InContextAttention(5, 3, init="oppo_small_id")
    with pytest.raises(SettingsError, match="widths"):
        sample_tasks(1, 2, 3, (4, 1))
    with pytest.raises(SettingsError, match="split"):
        circuits(*(torch.zeros(6, 5),) * 3, torch.zeros(1, 6), 4)
