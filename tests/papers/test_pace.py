"""PACE: the bound rises, concepts are found, and they explain what the model says."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor

from transom.errors import HostError, SettingsError
from transom.papers.lens import pace
from transom.papers.lens.pace.explainer import Explanation, Patches


def planted(images: int = 60, seed: int = 0) -> tuple[Patches, Tensor]:
    """Patches of four clusters; an image of class 0 has the first two, of class 1 the others."""
    draw = torch.Generator().manual_seed(seed)
    centres = 4 * torch.eye(4, 5, dtype=torch.float64)
    kind = torch.arange(images) % 2
    which = torch.randint(2, (images, 12), generator=draw) + 2 * kind[:, None]
    noise = torch.randn(images, 12, 5, generator=draw, dtype=torch.float64)
    weights = torch.rand(images, 12, generator=draw, dtype=torch.float64) + 0.2
    weights = weights / weights.sum(1, keepdim=True) * 12
    labels = 0.05 + 0.9 * torch.nn.functional.one_hot(kind, 2).double()
    return Patches(centres[which] + 0.5 * noise, weights, labels), which


@pytest.mark.parametrize("copies", [False, True])
def test_the_bound_rises_every_round(copies: bool) -> None:
    patches, _ = planted()
    fitted = pace.learn(patches, 6, rounds=12)
    rises = torch.tensor(fitted.bounds).double().diff()
    assert (rises > -1e-8 * abs(fitted.bounds[-1])).all()
    assert fitted.bounds[-1] > fitted.bounds[0] + 10
    if copies:
        twin = patches._replace(embeds=patches.embeds + 0.1)
        found = pace.learn(patches, 6, twins=twin, rounds=3, stability=5.0)
        assert found.explanation.theta.isfinite().all()


def test_planted_concepts_explain_the_label_and_shuffled_ones_do_not() -> None:
    patches, which = planted(120)
    fitted = pace.learn(patches, 4, rounds=15)
    found = fitted.explanation
    best = found.phi.argmax(-1)
    for k in best.unique():
        counts = which[best == k].bincount()
        assert counts.max() / counts.sum() > 0.95
    done = pace.measure(found, patches.weights, patches.labels, found)
    assert done.faithfulness >= 0.95
    assert done.stability == 0
    # two of four concepts hold an image; the prior counts 4 * 2 beside its 12 patches
    assert abs(done.levels - (1 - 8 / 20 * 0.5)) < 0.02
    assert done.parsimony == 4
    sparse = pace.learn(patches, 4, alpha=0.01, rounds=15)
    assert pace.measure(sparse.explanation, patches.weights, patches.labels).sparsity > 0.45
    order = torch.randperm(120 * 12, generator=torch.Generator().manual_seed(1))
    mixed = patches.embeds.flatten(0, 1)[order].view_as(patches.embeds)
    shuffled = pace.explain(
        patches._replace(embeds=mixed),
        fitted.concepts._replace(eta=torch.zeros_like(fitted.concepts.eta)),
    )
    assert pace.faithfulness(shuffled.theta, patches.labels.argmax(-1)) < 0.8
    classes = pace.class_level(found, patches.labels)
    torch.testing.assert_close(classes.sum(-1), torch.ones(2).double())


def test_attention_reaches_the_explanation() -> None:
    patches, _ = planted(8)
    concepts = pace.learn(patches, 4, rounds=5).concepts
    there = pace.explain(patches, concepts)
    other = patches._replace(weights=patches.weights.flip(1))
    assert (there.gamma - pace.explain(other, concepts).gamma).abs().max() > 0.1
    alone = Patches(*(t[:1] for t in patches))
    torch.testing.assert_close(
        pace.explain(alone, concepts).theta, there.theta[:1], atol=1e-4, rtol=0
    )


def test_labels_pull() -> None:
    patches, _ = planted(20)
    concepts = pace.learn(patches, 4, rounds=10).concepts
    with_labels = pace.explain(patches, concepts).phi.mean(1)
    without = pace.explain(patches, concepts._replace(eta=0 * concepts.eta)).phi.mean(1)
    likelihood = [
        (patches.labels * (mean @ concepts.eta.T).log_softmax(-1)).sum()
        for mean in (with_labels, without)
    ]
    assert likelihood[0] >= likelihood[1]


def test_a_host_is_only_looked_at() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=24, num_heads=3, num_classes=4
    ).eval()
    x = torch.randn(5, 3, 32, 32)
    before = model(x)
    seen = pace.look_at(model, x, dim=6)
    assert seen.embeds.shape == (5, 4, 6) and seen.labels.shape == (5, 4)
    torch.testing.assert_close(seen.weights.sum(1), torch.full((5,), 4.0))
    assert torch.equal(model(x), before)
    assert pace.learn(seen, 3, rounds=2).explanation.theta.shape == (5, 3)
    again, other = pace.look_at(model, x, dim=6, seed=0), pace.look_at(model, x, dim=6, seed=1)
    assert torch.equal(again.embeds, seen.embeds) and not torch.equal(other.embeds, seen.embeds)


def test_errors_say_what_is_wrong() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        depth=2,
        embed_dim=24,
        num_heads=3,
        class_token=False,
        global_pool="avg",
    )
    with pytest.raises(HostError, match="class token"):
        pace.look_at(model, torch.randn(1, 3, 32, 32))
    with pytest.raises(SettingsError, match="count"):
        pace.learn(planted(4)[0], 0)
    with pytest.raises(SettingsError, match="rate"):
        pace.learn(planted(4)[0], 2, rate=3)


HUES = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 1, 0]]).float()


def coloured(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Four colour cells an image: red and yellow ones, or blue and green ones.

    Images (count, 3, 32, 32), their class, and the colour of each 8-pixel patch (count, 16).
    """
    draw = torch.Generator().manual_seed(seed)
    kind = torch.arange(count) % 2
    cell = torch.randint(2, (count, 2, 2), generator=draw) + 2 * kind[:, None, None]
    pixels = HUES[cell].permute(0, 3, 1, 2).repeat_interleave(16, 2).repeat_interleave(16, 3)
    pixels = pixels + 0.3 * torch.randn(pixels.shape, generator=draw) - 0.5
    return pixels, kind, cell.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)


