"""ComplexFormer: one rotation a token against the cosines, rotary embedding, cache, cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import transom
from tests.common.cases import close
from tests.common.hosts import HOSTS, call, images
from tests.ops.strategies import generator
from transom.errors import FitError, SettingsError, TokensError
from transom.papers.attention.complexformer import (
    ComplexAttention,
    ComplexFormer,
    angles,
    frequencies,
    from_rope,
    reference,
    turn,
)
from transom.projections import Projections, affine

few = settings(deadline=None, derandomize=True, max_examples=60)


def logits(q: Tensor, k: Tensor, delta: Tensor, shift: Tensor, g: Tensor, past: int) -> Tensor:
    """What the fast path gives to attention."""
    angle = angles(torch.arange(k.shape[2]), g)
    turned = turn(q, delta, shift, angle[past : past + q.shape[2]])
    return turned @ turn(k, delta, None, angle).mT


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 2e-5), (torch.bfloat16, 8e-2)]
)
@few
@given(st.data(), st.integers(1, 10), st.integers(0, 6), st.integers(1, 4))
def test_the_product_is_the_sum_of_cosines(
    dtype: torch.dtype, limit: float, data: DataObject, count: int, past: int, pairs: int
) -> None:
    """Forward and backward, any number of rows at a time in the twin."""
    rng = generator(data.draw)
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    keys = past + count
    shapes = ((batch, heads, count, 2 * pairs), (batch, heads, keys, 2 * pairs))
    case = [torch.randn(s, generator=rng) for s in (*shapes, (heads, pairs), (heads, pairs))]
    case = [t.to(dtype) for t in case]
    full = torch.promote_types(dtype, torch.float32)
    ours = [t.clone().requires_grad_() for t in case]
    plain = [t.to(full).requires_grad_() for t in case]
    g = frequencies(pairs)
    got = logits(*ours, g, past)
    expected = reference(*plain, g.to(full), past, chunk=data.draw(st.integers(1, 5)))
    assert got.dtype == dtype
    # a logit is a sum of products of magnitudes
    scale = (plain[0].norm(dim=-1).max() * plain[1].norm(dim=-1).max()).item()
    torch.testing.assert_close(got.to(full), expected, atol=limit * max(scale, 1), rtol=limit)
    cotangent = torch.randn(expected.shape, generator=rng).to(full)
    (got.to(full) * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    for a, b in zip(ours, plain, strict=True):
        assert a.grad is not None and b.grad is not None
        # the phase of a small number turns fast
        size = max(float(b.grad.abs().max()), scale)
        torch.testing.assert_close(a.grad.to(full) / size, b.grad / size, atol=limit, rtol=limit)


def test_zero_has_phase_zero_and_no_gradient() -> None:
    x = torch.zeros(1, 2, 3, 4, requires_grad=True)
    delta, shift = torch.randn(2, 2), torch.randn(2, 2)
    got = turn(x, delta, shift, None)
    torch.testing.assert_close(got[..., :2], (1e-9**0.5 * shift.cos())[:, None].expand(1, 2, 3, 2))
    got.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x))


def rotary(x: Tensor, places: Tensor) -> Tensor:
    """Rotary embedding, halves paired, base 10000."""
    angle = places[:, None] * frequencies(x.shape[-1] // 2)
    cos, sin = (f(angle).repeat(1, 2) for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def test_without_stretch_and_shift_it_is_rotary_embedding() -> None:
    q, k = torch.randn(2, 2, 3, 9, 8, dtype=torch.float64).unbind(0)
    ones, zeros = torch.ones(3, 4).double(), torch.zeros(3, 4).double()
    places = torch.arange(9)
    expected = rotary(q, places) @ rotary(k, places).mT
    got = logits(q, k, ones, zeros, frequencies(4), 0)
    torch.testing.assert_close(got, expected, atol=1e-7, rtol=0)
    torch.testing.assert_close(
        reference(q, k, ones, zeros, frequencies(4)), expected, atol=1e-7, rtol=0
    )


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_a_rotary_attention_of_transformers_is_an_exact_start(bias: bool) -> None:
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=32, num_attention_heads=4, attention_bias=bias)
    config._attn_implementation = "eager"
    attention = LlamaAttention(config, 0).double().eval()
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    tables = LlamaRotaryEmbedding(config)(x, torch.arange(11)[None])
    mask = torch.full((11, 11), -1e9, dtype=torch.float64).triu(1)[None, None]
    # the eager function of the library makes its softmax in float32
    expected = attention(x, tables, mask)[0]
    parts = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    layer = from_rope(Projections(4, *map(affine, parts)))
    got = layer(x, mask)[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    layer.delta_params.mul_(0.5)
    assert not torch.allclose(layer(x, mask)[0], expected, atol=1e-3)


def test_a_start_that_is_not_exact_is_refused() -> None:
    square, narrow = (torch.randn(8, 8), None), (torch.randn(4, 8), None)
    with pytest.raises(FitError, match="W_k would be"):
        from_rope(Projections(2, square, narrow, narrow, square))


def layer(**settings: Any) -> Any:
    torch.manual_seed(1)
    made = ComplexAttention(16, 2, **settings).double().eval()
    nn.init.normal_(made.bias_params)
    return made


@torch.no_grad()
def test_decoding_with_a_cache_is_the_whole_text() -> None:
    model, x = layer(), torch.randn(2, 7, 16, dtype=torch.float64)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    whole, weights, (keys, values) = model(x, causal, need_weights=True)
    past, got = None, []
    for i in range(7):
        y, row, past = model(x[:, i : i + 1], causal[i : i + 1, : i + 1], past, need_weights=True)
        got.append(y)
        torch.testing.assert_close(row[:, :, 0], weights[:, :, i, : i + 1])
    torch.testing.assert_close(torch.cat(got, 1), whole)
    assert past is not None
    torch.testing.assert_close(past, (keys, values))


@torch.no_grad()
def test_masks_are_added_or_tell_what_is_seen() -> None:
    model, x = layer(), torch.randn(2, 7, 16, dtype=torch.float64)
    seen = torch.ones(7, 7, dtype=torch.bool).tril()
    added = torch.zeros(7, 7, dtype=torch.float64).masked_fill(~seen, -1e9)
    for weights in (False, True):
        a, b = (model(x, m, need_weights=weights)[0] for m in (seen, added))
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, model(x, seen)[0])
    # a row that sees nothing sees everything alike, as with the lowest finite number
    blind = seen.clone()
    blind[3] = False
    y, rows, _ = model(x, blind, need_weights=True)
    torch.testing.assert_close(rows[:, :, 3], torch.full((2, 2, 7), 1 / 7, dtype=torch.float64))
    torch.testing.assert_close(model(x, blind)[0], y)


@torch.no_grad()
def test_rounded_frequencies_go_wrong_with_the_distance() -> None:
    exact, rounded = layer(), layer(frequencies="bfloat16")
    assert "relative_pos_encoding.g" not in rounded.state_dict()
    x = torch.randn(1, 1, 16, dtype=torch.float64).expand(1, 257, 16)
    rows = [m(x, need_weights=True)[1][0, 0, 256].log() for m in (exact, rounded)]
    # weights count up to a factor: steps from one key to the next
    apart = (rows[0] - rows[1]).diff().abs()
    assert apart[:128].max() > 5 * apart[-8:].max()


def test_places_far_away_keep_their_phase() -> None:
    """In single precision a product of a million would be off by a twentieth of a turn."""
    g = frequencies(4).float()
    far, near = 1_000_000, 5
    q, k = torch.randn(2, 1, 1, 2, 8).unbind(0)
    ones = torch.ones(1, 4)

    def at(start: int) -> Tensor:
        a, b = angles(torch.tensor([start + near, start]), g).chunk(2)
        return turn(q, ones, None, a) @ turn(k, ones, None, b).mT

    torch.testing.assert_close(at(far), at(0), atol=1e-5, rtol=1e-5)


def test_the_cosines_cost_more_and_grow_faster() -> None:
    """Elements made by the widest tensor on the way, and FLOPs of the product."""
    q, k = torch.randn(2, 1, 2, 64, 16).unbind(0)
    delta, shift, g = torch.randn(2, 8), torch.randn(2, 8), frequencies(8).float()
    widest: list[int] = []

    class Widest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                widest[-1] = max(widest[-1], out.numel())
            return out

    for run in (
        lambda: logits(q, k, delta, shift, g, 0),
        lambda: reference(q, k, delta, shift, g, chunk=64),
    ):
        widest.append(0)
        with Widest():
            run()
    assert widest[0] == 2 * 64 * 64, "nothing is wider than the logits"
    assert widest[1] == 8 * widest[0]
    with FlopCounterMode(display=False) as counter:
        logits(q, k, delta, shift, g, 0)
    assert counter.get_total_flops() == 2 * 2 * 64 * 64 * 16


@pytest.mark.parametrize("host", ["timm-class", "timm-rotary", "hf-vit", "hf-clip-vision"])
@torch.no_grad()
def test_it_begins_as_the_host(host: str) -> None:
    model, x = HOSTS[host](), images(host)
    plain = call(model, x)
    transom.apply(model, "complexformer")
    close(call(model, x), plain, 1e-6)
    for name, parameter in model.named_parameters():
        if "delta_params" in name:
            parameter.mul_(0.5)
    assert not torch.allclose(call(model, x)[0], plain[0], atol=1e-3)


@torch.no_grad()
def test_axial_phases_follow_the_rows_and_columns() -> None:
    """On the grid, transposing the image and exchanging the halves of the heads changes nothing."""
    q, k = torch.randn(2, 1, 1, 12, 8, dtype=torch.float64).unbind(0)
    record = transom.tokens.Record(transom.tokens.Layout(0, (3, 4), 12))
    other = transom.tokens.Record(transom.tokens.Layout(0, (4, 3), 12))
    method = ComplexFormer(positions="axial")
    from transom.papers.attention.complexformer import Phases

    operator = Phases(method, (1, 8), torch.Generator()).double()
    transposed = torch.arange(12).view(3, 4).T.flatten()
    swap = torch.tensor([2, 3, 0, 1, 6, 7, 4, 5])
    v = torch.eye(12, dtype=torch.float64)[None, None]
    settings: dict[str, Any] = {"bias": None, "scale": 0.5}
    a = operator(q, k, v, record=record, **settings)
    b = operator(
        q[:, :, transposed][..., swap],
        k[:, :, transposed][..., swap],
        v[:, :, transposed],
        record=other,
        **settings,
    )
    torch.testing.assert_close(a[:, :, transposed], b)
    still = operator(
        q, k, v, record=transom.tokens.Record(transom.tokens.Layout(0, (12, 1), 12)), **settings
    )
    assert not torch.allclose(still, a)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SettingsError, match="rope_base"):
        ComplexFormer(rope_base=1.0)
    with pytest.raises(SettingsError, match="multiple of 2"):
        ComplexAttention(12, 4)
    with pytest.raises(FitError, match="once more"):
        transom.apply(HOSTS["timm-rotary"](), "complexformer", positions="sequence")
    model = transom.apply(HOSTS["timm-class"](), "complexformer", positions="axial", where=-1)
    transom.apply(model, "random", keep_rate=0.5, layers=(0,))
    with pytest.raises(TokensError, match="original places"):
        model(images("timm-class"))
