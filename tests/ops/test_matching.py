"""What every matching must be: a partition that protects the prefix and repeats exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from torch import Tensor

from tests.ops.strategies import features, generator
from transom.ops import matching as m
from transom.ops import padded
from transom.ops.matching import Matching

Matcher = Callable[[Tensor, int, int], Matching]


def by_energy(match: Callable[..., Matching]) -> Matcher:
    """The matchings that want an energy as well, with PiToMe's."""

    def matched(metric: Tensor, r: int, prefix: int) -> Matching:
        units = m.unit(metric[:, prefix:])
        return match(units, m.energy(units, 0.5), r, prefix)

    return matched


def kth(metric: Tensor, r: int, prefix: int) -> Matching:
    """Every second token stays; what is left over stays too, so that nothing is dropped."""
    found = m.every_kth(metric[:, prefix:], 2)
    if (metric.shape[1] - prefix) % 2:
        last = torch.full((len(metric), 1), metric.shape[1] - prefix - 1)
        found = Matching(torch.cat([found.keep, last], 1), found.source, found.into)
    return found.behind(prefix)


def complete(metric: Tensor, r: int, prefix: int) -> Matching:
    """Any token may flow into any other one."""
    return m.complete(metric, r, reserved=m.Reserved(prefix))


MATCHERS: dict[str, Matcher] = {
    "bipartite": m.bipartite,
    "complete": complete,
    "energy_pairs": by_energy(m.energy_pairs),
    "energy_bipartite": by_energy(m.energy_bipartite),
    "energy_halves": by_energy(m.energy_halves),
    "every_kth": kth,
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def check(found: Matching, count: int, prefix: int) -> None:
    """A partition of the tokens that leaves the prefix in front and alone."""
    everything = torch.cat([found.keep, found.source], 1).sort(1).values
    assert (everything == torch.arange(count)).all(), "keep and source are no partition"
    assert all(part.dtype == torch.int64 for part in found)
    assert (found.keep[:, :prefix] == torch.arange(prefix)).all(), "a prefix token moved"
    assert found.source.shape == found.into.shape
    assert (found.into < found.keep.shape[1]).all()
    assert (found.into >= prefix).all(), "a token flows into a prefix token"
    target = found.target(count)
    assert (target >= 0).all()
    assert torch.equal(target.gather(1, found.source), found.into)


@pytest.mark.parametrize("name", MATCHERS)
@given(st.data())
def test_a_matching_is_a_partition(name: str, data: DataObject) -> None:
    batch, prefix = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 5))
    loose = data.draw(st.integers(2, 17))
    count = prefix + loose
    metric = data.draw(features(batch, count)).to(data.draw(st.sampled_from(DTYPES)))
    r = data.draw(st.integers(1, loose // 2))
    before = metric.clone()
    found = MATCHERS[name](metric, r, prefix)
    check(found, count, prefix)
    if name != "every_kth":
        assert found.source.shape[1] == r
    assert torch.equal(metric, before), "the metric was changed in place"
    again = MATCHERS[name](metric, r, prefix)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@given(st.data(), st.integers(0, 3), st.integers(0, 9), st.integers(0, 1000))
def test_r_is_capped_at_half(data: DataObject, prefix: int, loose: int, r: int) -> None:
    if prefix + loose == 0:
        return
    metric = data.draw(features(2, prefix + loose))
    found = m.bipartite(metric, r, prefix)
    check(found, prefix + loose, prefix)
    assert found.source.shape[1] == min(r, loose // 2)
    assert found.keep.shape[1] > prefix or loose == 0


@pytest.mark.parametrize("count", [0, 1])
def test_a_single_token_stays(count: int) -> None:
    metric = torch.ones(2, count, 3)
    check(m.bipartite(metric, 4), count, 0)
    check(padded.bipartite(metric, torch.ones(2, count, dtype=torch.bool), 4), count, 0)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("name", MATCHERS)
def test_ties_are_broken_by_position(name: str, prefix: int) -> None:
    """A constant image: the answer is the same for every item, at every batch size and width."""
    count = prefix + 40
    expected = MATCHERS[name](torch.ones(1, count, 3), 9, prefix)
    check(expected, count, prefix)
    for batch, width in ((1, 3), (5, 3), (5, 64)):
        found = MATCHERS[name](torch.ones(batch, count, width), 9, prefix)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b.expand(batch, -1))
    if name != "every_kth":
        leaves = expected.source[0]
        assert torch.equal(leaves, leaves.sort().values), "equal tokens leave in order"


@pytest.mark.parametrize("name", MATCHERS)
@given(st.data())
def test_an_item_does_not_see_its_batch(name: str, data: DataObject) -> None:
    prefix, count = data.draw(st.integers(0, 2)), data.draw(st.integers(8, 20))
    metric = data.draw(features(3, count))
    together = MATCHERS[name](metric, 3, prefix)
    for item in range(3):
        alone = MATCHERS[name](metric[item : item + 1], 3, prefix)
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[item], b[0])


@pytest.mark.parametrize("name", ["bipartite", "energy_pairs", "energy_bipartite"])
@given(st.data())
def test_a_source_flows_into_its_most_similar(name: str, data: DataObject) -> None:
    """Among the tokens that were free to receive, none was closer."""
    prefix, loose = data.draw(st.integers(0, 2)), data.draw(st.integers(4, 14))
    metric = torch.randn(2, prefix + loose, 6, generator=generator(data.draw))
    r = data.draw(st.integers(1, loose // 2))
    found = MATCHERS[name](metric, r, prefix)
    near = torch.cosine_similarity(metric[:, :, None], metric[:, None], -1)
    for item in range(2):
        if name == "bipartite":
            free = [i for i in range(prefix, prefix + loose) if i % 2]
        elif name == "energy_pairs":
            free = found.keep[item, -r:].tolist()
        else:
            free = found.keep[item, -(loose // 2) :].tolist()
        for old, new in zip(found.source[item], found.into[item], strict=True):
            there = near[item, old, found.keep[item, new]]
            assert there >= near[item, old, free].max() - 1e-6


def test_the_most_similar_pairs_go_first() -> None:
    metric = torch.eye(8)[None].clone()
    metric[0, 4] = metric[0, 1]  # an exact copy, and nothing else is alike
    found = m.bipartite(metric, 1)
    assert found.source.tolist() == [[4]]
    assert found.keep[0, found.into[0, 0]] == 1


def test_high_energy_is_a_crowd() -> None:
    metric = torch.eye(10)[None].clone()
    metric[0, :5] = metric[0, 0]
    for score in (m.energy(metric, 0.5), m.gaussian_energy(metric, 0.5)):  # of length one
        assert score[0, :5].min() > score[0, 5:].max()
    found = m.energy_pairs(metric, m.energy(metric, 0.5), 2)
    assert set(found.source[0].tolist()) <= set(range(5))


@given(st.data(), st.floats(-0.5, 1.0), st.floats(0.2, 2.0))
def test_energy_is_the_mean_elu(data: DataObject, margin: float, alpha: float) -> None:
    units = m.unit(data.draw(features(2, 9)).double())
    expected = F.elu(units @ units.mT - margin, alpha).mean(-1)
    assert torch.allclose(m.energy(units, margin, alpha), expected, atol=1e-12)
    low = m.energy(units.bfloat16(), margin, alpha)
    assert low.dtype == torch.bfloat16
    assert torch.allclose(low.double(), expected, atol=0.05)


@given(st.data(), st.integers(1, 4), st.integers(1, 40))
def test_descending_is_stable(data: DataObject, batch: int, count: int) -> None:
    score = torch.randint(0, 4, (batch, count), generator=generator(data.draw)).float()
    order = m.descending(score)
    for item in range(batch):
        expected = sorted(range(count), key=lambda i: (-score[item, i], i))
        assert order[item].tolist() == expected


class Descending(torch.nn.Module):
    def forward(self, score: Tensor) -> Tensor:
        return m.descending(score)


@pytest.mark.parametrize("count", [5, 40, 1000])
def test_ties_when_exported(count: int) -> None:
    """Which of two equal tokens leaves does not depend on who runs the graph."""
    score = torch.randint(0, 3, (2, count)).float()
    program = torch.export.export(Descending(), (score,)).module()
    assert torch.equal(program(score), m.descending(score))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("count", [40, 1000])
def test_ties_in_onnx(count: int) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    score = torch.randint(0, 3, (2, count)).float()
    program = torch.onnx.export(Descending(), (score,), dynamo=True, verbose=False)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (order,) = session.run(None, {session.get_inputs()[0].name: score.numpy()})
    assert torch.equal(torch.from_numpy(order), m.descending(score))


def test_no_gradient_passes() -> None:
    metric = torch.randn(1, 9, 4, requires_grad=True)
    for match in MATCHERS.values():
        assert not any(part.requires_grad for part in match(metric, 2, 1))
    assert not m.energy(metric, 0.5).requires_grad
