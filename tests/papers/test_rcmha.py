"""RCMHA: every pair looked up, what sees what, segments against the joined text, four corners."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from torch import Tensor, nn

import transom
from tests.common.cases import close
from tests.common.hosts import HOSTS, call, images
from tests.ops.strategies import generator
from transom.errors import FitError, SettingsError, TokensError
from transom.papers.attention.rcmha import (
    RCMHA,
    RelativeConvolutionalAttention,
    RelativeLanguageModel,
    attend_along,
    convolve,
    reference,
    remember,
)

few = settings(deadline=None, derandomize=True, max_examples=60)


def drawn(module: nn.Module, seed: int = 0) -> Any:
    """`module` in double with every parameter random: tables begin at zero otherwise."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=rng)
    return module.double().eval()


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 2e-5), (torch.bfloat16, 5e-2)]
)
@few
@given(st.data(), st.integers(1, 7), st.integers(0, 5), st.booleans())
def test_shifted_and_fused_is_every_pair_looked_up(
    dtype: torch.dtype, limit: float, data: DataObject, count: int, memory: int, causal: bool
) -> None:
    rng = generator(data.draw)
    batch, heads, width = (data.draw(st.integers(1, 3)) for _ in range(3))
    keys = count + memory
    reach = keys + data.draw(st.integers(0, 3))
    shapes: list[tuple[int, ...]] = [(batch, heads, n, width) for n in (count, keys, keys)]
    shapes += [(heads, width), (2 * reach, heads, width), (2 * reach, heads)]
    case = [torch.randn(s, generator=rng).to(dtype) for s in shapes]
    full = torch.promote_types(dtype, torch.float32)
    ours = [t.clone().requires_grad_() for t in case]
    plain = [t.to(full).requires_grad_() for t in case]
    mask = torch.ones(count, keys, dtype=torch.bool).tril(memory) if causal else None
    bias = None if mask is None else torch.zeros(count, keys, dtype=dtype).masked_fill(~mask, -1e9)
    q, k, v, extra, table, table_bias = ours
    rows = data.draw(st.integers(1, 8))
    got = attend_along(q, k, v, table, table_bias, scale=0.4, extra=extra, bias=bias, rows=rows)
    expected = reference(*plain, mask, 0.4)
    assert got.dtype == dtype
    torch.testing.assert_close(got.to(full), expected, atol=limit, rtol=limit)
    cotangent = torch.randn(expected.shape, generator=rng).to(full)
    (got.to(full) * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    for a, b in zip(ours, plain, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad.to(full), b.grad, atol=3 * limit, rtol=3 * limit)


@pytest.mark.parametrize("causal", [True, False])
@few
@given(st.data(), st.integers(1, 8), st.integers(1, 5))
def test_the_convolution(causal: bool, data: DataObject, count: int, kernel: int) -> None:
    rng = generator(data.draw)
    x = torch.randn(2, 3, count, 4, generator=rng, dtype=torch.float64)
    weight = torch.randn(4, 1, kernel, generator=rng, dtype=torch.float64)
    bias = torch.randn(4, generator=rng, dtype=torch.float64)
    expected = bias.expand_as(x).clone()
    first = kernel - 1 if causal else (kernel - 1) // 2
    for t, tap in product(range(count), range(kernel)):
        at = t + tap - first
        if 0 <= at < count:
            expected[:, :, t] += weight[:, 0, tap] * x[:, :, at]
    torch.testing.assert_close(convolve(x, weight, bias, causal=causal), expected)


CORNERS = list(product([True, False], [True, False]))


@pytest.mark.parametrize(("convolution", "positional"), CORNERS)
@torch.no_grad()
def test_no_token_sees_what_comes_after_it(convolution: bool, positional: bool) -> None:
    model = drawn(
        RelativeLanguageModel(11, 16, 2, 24, 2, 16, convolution=convolution, positional=positional)
    )
    ids = torch.randint(0, 11, (7, 2))
    memory = torch.randn(2, 3, 2, 16, dtype=torch.float64)
    plain = model(ids, memory)[0]
    for changed in range(7):
        other = ids.clone()
        other[changed] = (other[changed] + 1) % 11
        got = model(other, memory)[0]
        assert torch.equal(got[:changed], plain[:changed])
        assert not torch.allclose(got[changed], plain[changed])
    assert not torch.allclose(model(ids)[0], plain), "the memory is not read"


@torch.no_grad()
def test_two_segments_are_the_joined_one() -> None:
    """Exactly; only the official query convolution begins anew at the border."""
    ids = torch.randint(0, 11, (9, 2))
    for sees_memory in (True, False):
        model = drawn(RelativeLanguageModel(11, 16, 2, 24, 2, 16, sees_memory=sees_memory))
        joined = model(ids)[0]
        first, memory = model(ids[:4])
        second = model(ids[4:], memory)[0]
        torch.testing.assert_close(first, joined[:4])
        apart = (second - joined[4:]).abs().amax((1, 2))
        if sees_memory:
            assert apart.max() < 1e-12
        else:
            assert (apart[:2] > 1e-6).all(), "the query convolution has a history after all"


@torch.no_grad()
def test_token_by_token_is_the_whole_text() -> None:
    """What the official code cannot: one token a call, with the memory of all before."""
    model = drawn(RelativeLanguageModel(11, 16, 2, 24, 2, 16, sees_memory=True))
    ids = torch.randint(0, 11, (6, 2))
    memory, got = None, []
    for token in ids:
        logits, new = model(token[None], memory)
        memory = remember(memory, new, 16)
        got.append(logits[0])
    torch.testing.assert_close(torch.stack(got), model(ids)[0])


def test_remember_keeps_the_last_rows() -> None:
    old, new = torch.randn(2, 3, 1, 4), torch.randn(2, 2, 1, 4)
    assert torch.equal(remember(old, new, 4), torch.cat([old, new], 1)[:, 1:])
    assert torch.equal(remember(None, new, 4), new)
    assert remember(old, new, 1).shape == (2, 1, 1, 4)


@torch.no_grad()
def test_without_both_parts_it_is_plain_attention() -> None:
    module = drawn(RelativeConvolutionalAttention(2, 8, 4, convolution=False, positional=False))
    plain = nn.MultiheadAttention(8, 2).double()
    q, k, v = (p[0].linear for p in (module.query, module.key, module.value))
    plain.in_proj_weight.copy_(torch.cat([q.weight, k.weight, v.weight]))
    plain.in_proj_bias.zero_()[16:].copy_(v.bias)
    plain.out_proj.load_state_dict(module.output.state_dict())
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(module(x), plain(x, x, x)[0])


@torch.no_grad()
def test_a_mask_of_its_own_for_each_item() -> None:
    module = drawn(RelativeConvolutionalAttention(2, 8, 6))
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    mask = (torch.rand(5, 5, 3) > 0.4) | torch.eye(5, dtype=torch.bool)[..., None]
    got = module(x, mask=mask.long())
    for i in range(3):
        alone = module(x[:, i : i + 1], mask=mask[..., i : i + 1].long())
        torch.testing.assert_close(got[:, i : i + 1], alone)


def corner_loss(convolution: bool, positional: bool, seed: int) -> float:
    """Held-out loss of a small model of a language in which a letter repeats the third last."""
    torch.manual_seed(seed)
    model = RelativeLanguageModel(
        8, 32, 2, 32, 1, 32, convolution=convolution, positional=positional
    )

    def text(seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        out = list(torch.randint(0, 8, (3, 16), generator=rng))
        for _ in range(14):
            noise = torch.randint(0, 8, (16,), generator=rng)
            flip = torch.rand(16, generator=rng) < 0.1
            out.append(torch.where(flip, noise, out[-3]))
        return torch.stack(out)

    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(100):
        ids = text(step)
        loss = nn.functional.cross_entropy(model(ids[:-1])[0].flatten(0, 1), ids[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids = text(10_000)
    with torch.no_grad():
        logits = model(ids[:-1])[0]
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[1:].flatten()))


def test_positions_or_convolutions_are_needed_to_count_back() -> None:
    """MHA without either cannot know which letter is the third last; the other corners learn it."""
    losses = {corner: corner_loss(*corner, seed=0) for corner in CORNERS}
    neither = losses.pop((False, False))
    assert all(loss < neither - 0.2 for loss in losses.values()), (losses, neither)


@pytest.mark.parametrize("host", ["timm-class", "timm-wide", "hf-vit", "hf-clip-vision"])
@pytest.mark.parametrize("positions", ["sequence", "grid"])
@torch.no_grad()
def test_it_begins_as_the_host(positions: Any, host: str) -> None:
    model, x = HOSTS[host](), images(host)
    plain = call(model, x)
    transom.apply(model, "rcmha", positions=positions)
    close(call(model, x), plain, 1e-6)
    for name, parameter in model.named_parameters():
        if "key_pos_embeddings" in name:
            parameter.normal_()
    moved = call(model, x)
    assert not torch.allclose(moved[0], plain[0], atol=1e-3)
    transom.remove(model)
    assert torch.equal(call(model, x)[0], plain[0])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SettingsError, match="both off"):
        RCMHA(convolution=False, relative=False)
    with pytest.raises(SettingsError, match="kernel_size"):
        RCMHA(kernel_size=0)
    with pytest.raises(SettingsError, match="reach"):
        RCMHA(reach=0)
    with pytest.raises(SettingsError, match="multiple"):
        RelativeConvolutionalAttention(3, 8)
    with pytest.raises(FitError, match="plain projections"):
        transom.apply(HOSTS["timm-rotary"](), "rcmha")
    model = transom.apply(HOSTS["timm-class"](), "rcmha", where=-1)
    transom.apply(model, "random", keep_rate=0.5, layers=(0,))
    with pytest.raises(TokensError, match="original places"):
        model(images("timm-class"))
