"""Gaussian gates: one pass against the written-out product, and what a product cannot do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from torch import Tensor

import transom
from tests.common.hosts import HOSTS, images
from tests.ops.strategies import generator
from transom.errors import FitError, SettingsError
from transom.papers.attention.gaam import (
    GAAM,
    GaussianBlock,
    GaussianHead,
    MultiHeadGaussian,
    importance,
    reference,
    weights,
)

few = settings(deadline=None, derandomize=True, max_examples=60)
COMBINE = st.sampled_from(["product", "mixture"])


@st.composite
def cases(draw: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, int]:
    """x of any rank from two on, offsets, scales, axis."""
    rng = generator(draw)
    shape = [draw(st.integers(1, 6)) for _ in range(draw(st.integers(2, 4)))]
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    shape[axis] += 1
    k = draw(st.integers(1, 5))
    x = torch.randn(shape, generator=rng, dtype=torch.float64)
    offsets = 0.5 * torch.randn(k, generator=rng, dtype=torch.float64)
    scales = torch.randn(k, generator=rng, dtype=torch.float64).clamp(-1.5, 1.5).exp()
    return x.to(dtype), offsets.to(dtype), scales.to(dtype), axis


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 2e-4), (torch.bfloat16, 2e-2)]
)
@few
@given(st.data(), COMBINE)
def test_one_pass_is_the_product(
    dtype: torch.dtype, limit: float, data: DataObject, combine: Any
) -> None:
    """Forward and backward; half precision is held against the twin in float32."""
    x, offsets, scales, axis = data.draw(cases(dtype))
    full = torch.promote_types(dtype, torch.float32)
    cotangent = torch.randn(x.shape, generator=generator(data.draw), dtype=full)
    ours = [t.clone().requires_grad_() for t in (x, offsets, scales)]
    plain = [t.to(full).requires_grad_() for t in (x, offsets, scales)]
    got = weights(*ours, axis, combine=combine)
    expected = reference(*plain, axis, combine=combine)
    assert got.dtype == dtype
    torch.testing.assert_close(got.to(full), expected, atol=limit, rtol=limit)
    (got.to(full) * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    for a, b in zip(ours, plain, strict=True):
        assert a.grad is not None and b.grad is not None
        # a nearly constant axis has a nearly vanishing s, by which gradients are divided
        scale = b.grad.abs().max().clamp(min=1)
        torch.testing.assert_close(a.grad.to(full) / scale, b.grad / scale, atol=limit, rtol=limit)


@few
@given(st.data())
def test_a_product_of_gaussians_is_one_gaussian(data: DataObject) -> None:
    """The closed form of the docstring; an eps next to nothing keeps the clamp out of it."""
    x, offsets, scales, axis = data.draw(cases(torch.float64))
    total = scales.pow(-2).sum()
    centre = (offsets / scales**2).sum() / total
    apart = x - x.mean(axis, keepdim=True)
    variance = x.var(axis, keepdim=True)
    # exponents below -600 would reach even that clamp
    far = (apart.abs().amax() + offsets.abs().max()).square() * total / variance.min()
    assume(far < 600)
    expected = (-total * (apart - centre) ** 2 / (2 * variance)).softmax(axis)
    got = weights(x, offsets, scales, axis, eps=1e-300)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)
    one = weights(x, centre[None], total.rsqrt()[None], axis, eps=1e-300)
    torch.testing.assert_close(got, one, atol=1e-9, rtol=1e-9)


def test_only_the_mixture_has_two_peaks() -> None:
    """Two Gaussians far apart: their product peaks between them, their sum at both."""
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)[None]
    offsets, scales = torch.tensor([-2.0, 2.0]).double(), torch.tensor([0.3, 0.3]).double()

    def peaks(w: Tensor) -> list[float]:
        inner = w[0, 1:-1]
        found = (inner > w[0, :-2]) & (inner > w[0, 2:])
        return [round(float(v), 1) for v in x[0, 1:-1][found]]

    product = weights(x, offsets, scales, -1)
    mixture = weights(x, offsets, scales, -1, combine="mixture")
    assert peaks(product) == [0.0]
    assert peaks(mixture) == [-2.0, 2.0]
    # the logarithm of the product is a parabola, whatever the Gaussians are; the mixture's is not
    bend = [w.log().diff(2).squeeze() for w in (product, mixture)]
    assert float(bend[0].std()) < 1e-9
    assert float(bend[1].std()) > 1e-2


def test_when_every_gaussian_is_far_the_weights_vanish() -> None:
    """The clamp of the sum by eps leaves nothing, where a softmax would give weights anyway."""
    x = torch.randn(2, 9, dtype=torch.float64)
    far, narrow = torch.tensor([50.0]).double(), torch.tensor([0.5]).double()
    w = weights(x, far, narrow, -1)
    assert w.sum(-1).max() < 1e-6
    torch.testing.assert_close(w, reference(x, far, narrow, -1), atol=1e-12, rtol=0)


def test_padding_values_count_in_the_length_and_pass() -> None:
    x = torch.randn(3, 8)
    x[:, 5:] = 0
    head = GaussianHead(-1, 2, padding_value=0.0)
    y, w = head(x)
    torch.testing.assert_close(w, reference(x, *_given(head), -1, padding_value=0.0))
    assert torch.equal(y[:, 5:], x[:, 5:])
    short = head(x[:, :5])[1]
    assert not torch.allclose(w[:, :5], short), "the official padding is not left out after all"


def test_what_is_not_valid_counts_nowhere() -> None:
    x = torch.randn(3, 8)
    valid = torch.arange(8).expand(3, -1) < 5
    for combine in ("product", "mixture"):
        head = MultiHeadGaussian(-1, 1, 3, combine=combine)
        y, w = head(x, valid)
        expected, alone = head(x[:, :5])
        torch.testing.assert_close(w[:, :5], alone)
        torch.testing.assert_close(y[:, :5], expected)
        assert (w[:, 5:] == 0).all()


@pytest.mark.parametrize("combine", ["product", "mixture"])
def test_nothing_but_padding_weighs_nothing_and_has_gradients(combine: Any) -> None:
    x = torch.randn(2, 6, requires_grad=True)
    valid = torch.tensor([[True] * 4 + [False] * 2, [False] * 6])
    w = weights(x, torch.randn(3), torch.rand(3) + 0.5, -1, combine=combine, valid=valid)
    assert (w[1] == 0).all() and (w[0, 4:] == 0).all()
    torch.testing.assert_close(w[0].sum(), torch.tensor(1.0))
    w.square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad[0, :4].abs().min() > 0
    assert (x.grad[1] == 0).all()


def _given(head: GaussianHead) -> tuple[Tensor, Tensor]:
    return head.mean_offsets, head.c


def test_heads_cut_the_axis() -> None:
    x = torch.randn(2, 14, 3)
    layer = MultiHeadGaussian(1, 4, 2)
    y, w = layer(x)
    for head, at in zip(layer.attention_heads, ((0, 3), (3, 6), (6, 9), (9, 14)), strict=True):
        expected, weight = head(x[:, slice(*at)])
        torch.testing.assert_close(y[:, slice(*at)], expected)
        torch.testing.assert_close(w[:, slice(*at)], weight)
    torch.testing.assert_close(w.sum(1), torch.full((2, 3), 4.0))


def test_rescaled_gates_are_one_on_average() -> None:
    x = torch.randn(2, 12)
    plain, scaled = GaussianHead(-1, 2), GaussianHead(-1, 2, rescale=True)
    scaled.load_state_dict(plain.state_dict())
    torch.testing.assert_close(scaled(x)[0], 12 * plain(x)[0])


def test_importance_is_the_mean_between_nothing_and_one() -> None:
    given = torch.tensor([[1.0, 2.0, 6.0], [3.0, 0.0, 4.0]])  # on average 2, 1, 5
    torch.testing.assert_close(importance(given), torch.tensor([0.25, 0.0, 1.0]))
    assert torch.equal(importance(torch.ones(2, 3)), torch.zeros(3))


def test_what_cannot_be_gated_is_refused() -> None:
    with pytest.raises(SettingsError, match="at most 3"):
        MultiHeadGaussian(-1, 4, 2)(torch.randn(2, 3))
    with pytest.raises(SettingsError, match="at least 2"):
        GaussianHead(-1, 2)(torch.randn(2, 1))
    with pytest.raises(SettingsError, match="one of each"):
        GaussianBlock([1, 2], [2], [3, 3])
    with pytest.raises(SettingsError, match="heads"):
        GAAM(heads=0)
    with pytest.raises(FitError, match="at most 16 heads"):
        transom.apply(HOSTS["timm-class"](), "gaam", heads=17)


def _shifted(rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """512 samples of 60 features: 6 of them, anywhere, sit around 3 and lean to their class."""
    labels = torch.randint(0, 2, (512,), generator=rng)
    x = torch.randn(512, 60, generator=rng)
    places = torch.rand(512, 60, generator=rng).topk(6).indices
    lean = 0.5 * (2 * labels[:, None] - 1)
    x.scatter_(1, places, 3 + 0.3 * torch.randn(512, 6, generator=rng) + lean)
    return x, labels


def _accuracy(gate: GaussianHead | None) -> float:
    """Of the class read from the mean of the features, gated or not, on samples not trained on."""
    rng = torch.Generator().manual_seed(3)
    (x, labels), (unseen, wanted) = _shifted(rng), _shifted(rng)
    linear = torch.nn.Linear(1, 2)

    def logits(x: Tensor) -> Tensor:
        return linear((x if gate is None else gate(x)[0]).mean(-1, keepdim=True))

    parts = [*linear.parameters(), *([] if gate is None else gate.parameters())]
    optimizer = torch.optim.Adam(parts, 0.1)
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits(x), labels).backward()
        optimizer.step()
    return float((logits(unseen).argmax(-1) == wanted).float().mean())


def test_a_trained_gate_reads_more_than_the_plain_mean() -> None:
    """It does not come to rank the six features first, but it weighs them well enough."""
    plain = _accuracy(None)
    for seed in range(3):
        torch.manual_seed(seed)
        assert _accuracy(GaussianHead(-1, 2, rescale=True)) > plain + 0.03


@pytest.mark.parametrize("axis", ["channels", "tokens"])
@pytest.mark.parametrize("gates", ["keys", "values", "both"])
@torch.no_grad()
def test_every_form_fits_a_host(axis: Any, gates: Any) -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")
    plain = model(x)
    transom.apply(model, "gaam", axis=axis, gates=gates, heads=2, gaussians=2)
    gated = model(x)
    assert gated.shape == plain.shape
    assert not torch.allclose(gated, plain)
    shifted = model.get_submodule("transom")["gaam"]
    for name, parameter in shifted.named_parameters():
        if name.endswith("mean_offsets"):
            parameter.add_(1.0)
    assert not torch.allclose(model(x), gated)
    transom.remove(model)
    assert torch.equal(model(x), plain)
