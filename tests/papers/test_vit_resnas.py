"""ViT-ResNAS: masks against slices, sampling, search, sizes and heads."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from transom.errors import SettingsError, TokensError
from transom.papers.compression.vit_resnas import (
    BACKBONES,
    DEFINITIONS,
    Definition,
    Evolution,
    Found,
    Space,
    SpatialReduction,
    SuperNet,
    ViTResNAS,
    convert,
    inherited_accuracy,
    measured_macs,
)
from transom.papers.compression.vit_resnas.masks import head_importance, unit_importance
from transom.papers.compression.vit_resnas.search import genes_of

LARGEST = (
    (4, 16),
    (1, (16, 4, 4), (16, 32), 1),
    (1, (16, 4, 4), (16, 32), 1),
    (1, (16, 4, 4), (16, 32), 1),
    (3, 16, 24),
    (1, (24, 3, 8), (24, 48), 1),
    (1, (24, 3, 8), (24, 48), 1),
    (2, 24, 5),
)
STAGE1 = {"attn": [16, 12, 8], "mlp": [32, 16], "layer": [16, 16, 0]}
STAGE2 = {"attn": [24, 16], "mlp": [48, 32, 24], "layer": None}
OPTIONS = [
    [16, 12, 8],
    {**STAGE1, "layer": None},
    STAGE1,
    STAGE1,
    [24, 20, 16],
    STAGE2,
    {**STAGE2, "layer": [24, 0]},
    None,
]
SPACE = Space.parse(LARGEST, OPTIONS)
# without the convolutions, which would cost more than all the rest
LIGHT = Space.parse([(0, 16), *LARGEST[1:]], OPTIONS)


def supernet(**settings: Any) -> SuperNet:
    torch.manual_seed(4)
    net = SuperNet(SPACE, img_size=56, **{"example_per_arch": 2, "warmup_epochs": 0, **settings})
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
    return net.eval()


def spread(generator: random.Random) -> Definition:
    """A sub-network with every item drawn, as a mutation of everything."""
    search = Evolution(SPACE, lambda _: 0.0, 1e12, low=0.0, probability=1.0)
    search.random = generator
    found = None
    while found is None:
        found = search._mutated([Found(SPACE.largest, 0, 0)])
    return found


def test_a_masked_network_is_the_sliced_one() -> None:
    net = supernet().double()
    x = torch.randn(3, 3, 56, 56, dtype=torch.float64)
    generator, outputs = random.Random(1), []
    for definition in (spread(generator) for _ in range(12)):
        logits = net(x, net.kept(definition, 3))
        alone = net.subnetwork(definition)
        assert alone.definition == definition.present()
        torch.testing.assert_close(alone(x), logits, rtol=0, atol=1e-10)
        outputs.append(logits)
    assert all(not torch.allclose(a, b) for a, b in itertools.pairwise(outputs))


def test_one_batch_trains_several_networks() -> None:
    net = supernet().train().double()
    x = torch.randn(6, 3, 56, 56, dtype=torch.float64)
    kept = net.draw(6)
    net.eval()
    logits = net(x, kept)
    for b in range(6):
        one = [type(now)(*(None if t is None else t[b : b + 1] for t in now)) for now in kept]
        torch.testing.assert_close(net(x[b : b + 1], one), logits[b : b + 1])


def test_what_a_network_lacks_is_not_trained() -> None:
    net = supernet().train()
    definition = SPACE.largest.tuples()
    smaller = list(definition)
    smaller[1] = (1, (16, 2, 4), (16, 16), 1)
    smaller[2] = (1, (16, 4, 4), (16, 32), 0)
    net(torch.randn(2, 3, 56, 56), net.kept(smaller, 2)).sum().backward()
    rows = net.blocks[0].attn.qkv.weight.grad.abs().sum(1).view(3, 4, 4).sum((0, 2))
    assert (rows[:2] > 0).all() and (rows[2:] == 0).all()
    units = net.blocks[0].mlp.fc1.weight.grad.abs().sum(1)
    assert (units[:16] > 0).all() and (units[16:] == 0).all()
    assert all(p.grad.abs().max() == 0 for p in net.blocks[1].parameters())


def dealt(kept: Tensor | None) -> list[int]:
    assert kept is not None
    return kept.tolist()


def test_options_are_dealt_evenly_and_tiled() -> None:
    net = supernet()
    orders = set()
    for _ in range(20):
        kept = net.draw(12)  # six networks of two images
        widths, hidden = dealt(kept[0].dim), dealt(kept[1].hidden)
        assert widths[:6] == widths[6:]
        assert sorted(widths[:6]) == [8, 8, 12, 12, 16, 16]
        assert sorted(hidden[:6]) == [16, 16, 16, 32, 32, 32]
        orders.add((tuple(widths), tuple(hidden)))
    assert len(orders) > 10
    assert len({dealt(net.draw(2)[0].dim)[0] for _ in range(30)}) == 3
    single = supernet(single_arch=True).draw(7)
    assert all(len(set(dealt(now.dim))) == 1 for now in single if now.dim is not None)
    with pytest.raises(SettingsError, match="batch of 7 images"):
        net.draw(7)


def test_a_seed_decides_what_is_drawn() -> None:
    net = supernet()
    a, b, c = (net.draw(24, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    pairs = [(x, y) for m, n in zip(a, b, strict=True) for x, y in zip(m, n, strict=True)]
    assert all(x is y is None or torch.equal(x, y) for x, y in pairs)
    assert any(
        not torch.equal(m.dim, n.dim) for m, n in zip(a, c, strict=True) if m.dim is not None
    )


def test_a_removed_block_takes_the_removable_ones_behind_it_along() -> None:
    net, alone = supernet(), False
    for _ in range(20):
        kept = net.draw(24)
        second, third, last = kept[2].stays, kept[3].stays, kept[6].stays
        assert kept[1].stays is None
        assert second is not None and third is not None and last is not None
        assert not (third & ~second).any()
        alone = alone or bool((second & ~third).any())
        assert last.sum() == 12  # what was removed before the reduction does not matter to it
    assert alone


def test_options_open_with_the_epochs() -> None:
    net = supernet(warmup_epochs=15)
    expected = {0: 1, 7: 1, 8: 2, 14: 2, 15: 3, 40: 3}
    for epoch, count in expected.items():
        net.set_epoch(epoch)
        assert net.open(3) == count
        assert set(dealt(net.draw(24)[0].dim)) == {16, 12, 8} - set([12, 8][count - 1 :])


def test_sorting_changes_the_order_and_not_the_function() -> None:
    net = supernet(warmup_epochs=3).double()
    x = torch.randn(2, 3, 56, 56, dtype=torch.float64)
    before, weight = net(x), net.blocks[0].attn.qkv.weight.clone()
    net.set_epoch(4)
    assert torch.equal(net.blocks[0].attn.qkv.weight, weight)
    net.set_epoch(3)
    assert not torch.equal(net.blocks[0].attn.qkv.weight, weight)
    torch.testing.assert_close(net(x), before, rtol=0, atol=1e-10)
    for i in (0, 1, 2, 4, 5):
        state = net.blocks[i].state_dict()
        for scores in (head_importance(state, net.blocks[i].attn.heads), unit_importance(state)):
            assert (scores.diff() <= 1e-12).all()


@pytest.mark.parametrize("name", [backbone.name for backbone in BACKBONES])
def test_multiply_adds_are_those_that_run(name: str) -> None:
    definition = Definition.parse(DEFINITIONS[name])
    assert measured_macs(definition) == definition.macs()
    # the paper counts the convolutions before the patches as if every image had 224 pixels
    assert measured_macs(definition, 280) > definition.macs(280)


def test_searched_networks_keep_their_budgets() -> None:
    budgets = {"tiny": 1.7944, "small": 2.9, "medium": 4.6}
    for size, budget in budgets.items():
        macs = Definition.parse(DEFINITIONS[f"vit_resnas_{size}"]).macs() / 1e9
        assert 0.975 * budget <= macs <= budget


TARGET = (
    (0, 12),
    (1, (12, 3, 4), (12, 16), 1),
    (1, (12, 4, 4), (12, 32), 1),
    (1, (12, 2, 4), (12, 32), 0),
    (3, 12, 20),
    (1, (20, 2, 8), (20, 32), 1),
    (1, (20, 3, 8), (20, 24), 1),
    (2, 20, 5),
)


def score(definition: Definition) -> float:
    """How much is as in the target."""
    mine, wanted = genes_of(definition), genes_of(Definition.parse(TARGET))
    return sum(x == y for a, b in zip(mine, wanted, strict=True) for x, y in zip(a, b, strict=True))


def macs(definition: Definition) -> int:
    return definition.macs(56)


SETTINGS: dict[str, Any] = {
    **{"low": 0.7, "population": 40, "iterations": 12, "parents": 10},
    **{"mutations": 15, "crossovers": 15, "cost": macs},
}


def test_search_finds_the_best_within_the_budget() -> None:
    budget = 0.8 * LIGHT.largest.macs(56)
    calls: list[Definition] = []

    def counted(definition: Definition) -> float:
        calls.append(definition)
        return score(definition)

    search = Evolution(LIGHT, counted, budget, **SETTINGS)
    found = search.run()
    assert len(calls) == len(set(calls)) == len(search.seen)
    assert all(0.7 * budget <= one.macs <= budget for one in search.seen.values())
    assert found.definition == Definition.parse(TARGET)
    assert found.score == max(map(score, calls)) > score(calls[0])


def test_search_is_better_than_chance_at_the_same_effort() -> None:
    budget, best, lucky = 0.8 * LIGHT.largest.macs(56), [], []
    few = {**SETTINGS, "population": 20, "iterations": 4, "mutations": 5, "crossovers": 5}
    for seed in range(8):
        search = Evolution(LIGHT, score, budget, seed=seed, **few)
        best.append(search.run().score)
        alone = {**few, "iterations": 0, "population": len(search.seen)}
        lucky.append(Evolution(LIGHT, score, budget, seed=seed, **alone).run().score)
    assert sum(best) > sum(lucky)


def test_search_is_decided_by_its_seed() -> None:
    budget = 0.8 * LIGHT.largest.macs(56)
    small = {**SETTINGS, "iterations": 2}
    runs = [Evolution(LIGHT, score, budget, seed=seed, **small) for seed in (1, 1, 2)]
    for search in runs:
        search.run()
    first, again, other = (list(search.seen) for search in runs)
    assert first == again
    assert first != other


def test_a_budget_out_of_reach_is_refused() -> None:
    for budget in (1e4, 1e12):
        with pytest.raises(SettingsError, match="out of reach"):
            Evolution(LIGHT, score, budget, **SETTINGS)
    with pytest.raises(SettingsError, match="parents is 50"):
        Evolution(LIGHT, score, 1e7, **{**SETTINGS, "parents": 50})


def bright(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise whose class is the quarter that is brighter than the rest."""
    images = torch.randn(count, 3, 56, 56, generator=generator) * 0.3
    labels = torch.arange(count) % 4
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 28 * (label // 2) :][:, :28, 28 * (label % 2) :][..., :28] += 1
    return images, labels


def test_a_super_network_is_trained_and_searched() -> None:
    """From end to end, with a score on images that it was not trained on."""
    generator = torch.Generator().manual_seed(0)
    space = Space.parse([(0, 16), *LARGEST[1:-1], (2, 24, 4)], OPTIONS)
    torch.manual_seed(0)
    net = SuperNet(space, example_per_arch=8, warmup_epochs=2, img_size=56).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for step in range(120):
        if step % 20 == 0:
            net.set_epoch(step // 20)
        images, labels = bright(32, generator)
        loss = torch.nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, labels = bright(64, generator)
    evaluate = inherited_accuracy(net, images, labels)
    few = {"population": 10, "parents": 4, "iterations": 2, "mutations": 4, "crossovers": 4}
    search = Evolution(space, evaluate, 0.8 * space.largest.macs(56), **{**SETTINGS, **few})
    found = search.run()
    assert net.training
    assert found.score > 0.9
    alone = net.eval().subnetwork(found.definition)
    accuracy = (alone(images).argmax(-1) == labels).double().mean()
    assert accuracy.item() == found.score


def test_a_reduction_without_new_parts_is_the_mean() -> None:
    module = SpatialReduction((4, 6), 8, 12, prefix=2).double()
    for parameter in module.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(2, 26, 8, dtype=torch.float64)
    y = module(x, (4, 6))
    patches = x[:, 2:].reshape(2, 2, 2, 3, 2, 8).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(y[..., :8], torch.cat([x[:, :2], patches], 1))
    assert (y[..., 8:] == 0).all()
    assert module(torch.randn(1, 17, 8, dtype=torch.float64), (3, 5)).shape == (1, 8, 12)


def test_other_image_sizes_interpolate_the_positions() -> None:
    net = ViTResNAS(LARGEST, img_size=56).eval()
    x = torch.randn(1, 3, 112, 70)
    expected = net(x)
    net.set_input_size((112, 70))
    assert net.pos_embed.shape == (1, 41, 16)
    assert net.blocks[3].pos_embed.shape == (1, 12, 24)
    torch.testing.assert_close(net(x), expected)
    with pytest.raises(TokensError, match="57 x 56"):
        net(torch.randn(1, 3, 57, 56))


def test_second_outputs() -> None:
    x = torch.randn(2, 3, 56, 56)
    patches = ViTResNAS(LARGEST, img_size=56, patch_output=True)
    logits, each = patches(x)
    assert (logits.shape, each.shape) == ((2, 5), (2, 4, 5))
    assert patches.eval()(x).shape == (2, 5)
    distilled = ViTResNAS(LARGEST, img_size=56, distilled=True).eval()
    one, other = distilled.get_classifier()  # type: ignore[misc]
    features = distilled.forward_features(x)
    expected = (one(features[:, 0]) + other(features[:, 1])) / 2
    torch.testing.assert_close(distilled(x), expected)
    assert isinstance(distilled.train()(x), tuple)
    distilled.reset_classifier(3)
    assert [t.shape for t in distilled(x)] == [(2, 3), (2, 3)]
    with pytest.raises(SettingsError, match="second output"):
        ViTResNAS(LARGEST, img_size=56, distilled=True, patch_output=True)


def test_a_checkpoint_with_a_patch_head_fits_a_network_without() -> None:
    trained = ViTResNAS(LARGEST, img_size=56, patch_output=True).eval()
    net = ViTResNAS(LARGEST, img_size=56).eval()
    net.load_state_dict(trained.state_dict(), strict=True)
    x = torch.randn(1, 3, 56, 56)
    assert torch.equal(net(x), trained(x))
    assert list(convert({"model": trained.state_dict()})) == list(net.state_dict())  # type: ignore[dict-item]


def test_stages_are_the_features() -> None:
    model = timm.create_model(
        "vit_resnas_tiny", features_only=True, img_size=112, out_indices=(0, 2)
    ).eval()
    assert model.feature_info.channels() == [176, 704]
    assert model.feature_info.reduction() == [14, 56]
    shapes = [tuple(t.shape) for t in model(torch.randn(1, 3, 112, 112))]
    assert shapes == [(1, 176, 8, 8), (1, 704, 2, 2)]


def test_a_stage_shows_its_class_tokens_and_can_be_the_last() -> None:
    net = ViTResNAS(LARGEST, img_size=56, distilled=True, patch_size=14).eval()
    x = torch.randn(1, 3, 56, 56)
    stopped, [(tokens, front)] = net.forward_intermediates(
        x, [0], norm=True, stop_early=True, output_fmt="NLC", return_prefix_tokens=True
    )
    # the norm fits the width of the last stage only
    torch.testing.assert_close(stopped, torch.cat([front, tokens], 1))
    assert stopped.shape == (1, 2 + 16, 16)
    whole, [last] = net.forward_intermediates(x, [1], norm=True, output_fmt="NLC")
    torch.testing.assert_close(whole[:, 2:], last)
    assert net.prune_intermediate_layers([0]) == [0]
    assert len(net.blocks) == 3
    torch.testing.assert_close(net(x), stopped)
    net.reset_classifier(3, "token")
    assert net(x).shape == (1, 3)


@pytest.mark.parametrize(
    ("definition", "match"),
    [
        (((4, 16), (1, (24, 2, 8), (24, 32), 1), (2, 24, 5)), "width 24, but width 16"),
        (((4, 16), (3, 16, 8), (2, 8, 5)), "only adds channels"),
        (((4, 16), (2, 24, 5)), "ends in"),
        (((4, 16, 8), (2, 16, 5)), "no patch embedding"),
        (((4, 16), (7, 1), (2, 16, 5)), "cannot be read"),
        (((4, 16), (1, (16, 0, 8), (16, 32), 1), (2, 16, 5)), "empty part"),
    ],
)
def test_wrong_definitions_are_refused(definition: Any, match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        Definition.parse(definition)


def test_wrong_spaces_and_subnetworks_are_refused() -> None:
    with pytest.raises(SettingsError, match="7 entries"):
        Space.parse(LARGEST, OPTIONS[:-1])
    with pytest.raises(SettingsError, match="the largest has to be"):
        Space.parse(LARGEST, [[12, 8], *OPTIONS[1:]])
    with pytest.raises(SettingsError, match="multiples of the head's width"):
        Space.parse(LARGEST, [OPTIONS[0], {**STAGE1, "attn": [16, 6]}, *OPTIONS[2:]])
    larger = [*LARGEST[:1], (1, (16, 5, 4), (16, 32), 1), *LARGEST[2:]]
    with pytest.raises(SettingsError, match="no sub-network"):
        supernet().kept(larger)
