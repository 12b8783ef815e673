"""Compiled kernels against their twins in plain torch, and when they stand aside."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import transom
from transom import ops
from transom.ops import matching, merging, native
from transom.ops.matching import Matching

pytest.importorskip("numba", reason="compiled kernels need numba: pip install 'transom[native]'")

SHAPES = {
    "batch": st.integers(1, 3),
    "count": st.integers(4, 40),
    "width": st.sampled_from([3, 8, 18, 64]),
    "prefix": st.integers(0, 1),
    "part": st.floats(0, 1),
    "seed": st.integers(0, 99),
}


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def twins(call: Callable[[], Any]) -> tuple[Any, Any]:
    """What a call gives with the kernels and without them."""
    compiled = call()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_kernels", lambda: None)
        return compiled, call()


def metric_of(batch: int, count: int, width: int, seed: int) -> Tensor:
    """Features of which some agree closely."""
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(batch, 3, width, generator=rng)
    which = torch.randint(0, 3, (count,), generator=rng)
    return centres[:, which] + torch.randn(batch, count, width, generator=rng)


def same(found: Matching, expected: Matching) -> None:
    for name, a, b in zip(Matching._fields, found, expected, strict=True):
        assert torch.equal(a, b), name


def apart(values: Tensor) -> bool:
    """Whether no two values of an item are so close that rounding could turn them round."""
    return bool((values.flatten(1).sort(-1).values.diff(dim=-1) > 2e-6).all())


def pairs(metric: Tensor) -> Tensor:
    """Cosine of each pair of tokens once: (B, N (N - 1) / 2)."""
    unit = matching.unit(metric)
    one, other = torch.triu_indices(metric.shape[1], metric.shape[1], 1)
    return (unit @ unit.mT)[:, one, other]


@given(**SHAPES)
def test_bipartite(batch: int, count: int, width: int, prefix: int, part: float, seed: int) -> None:
    metric = metric_of(batch, count, width, seed)
    r = round(part * ((count - prefix) // 2))
    found, expected = twins(lambda: matching.bipartite(metric, r, prefix))
    everything = torch.cat([found.keep, found.source], 1).sort(1).values
    assert torch.equal(everything, torch.arange(count).expand(batch, -1))
    assume(apart(pairs(metric)))
    same(found, expected)


@given(**SHAPES, margin=st.sampled_from([-0.5, 0.0, 0.45, 0.9]), alpha=st.sampled_from([1.0, 0.5]))
def test_by_energy(
    batch: int,
    count: int,
    width: int,
    prefix: int,
    part: float,
    seed: int,
    margin: float,
    alpha: float,
) -> None:
    metric = metric_of(batch, count, width, seed)
    r = max(1, round(part * ((count - prefix) // 2)))
    found, expected = twins(lambda: matching.by_energy(metric, r, prefix, margin, "pitome", alpha))
    unit = matching.unit(metric[:, prefix:])
    score = matching.energy(unit.clone(), margin, alpha)
    everything = torch.cat([found.keep, found.source], 1).sort(1).values
    assert torch.equal(everything, torch.arange(count).expand(batch, -1))
    assert torch.equal(found.keep[:, :prefix], torch.arange(prefix).expand(batch, -1))
    assume(apart(score) and apart(pairs(metric[:, prefix:])))
    same(found, expected)


@given(**SHAPES, suffix=st.integers(0, 1), guided=st.booleans(), also=st.booleans())
def test_complete(
    batch: int,
    count: int,
    width: int,
    prefix: int,
    part: float,
    seed: int,
    suffix: int,
    guided: bool,
    also: bool,
) -> None:
    rng = torch.Generator().manual_seed(seed)
    metric = metric_of(batch, count, width, seed)
    importance = torch.rand(batch, count, generator=rng) if guided else None
    other = torch.randint(prefix, count - suffix, (batch,), generator=rng) if also else None
    reserved = matching.Reserved(prefix, suffix, other)
    r = max(1, round(part * (count // 2)))
    found, expected = twins(lambda: matching.complete(metric, r, importance, reserved))
    everything = torch.cat([found.keep, found.source], 1).sort(1).values
    assert torch.equal(everything, torch.arange(count).expand(batch, -1))
    assume(apart(pairs(metric)))
    same(found, expected)


@pytest.mark.parametrize("width", [5, 64])
@pytest.mark.parametrize("margin", [-1.0, 0.0, 0.9, 1.0])
def test_energy(width: int, margin: float) -> None:
    from transom.ops import kernels

    units = matching.unit(metric_of(1, 33, width, 0))
    units = torch.cat([units, units[:, :4], -units[:, :4]], 1)  # cosines of 1 and -1 too
    found = torch.empty(units.shape[1])
    kernels.energy(units[0].contiguous().numpy(), margin, 0.7, found.numpy())
    expected = matching.energy(units.double(), margin, 0.7)[0]
    assert torch.allclose(found.double(), expected, atol=2e-6)


@given(**SHAPES, sized=st.booleans())
def test_merge(
    batch: int, count: int, width: int, prefix: int, part: float, seed: int, sized: bool
) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, count, width, generator=rng)
    size = torch.randint(1, 6, (batch, count, 1), generator=rng).float() if sized else None
    found = matching.bipartite(x, round(part * ((count - prefix) // 2)), prefix)
    compiled, plain = twins(lambda: merging.merge_by_size(x, found, size))
    assert torch.allclose(compiled[0], plain[0], atol=1e-5)
    assert torch.equal(compiled[1], plain[1])


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_odd_values_stay_inside_the_arrays(value: float) -> None:
    """Equal, missing and infinite features: places are valid ones, and ties go by position."""
    metric = torch.full((2, 21, 8), value)
    for found in (
        matching.bipartite(metric, 6, 1),
        matching.by_energy(metric, 6, 1, 0.9, "pitome"),
        matching.complete(metric, 6, None, matching.Reserved(1)),
    ):
        everything = torch.cat([found.keep, found.source], 1).sort(1).values
        assert torch.equal(everything, torch.arange(21).expand(2, -1))
        assert 0 <= int(found.into.min()) <= int(found.into.max()) < 15
    if value == 0:
        same(*twins(lambda: matching.bipartite(metric, 6, 1)))
        same(*twins(lambda: matching.by_energy(metric, 6, 1, 0.9, "pitome")))
        same(*twins(lambda: matching.complete(metric, 6, None, matching.Reserved(1))))


def test_equal_tokens_are_told_apart_by_position() -> None:
    kinds = 5  # tokens i, i + 5, i + 10, ... are the same
    metric = metric_of(1, kinds, 64, 0).repeat(1, 8, 1)
    found = matching.bipartite(metric, 12, 1)
    for kind in range(kinds):
        of_kind = found.source[0] % kinds == kind
        assert (found.source[0, of_kind].diff() > 0).all()
        assert len(found.into[0, of_kind].unique()) <= 1


def test_a_part_of_a_wider_tensor() -> None:
    wide = metric_of(2, 30, 40, 0)
    part = wide[..., 3:27]
    same(matching.bipartite(part, 5, 1), matching.bipartite(part.contiguous(), 5, 1))


@pytest.mark.parametrize(
    "method", [("tome", {"r": 3}), ("pitome", {"ratio": 0.8}), ("crossget", {"r": 3})]
)
def test_a_model_gives_the_same(method: tuple[str, dict[str, Any]]) -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=96, depth=3, embed_dim=48, num_heads=3, num_classes=5
    ).eval()
    transom.apply(model, method[0], **method[1])
    images = torch.randn(2, 3, 96, 96)
    assert native.serves(images)
    compiled, plain = twins(lambda: model(images))
    assert torch.allclose(compiled, plain, atol=1e-5)

    def flops() -> int:
        with FlopCounterMode(display=False) as counter:
            model(images)
        return counter.get_total_flops()

    assert flops() == twins(flops)[1]


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:FutureWarning")
def test_when_they_stand_aside() -> None:
    x = torch.randn(2, 3)
    assert native.serves(x)
    assert not native.serves(x, x.double())
    assert not native.serves(x.bfloat16())
    assert not native.serves(x.to("meta"))
    assert not native.serves(torch.randn(native.FEW + 1, 3))
    with torch.inference_mode(False):
        assert not native.serves(x)
        with torch.no_grad():
            assert native.serves(x)
    with FlopCounterMode(display=False):
        assert not native.serves(x)
    with FakeTensorMode() as mode:
        assert not native.serves(mode.from_tensor(torch.zeros(2, 3)))
    asked = []

    def ask(row: Tensor) -> Tensor:
        asked.append(native.serves(row))
        return row

    torch.func.vmap(ask)(x)
    with torch.inference_mode(False), torch.no_grad():
        torch.jit.trace(ask, torch.randn(2, 3), check_trace=False)
        torch.compile(ask, backend="eager", fullgraph=False)(torch.randn(2, 3))
    assert asked and not any(asked)


def test_a_numba_that_does_not_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('needs another NumPy')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("numba", "transom.ops.kernels"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(ops, "kernels", raising=False)
    native._kernels.cache_clear()
    try:
        assert not native.serves(torch.zeros(1, 2))
        assert not native.serves(torch.zeros(1, 2))
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "needs another NumPy" in caplog.text
        monkeypatch.setattr(native, "find_spec", lambda name: None)
        native._kernels.cache_clear()
        assert not native.serves(torch.zeros(1, 2))
        assert len(caplog.records) == 1  # to be without it is nothing to warn of
    finally:
        native._kernels.cache_clear()
