"""Encoding models: planted sites are found, and what holds nothing scores nothing."""

from __future__ import annotations

import pytest
import torch

from transom.errors import SettingsError
from transom.papers.lens.brain_integration import (
    benjamini_hochberg,
    bootstrap,
    compare,
    encode,
    folds,
    integration,
    noise_ceiling,
    permutation,
    project,
    ridge,
    simulate,
    windows,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_planted_sites_are_recovered_and_no_others() -> None:
    found = simulate(events=300, sites=6, width=4)
    scores = bootstrap(found.features, found.targets, draws=150)
    flagged = integration(scores, ["fusion"], ["image", "text"], "concatenation")
    share = {
        kind: sum(f for f, k in zip(flagged.tolist(), found.kinds, strict=True) if k == kind) / 6
        for kind in set(found.kinds)
    }
    assert share.pop("product") >= 0.75
    assert set(share.values()) == {0.0}
    # sites of a sum are better predicted by both modalities than by one, and yet not flagged
    gain = compare(scores, "concatenation", "image").difference
    assert gain[[kind == "both" for kind in found.kinds]].mean() > 0.1


def test_bins_of_a_site_are_averaged_and_need_a_number() -> None:
    found = simulate(events=200, sites=4, width=3)
    scores = bootstrap(found.features, found.targets, draws=25)
    where = torch.arange(20) // 4
    few = compare(scores, "fusion", "image", sites=where)
    assert few.p.shape == (5,)
    assert few.p[3] < 0.05  # four products
    many = compare(scores, "fusion", "image", sites=where, least=5)
    assert torch.equal(many.p, torch.ones(5, dtype=torch.float64))


def test_events_out_of_order_score_nothing() -> None:
    found = simulate(events=200, sites=6, width=3)
    p, chance = permutation(found.features["image"], found.targets, draws=40)
    assert chance.mean().abs() < 0.03
    assert (p[:6] <= 1 / 41 + 1e-9).all()
    assert (p[-6:] > 1 / 41).sum() >= 5


def test_folds_cover_every_event_once() -> None:
    made = folds(47, 4)
    held = [torch.cat([f.validation, f.test]) for f in made]
    assert [len(h) for h in held] == [12, 12, 12, 11]
    assert [len(f.validation) for f in made] == [6, 6, 6, 5]
    assert torch.equal(torch.cat(held), torch.arange(47))
    for fold, block in zip(folds(47, 4, gap=3), held, strict=True):
        assert all((fold.train - event).abs().min() > 3 for event in block)


def test_a_gap_stops_what_time_leaks() -> None:
    """A slow signal is predicted from features that only tell the time, unless there is a gap."""
    time = torch.arange(200).double()
    places = torch.linspace(0, 200, 60).double()
    features = torch.exp(-((time[:, None] - places) ** 2) / 50)
    noise = torch.randn(260, 30, generator=rng()).double()
    slow = noise.unfold(0, 60, 1).mean(-1)[:200]
    leaking, held = (encode(features, slow, count=20, gap=g).validation.mean() for g in (0, 60))
    assert leaking > held + 0.1


@pytest.mark.parametrize(("events", "width"), [(30, 8), (10, 25)])
def test_ridge_solves_its_normal_equations(events: int, width: int) -> None:
    x = torch.randn(events, width, generator=rng()).double()
    y = torch.randn(events, 3, generator=rng(1)).double()
    ones = torch.cat([torch.ones(events, 1).double(), x], 1)
    for alpha, weights in zip((0.1, 30.0), ridge(x, y, (0.1, 30.0)), strict=True):
        residual = ones.T @ (y - ones @ weights) - alpha * weights
        assert residual.abs().max() < 1e-9


def test_inner_folds_choose_without_the_tested_events() -> None:
    found = simulate(events=120, sites=4, width=3)
    x, y = found.features["fusion"], found.targets.clone()
    fold = folds(120, 5)[0]
    plain = encode(x, y, inner=3)
    assert plain.test[:4].mean() > 0.4
    assert ((plain.alpha >= 0.1) & (plain.alpha <= 1e5)).all()
    y[fold.test] = y[fold.test].flip(0)  # what is tested changes the score and only that
    assert not torch.equal(encode(x, y, inner=3).test, plain.test)


def test_constant_features_do_no_harm() -> None:
    found = simulate(events=80, sites=2, width=3)
    x = torch.cat([found.features["image"], torch.full((80, 1), 0.1).double()], 1)
    torch.testing.assert_close(
        encode(x, found.targets).test, encode(found.features["image"], found.targets).test
    )


def test_ceiling_is_the_root_of_the_reliability() -> None:
    signal = torch.randn(1, 4000, 5, generator=rng()).double()
    repeats = signal + torch.randn(6, 4000, 5, generator=rng(1)).double()
    torch.testing.assert_close(
        noise_ceiling(repeats), torch.full((5,), 0.5).double().sqrt(), rtol=0.03, atol=0
    )
    assert noise_ceiling(torch.randn(4, 4000, 5, generator=rng())).max() < 0.25


def test_benjamini_hochberg_by_hand() -> None:
    p = torch.tensor([0.04, 0.01, 0.5, 0.02])
    torch.testing.assert_close(benjamini_hochberg(p), torch.tensor([0.04 * 4 / 3, 0.04, 0.5, 0.04]))


def test_windows_average_the_signal_around_events() -> None:
    ramp = torch.arange(1000.0)[None]
    cut = windows(ramp, torch.tensor([4.0, 5.0]), 100.0)
    assert cut.shape == (2, 1, 161)
    torch.testing.assert_close(cut[0, 0, 80], torch.tensor(399.5).double())
    torch.testing.assert_close(cut[1] - cut[0], torch.full((1, 161), 100.0).double())
    with pytest.raises(SettingsError, match="reach"):
        windows(ramp, torch.tensor([1.0]), 100.0)


def test_projection_keeps_distances() -> None:
    x = torch.randn(20, 9000, generator=rng())
    small = project(x, eps=0.3)
    assert small.shape == (20, int(4 * torch.log(torch.tensor(20.0)) / (0.045 - 0.009)))
    ratio = torch.pdist(small) / torch.pdist(x.double())
    assert ((ratio**2 - 1).abs() < 0.3).all()


def test_refusals() -> None:
    with pytest.raises(SettingsError, match="folds"):
        folds(10, 5)
    with pytest.raises(SettingsError, match="same events"):
        bootstrap({"a": torch.zeros(5, 2)}, torch.zeros(6, 2))
    with pytest.raises(SettingsError, match="above 0"):
        ridge(torch.zeros(5, 2), torch.zeros(5, 2), [0.0])


def test_a_penalty_chosen_by_inner_folds_does_not_flatter() -> None:
    """Features that hold nothing: nested folds score zero, a choice by what is tested does not."""
    x = torch.randn(80, 60, generator=rng()).double()
    y = torch.randn(80, 600, generator=rng(1)).double()
    alphas = (0.1, 10.0, 100.0, 1e3)
    nested = encode(x, y, inner=3, alphas=alphas).test
    peeking = torch.stack([encode(x, y, alphas=[a]).test for a in alphas]).amax(0)
    error = nested.std() / 600**0.5
    assert nested.mean().abs() < 4 * error
    assert peeking.mean() > 4 * error


def test_integration_is_found_with_nested_folds_too() -> None:
    found = simulate(events=160, sites=3, width=2, noise=0.7)
    scores = bootstrap(
        found.features, found.targets, draws=120, count=3, inner=2, alphas=(1.0, 30.0)
    )
    flagged = integration(scores, ["fusion"], ["image", "text"], "concatenation")
    assert flagged.tolist() == [kind == "product" for kind in found.kinds]


def test_the_true_model_reaches_the_ceiling_and_none_passes_it() -> None:
    truth = simulate(events=500, sites=6, width=4, noise=0.0)
    noise = torch.randn(5, *truth.targets.shape, generator=rng(3)).double()
    repeats = truth.targets + noise
    ceiling = noise_ceiling(repeats)
    product = torch.tensor([kind == "product" for kind in truth.kinds])
    nothing = torch.tensor([kind == "noise" for kind in truth.kinds])
    best, linear = (
        encode(truth.features[name], repeats[0]).test for name in ("fusion", "concatenation")
    )
    assert (ceiling[~nothing] > 0.6).all() and (ceiling[nothing] < 0.3).all()
    assert (best[~nothing] / ceiling[~nothing]).mean() > 0.9
    assert (best <= ceiling + 0.15).all()
    assert (linear[product] / ceiling[product]).mean() < 0.3


def test_adjustment_keeps_false_discoveries_down_among_many_sites() -> None:
    held = torch.randn(150, 4, generator=rng(5)).double()
    planted, empty = 20, 180
    signal = held @ torch.randn(4, planted, generator=rng(6)).double()
    y = torch.randn(150, planted + empty, generator=rng(7)).double()
    y[:, :planted] += signal
    p, _ = permutation(held, y, draws=300, alphas=(1.0, 100.0))
    null = p[planted:]
    assert 0.4 < null.mean() < 0.6  # p values of nothing are uniform
    raw = (null < 0.05).sum()
    assert raw >= 4  # without control there are false sites
    found = benjamini_hochberg(p) < 0.05
    assert found[:planted].float().mean() >= 0.9
    assert found[planted:].sum() <= max(1, 0.1 * found.sum())
    assert found[planted:].sum() < raw
    assert not (benjamini_hochberg(null) < 0.05).any()
