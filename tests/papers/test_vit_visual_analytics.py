"""ViT visual analytics: against plain loops in float64, and with planted heads."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import transom
from tests.common.hosts import HOSTS, images, timm_vit
from transom.errors import HostError, SettingsError, TokensError
from transom.papers.lens import vit_visual_analytics as va
from transom.papers.lens.vit_visual_analytics import importance, patterns


def attention(b: int, h: int, n: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(b, h, n, n, generator=draw, dtype=torch.float64)).softmax(-1)


def plain_strength(a: Tensor, grid: tuple[int, int], p: int) -> dict[str, list[list[float]]]:
    """The definitions of the card, entry by entry."""
    h, w = grid
    n, count = h * w, max(grid)
    b = a.shape[0]
    out: dict[str, list[list[float]]] = {"mass": [], "density": [], "around": [], "rest": []}
    for head in range(a.shape[1]):
        mass, density, around = [0.0] * count, [0.0] * count, [0.0] * count
        prefix = entropy = 0.0
        for k in range(count):
            seen = 0
            for x in range(b):
                for i in range(n):
                    ring = [
                        j for j in range(n) if max(abs(i // w - j // w), abs(i % w - j % w)) == k
                    ]
                    total = sum(float(a[x, head, p + i, p + j]) for j in ring)
                    mass[k] += total / (b * n)
                    if ring:
                        seen += 1
                        density[k] += total / len(ring)
                if p:
                    row = [float(v) for v in a[x, head, 0, p:]]
                    s = row.index(max(row))
                    around[k] += (
                        sum(
                            row[j]
                            for j in range(n)
                            if max(abs(s // w - j // w), abs(s % w - j % w)) == k
                        )
                        / b
                    )
            density[k] /= seen
        for x in range(b):
            for i in range(n):
                row = [float(v) for v in a[x, head, p + i]]
                prefix += sum(row[:p]) / (b * n)
                entropy -= sum(v * math.log(v) for v in row) / (b * n)
        out["mass"].append(mass)
        out["density"].append(density)
        out["around"].append(around)
        out["rest"].append([prefix, entropy, sum(k * m for k, m in enumerate(mass))])
    return out


@pytest.mark.parametrize(("grid", "prefix"), [((3, 3), 1), ((2, 4), 3), ((3, 2), 0)])
def test_strength_is_that_of_plain_loops(grid: tuple[int, int], prefix: int) -> None:
    a = attention(2, 2, prefix + grid[0] * grid[1])
    found, plain = va.strength(a, grid, prefix), plain_strength(a, grid, prefix)
    for name in ("mass", "density", "around"):
        expected = torch.tensor(plain[name], dtype=torch.float64)
        torch.testing.assert_close(getattr(found, name), expected)
    rest = torch.stack([found.prefix, found.entropy, found.distance], 1)
    torch.testing.assert_close(rest, torch.tensor(plain["rest"], dtype=torch.float64))
    torch.testing.assert_close(found.mass.sum(1) + found.prefix, torch.ones(2).double())


def test_importance_is_that_of_plain_formulas() -> None:
    draw = torch.Generator().manual_seed(0)
    z, y = (3 * torch.randn(5, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    f, g = (torch.randn(5, 6, generator=draw, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([0, 1, 2, 3, 0])
    found = importance.measures((z, f), (y, g), labels)
    for i in range(5):
        p = [math.exp(float(v)) for v in z[i]]
        q = [math.exp(float(v)) for v in y[i]]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        jsd = sum(
            0.5 * a * math.log(a / c) + 0.5 * b * math.log(b / c)
            for a, b, c in zip(p, q, m, strict=True)
        )
        true, best = int(labels[i]), p.index(max(p))
        cosine = float(f[i] @ g[i] / (f[i].norm() * g[i].norm()))
        expected = {
            "accuracy": float(best == true) - float(q.index(max(q)) == true),
            "confidence_true": p[true] - q[true],
            "confidence_predicted": p[best] - q[best],
            "distribution": jsd,
            "representation": 1 - cosine,
        }
        assert set(expected) == set(va.METRICS)
        for name, value in expected.items():
            assert float(found[name][i]) == pytest.approx(value, abs=1e-12)
    ranks = importance.ranks(torch.tensor([[3.0, 1.0], [3.0, 0.0]]))
    assert ranks.tolist() == [[0.5, 2.0], [0.5, 3.0]]


def with_one_head(layer: int = 1, head: int = 2) -> torch.nn.Module:
    """A host in which one head reaches the classifier and the others hardly do."""
    model = timm_vit(depth=2)
    for i, block in enumerate(model.blocks):
        factor = torch.full((4,), 1e-2)
        if i == layer:
            factor[head] = 6.0
        block.attn.proj.weight.data *= factor.repeat_interleave(8)
        block.mlp.fc2.weight.data *= 1e-2
    return model


def test_the_head_that_matters_comes_first_by_every_metric() -> None:
    model = with_one_head()
    x = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    before = model(x)
    labels = before.argmax(-1)
    found = va.head_importance(model, x, labels)
    for name, values in found.heads.items():
        assert int(values.argmax()) == 1 * 4 + 2, name
    order = found.order()
    assert order[0] == (1, 2)
    best = va.pruning_curve(model, x, labels, order)
    worst = va.pruning_curve(model, x, labels, order[::-1])
    shuffled = [order[i] for i in torch.randperm(8, generator=torch.Generator().manual_seed(2))]
    assert best[0] == 1 and best.mean() > worst.mean() + 0.2
    assert best.mean() >= va.pruning_curve(model, x, labels, shuffled).mean()
    classes = found.classes()
    counts = torch.stack([(labels == c).sum() * classes[int(c)]["distribution"] for c in classes])
    torch.testing.assert_close(counts.sum(0) / 24, found.heads["distribution"])
    assert torch.equal(model(x), before) and not transom.fittings(model)


@pytest.mark.parametrize("replace", ["zero", "uniform", "mean"])
@torch.no_grad()
def test_a_pruned_head_is_replaced(replace: importance.Replace) -> None:
    model, x = timm_vit(depth=1), images("timm-class")
    block, features = model.blocks[0], {}
    handle = block.attn.proj.register_forward_pre_hook(lambda _, a: features.update(out=a[0]))
    with importance.pruning(model, [(0, 1)], replace, [torch.full((4, 17, 8), 0.5)]):
        model(x)
    handle.remove()
    own = features["out"].unflatten(-1, (4, 8))[:, :, 1]
    with transom.capture(model, "blocks.0.attention.value") as seen:
        model(x)
    mean = seen["blocks.0.attention.value"][:, 1].mean(1, keepdim=True)
    expected = {"zero": 0 * own, "uniform": mean.expand_as(own), "mean": 0 * own + 0.5}[replace]
    torch.testing.assert_close(own, expected)


def planted(grid: tuple[int, int], copies: int) -> tuple[Tensor, Tensor]:
    """Noisy maps of four kinds: oneself, the left neighbour, everywhere, one salient column."""
    n = grid[0] * grid[1]
    left = torch.zeros(n, n)
    place = torch.arange(n)
    left[place, torch.where(place % grid[1] > 0, place - 1, place)] = 1
    draw = torch.Generator().manual_seed(0)
    salient = torch.zeros(n, n)
    salient[:, 5] = 1
    kinds = torch.stack([torch.eye(n), left, torch.full((n, n), 1 / n), salient])
    noise = torch.rand(copies, 4, n, n, generator=draw)
    maps = 0.8 * kinds + 0.2 * noise / noise.sum(-1, keepdim=True)
    return maps.flatten(0, 1), torch.arange(4).repeat(copies)


def test_planted_patterns_are_told_apart() -> None:
    maps, kind = planted((4, 4), 8)
    state = torch.random.get_rng_state()
    settings = {"clusters": (2, 3, 4, 6), "epochs": 150, "widths": (64, 32, 8)}
    found = va.find_patterns(maps, **settings)
    assert torch.equal(torch.random.get_rng_state(), state)
    purity = sum(kind[found.cluster == c].bincount().max() for c in found.cluster.unique()) / 32
    assert len(found.prototypes) == 4 and purity >= 0.9
    assert found.losses[-1] < 0.3 * found.losses[0]
    diagonal = found.prototypes[found.cluster[0]]
    assert diagonal.diagonal().mean() > 0.5 > 5 * (diagonal.sum() - diagonal.trace()) / 240
    assert torch.equal(va.find_patterns(maps, **settings).codes, found.codes)
    for scale in ("sqrt", "log"):
        there = patterns.scaled(maps, scale)
        torch.testing.assert_close(patterns.unscaled(there, scale), maps.flatten(-2))
    small = va.find_patterns(maps, compact=True, **settings)
    purity = sum(kind[small.cluster == c].bincount().max() for c in small.cluster.unique()) / 32
    assert len(small.prototypes) == 4 and purity >= 0.9
    assert small.span is not None and small.autoencoder.encoder[0].in_features == 32
    flat = patterns.scaled(maps, "sqrt")
    torch.testing.assert_close(small.span.back(small.span.into(flat)), flat)
    for c in range(4):
        own = maps[small.cluster == c].mean(0)
        assert (small.prototypes[c] - own).abs().mean() < 0.5 * (maps.mean(0) - own).abs().mean()
    strengths = va.strength(maps[None, :4], (4, 4), 0)
    assert strengths.mass[0].argmax() == 0 and strengths.mass[1].argmax() == 1
    assert strengths.distance[2] > strengths.distance[1] > strengths.distance[0]
    described = va.describe(maps.unflatten(0, (8, 4)), (4, 4))
    assert described["diagonal"].argmax() == 0 and described["anisotropy"].argmax() == 1
    assert described["concentration"].argmax() == 3


def test_silhouette_is_that_of_plain_loops() -> None:
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 0])
    values = []
    for i in range(9):
        means = {}
        for c in range(3):
            far = [float((x[i] - x[j]).norm()) for j in range(9) if label[j] == c and j != i]
            means[c] = sum(far) / len(far) if far else None
        own = means.pop(int(label[i]))
        other = min(v for v in means.values() if v is not None)
        values.append(0.0 if own is None else (other - own) / max(other, own))
    assert patterns.silhouette(x, label) == pytest.approx(sum(values) / 9)


@pytest.mark.parametrize("host", ["timm-class", "timm-registers", "hf-clip-vision"])
def test_overview_of_hosts(host: str) -> None:
    model, x = HOSTS[host](), images(host)
    pruned = host != "hf-clip-vision"
    found = va.overview(model, x, importance=pruned, epochs=3, widths=(8, 4), clusters=(2, 3))
    shape = found.table["distance"].shape
    assert all(v.shape == shape for v in found.table.values())
    assert ("rank" in found.table) is pruned and "cluster" in found.table
    names, correlations = found.correlations()
    here = [names.index("self"), names.index("diagonal")]
    torch.testing.assert_close(
        correlations[here][:, here], torch.ones(2, 2).double(), atol=1e-5, rtol=0
    )
    assert found.trend()["distance"].shape == shape[:1]


def test_errors_say_what_is_wrong() -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")
    with pytest.raises(SettingsError, match="replace"):
        va.head_importance(model, x, replace="noise")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="labels"):
        va.head_importance(model, x, torch.zeros(1, dtype=torch.long))
    with pytest.raises(HostError, match="classifier"):
        va.head_importance(HOSTS["hf-clip-vision"](), x)
    found = va.head_importance(HOSTS["hf-clip-vision"](), x, classes=False)
    assert list(found.heads) == ["representation"] and (found.heads["representation"] > 0).any()
    with pytest.raises(TokensError, match="grid"):
        va.strength(attention(1, 1, 9), (3, 3), 1)
    with pytest.raises(SettingsError, match="clusters"):
        va.find_patterns(torch.rand(2, 4, 4))
    transom.apply(model, "tome", r=2)
    with pytest.raises(TokensError, match="removes tokens"):
        va.maps_of(model, x)
