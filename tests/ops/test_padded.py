"""Padded batches: every item as if it were alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from transom.ops import matching, merging, padded, reference
from transom.ops.matching import Matching
from transom.tokens import Layout, Record, Tokens

LENGTHS = [1, 2, 3, 7, 12, 18, 19]


def batch(prefix: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Features (7, N, 6) with NaN-free rubbish as padding, and which tokens are real."""
    count = prefix + max(LENGTHS)
    place = torch.arange(count)
    real = torch.tensor(LENGTHS)[:, None] + prefix
    if side == "right":
        valid = place < real
    else:  # holes: padding stands between real tokens, as in a grid of padded rows
        order = torch.rand(len(LENGTHS), count)
        order[:, :prefix] = -1
        valid = order.argsort(1).argsort(1) < real
    return torch.randn(len(LENGTHS), count, 6), valid


def nothing(x: Tensor) -> Matching:
    """Every token stays in its place."""
    stay = torch.arange(x.shape[1])[None]
    return Matching(stay, stay[:, :0], stay[:, :0])


def check(found: Matching, expected: list[list[tuple[int, ...]]], valid: Tensor) -> None:
    """Same groups of real tokens in the same order, nothing real lost, padding apart."""
    count = valid.shape[1]
    assert found.keep.shape[1] + found.source.shape[1] == count
    for item, groups in enumerate(expected):
        everything = torch.cat([found.keep[item], found.source[item]]).sort().values
        assert torch.equal(everything, torch.arange(count)), "a token is lost or there twice"
        real = set(valid[item].nonzero()[:, 0].tolist())
        seen = []
        for group in reference.groups(found, item):
            if group[0] in real:
                seen.append((group[0], *[old for old in group[1:] if old in real]))
            else:
                assert not real & set(group), "a real token flows into padding"
        assert seen == groups


@pytest.mark.parametrize("side", ["right", "holes"])
@pytest.mark.parametrize("prefix", [0, 1, 2, 3])
@pytest.mark.parametrize("r", [1, 4, 100])
def test_bipartite(r: int, prefix: int, side: str) -> None:
    metric, valid = batch(prefix, side)

    def match(x: Tensor) -> Matching:
        return matching.bipartite(x, r, prefix) if x.shape[1] > 1 else nothing(x)

    expected = reference.alone(match, metric, valid)
    check(padded.bipartite(metric, valid, r, prefix), expected, valid)


@pytest.mark.parametrize("side", ["right", "holes"])
@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.85, 0.94])
@pytest.mark.parametrize("kind", ["pitome", "bipartite", "text"])
def test_by_energy(kind: str, ratio: float, prefix: int, side: str) -> None:
    metric, valid = batch(prefix, side)
    margin = 0.4

    def match(x: Tensor) -> Matching:
        count = x.shape[1] - prefix
        r = math.floor(count - count * ratio)
        behind = matching.unit(x[:, prefix:])
        if not r:  # the order by energy is not asked for when nothing leaves
            return nothing(x)
        if kind == "text":
            score = matching.gaussian_energy(behind, margin)
            return matching.energy_halves(behind, score, r, prefix)
        score = matching.energy(behind, margin)
        pick = matching.energy_pairs if kind == "pitome" else matching.energy_bipartite
        return pick(behind, score, r, prefix)

    expected = reference.alone(match, metric, valid)
    check(padded.by_energy(metric, valid, ratio, margin, kind, prefix), expected, valid)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_highest(ratio: float, prefix: int) -> None:
    _, valid = batch(prefix, "holes")
    score = torch.rand(len(LENGTHS), max(LENGTHS))
    most = math.ceil(ratio * max(LENGTHS))
    stay = torch.tensor([math.ceil(ratio * n) for n in LENGTHS])
    keep, rest, lead = padded.highest(score, valid, stay, most, prefix)
    for item, amount in enumerate(stay.tolist()):
        real = valid[item, prefix:].nonzero()[:, 0]
        line = real[score[item, real].argsort(descending=True)] + prefix
        front = torch.cat([torch.arange(prefix), line[:amount]])
        assert torch.equal(keep[item, : prefix + amount], front)
        assert not valid[item, keep[item, prefix + amount :]].any()
        assert set(line[amount:].tolist()) <= set(rest[item].tolist())
        if amount < len(line):
            assert lead[item] == line[amount]


@pytest.mark.parametrize("weighted", [True, False])
def test_padding_weighs_nothing(weighted: bool) -> None:
    """Means and sizes are those of the real tokens; a group of padding stays finite."""
    metric, valid = batch(1)
    x = metric.clone()
    record = Record(Layout(1, None, x.shape[1]), valid=valid)
    for _ in range(2):
        tokens = Tokens(x, record)
        assert record.valid is not None
        found = padded.bipartite(x, record.valid, 6, 1)
        merged = tokens.merge(found, weighted=weighted)
        assert torch.isfinite(merged.x).all()
        x, record = merged.x, merged.record
        assert record.size is not None
        assert record.valid is not None
        assert (record.size[~record.valid] == 0).all()
        assert torch.equal(record.size.sum((1, 2)), torch.tensor(LENGTHS) + 1.0)
    one = metric[3:4, :8]  # the item with 7 tokens behind the prefix
    alone = Tokens(one, Record(Layout(1, None, 8)))
    for _ in range(2):
        alone = alone.merge(matching.bipartite(alone.x, 6, 1), weighted=weighted)
    assert record.valid is not None
    torch.testing.assert_close(x[3, record.valid[3]], alone.x[0], atol=1e-6, rtol=1e-6)


def test_a_group_may_have_no_weight() -> None:
    """A mean over nothing but padding of weight 1e-30 is the mean of the padding."""
    found = Matching(torch.tensor([[0, 1]]), torch.tensor([[2]]), torch.tensor([[1]]))
    x = torch.tensor([[[1.0], [2.0], [4.0]]])
    out = merging.merge(x, found, "mean", torch.tensor([[[1.0], [1e-30], [1e-30]]]))
    assert out[0, :, 0].tolist() == [1.0, 3.0]