@pytest.mark.slow
def test_concepts_of_a_trained_transformer_beat_random_ones_in_every_desideratum() -> None:
    """The demonstration of the paper's Color data: colours are found, nobody names them."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=4,
        num_classes=2,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(50):
        x, kind, _ = coloured(32, 100 + step)
        loss = torch.nn.functional.cross_entropy(model(x), kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    x, kind, colours = coloured(160, 1)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    seen, twin = (pace.look_at(model, p, dim=8) for p in (x, x.flip(3) + 0.1 * noise))
    assert (seen.labels.argmax(-1) == kind).float().mean() > 0.95
    fitted = pace.learn(seen, 10, twins=twin, rounds=10, alpha=0.1)
    found = fitted.explanation
    done = pace.measure(found, seen.weights, seen.labels, pace.explain(twin, fitted.concepts))

    draw = torch.Generator().manual_seed(3)

    def guess() -> Explanation:
        theta, phi = (
            torch._sample_dirichlet(torch.ones(shape), draw).to(found.theta)
            for shape in (found.theta.shape, found.phi.shape)
        )
        return found._replace(theta=theta, gamma=theta * 16, phi=phi)

    random = pace.measure(guess(), seen.weights, seen.labels, guess())
    assert done.faithfulness >= 0.95 > 0.7 > random.faithfulness
    assert done.stability < 0.7 * random.stability
    assert done.sparsity > random.sparsity + 0.3
    assert done.levels > random.levels + 0.1
    assert done.parsimony < random.parsimony

    busiest = found.phi.argmax(-1).flatten().bincount().topk(4).indices
    for concept in busiest.tolist():
        patches = found.phi[..., concept].flatten().topk(30).indices
        assert colours.flatten()[patches].bincount().max() >= 29
    order = torch.randperm(160 * 16, generator=draw)
    mixed = seen._replace(embeds=seen.embeds.flatten(0, 1)[order].view_as(seen.embeds))
    blind = fitted.concepts._replace(eta=0 * fitted.concepts.eta)
    shuffled = pace.explain(mixed, blind)
    assert pace.faithfulness(shuffled.theta, seen.labels.argmax(-1)) < 0.75
