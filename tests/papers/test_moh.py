"""What only MoH needs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import transom
from tests.common.hosts import HOSTS, call, images
from tests.zoo.test_decoders import TEXT, words
from transom.errors import FitError, SettingsError
from transom.papers.attention.moh import MoHAttention, MoHLlamaAttention, head_usage, load_balance
from transom.papers.attention.moh.method import MoH
from transom.papers.attention.moh.routing import NormRouter, head_counts, route, routed, top
from transom.papers.attention.moh.skipping import attend, pays, reference
from transom.registry import Training


def _case(
    batch: int, tokens: int, heads: int, shared: int, chosen: int, bias: str, dtype: torch.dtype
) -> tuple[list[Tensor], Any, Tensor | None]:
    layer = MoHAttention(8, heads, shared, chosen, head_dim=4)
    gates = route(layer, torch.randn(batch, tokens, 8))
    gates = gates._replace(gate=gates.gate.detach().to(dtype))
    qkv = [torch.randn(batch, heads, tokens, 4, dtype=dtype, requires_grad=True) for _ in range(3)]
    shapes = {"key": (batch, 1, 1, tokens), "all": (1, 1, tokens, tokens)}
    shapes["heads"] = (batch, heads, tokens, tokens)
    return qkv, gates, torch.randn(shapes[bias], dtype=dtype) if bias in shapes else None


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_left_out_heads_change_nothing(data: st.DataObject) -> None:
    """Outputs and gradients of the skipping path are those of the dense one."""
    heads = data.draw(st.integers(1, 6))
    shared = data.draw(st.integers(0, heads))
    chosen = data.draw(st.integers(1, heads - shared)) if shared < heads else 0
    tokens, batch = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3))
    bias = data.draw(st.sampled_from(["none", "key", "all", "heads"]))
    kind = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    qkv, gates, added = _case(batch, tokens, heads, shared, chosen, bias, kind)
    one = attend(*qkv, gates, added, 0.5, path="skip")
    two = reference(*qkv, gates, added, 0.5)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-2}[kind]
    torch.testing.assert_close(one, two, atol=tolerance, rtol=tolerance)
    weight = torch.randn_like(one)
    ours, theirs = (torch.autograd.grad((y * weight).sum(), qkv) for y in (one, two))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=4 * tolerance, rtol=4 * tolerance)


def test_left_out_heads_are_not_computed() -> None:
    """Queries that did not choose a head may hold anything there."""
    (q, k, v), gates, _ = _case(2, 20, 4, 1, 1, "none", torch.float32)
    assert gates.mask is not None
    spoilt = q.detach().clone()
    spoilt[:, 1:][~gates.mask.transpose(1, 2)] = float("nan")
    counts = gates.mask.sum(1)
    most = int(counts.max())
    y = attend(spoilt, k, v, gates, None, 0.5, path="skip")
    full = counts == most  # groups that nothing fills up
    assert full.any()
    assert torch.isfinite(y[:, 1:][full]).all()
    assert torch.isnan(attend(spoilt, k, v, gates, None, 0.5, path="dense")).any()


def test_gates_add_up() -> None:
    layer = MoHAttention(16, 8, 2, 3)
    x = torch.randn(2, 7, 16)
    gates = route(layer, x)
    assert layer.wg_0 is not None
    group = 2 * layer.wg_0(x).softmax(-1)
    assert gates.mask is not None
    assert (gates.mask.sum(-1) == 3).all()
    assert ((gates.gate[..., 2:] > 0) == gates.mask).all()
    torch.testing.assert_close(gates.gate[..., :2].sum(-1), 2 * group[..., 0])
    torch.testing.assert_close(gates.gate[..., 2:].sum(-1), 3 * group[..., 1])


@torch.no_grad()
def test_zero_logits_and_all_heads_are_plain_attention() -> None:
    layer = MoHAttention(16, 4, 2, 2)
    for linear in (layer.wg, layer.wg_0, layer.wg_1):
        assert linear is not None
        nn.init.zeros_(linear.weight)
    x = torch.randn(2, 5, 16)
    q, k, v = layer.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
    plain = nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(layer(x), layer.proj(plain.transpose(1, 2).flatten(2)))


def test_one_shared_head_has_no_map_of_its_own() -> None:
    layer = MoHAttention(16, 4, 1, 2)
    assert layer.wg_1 is None and layer.wg_0 is not None
    alone = MoHAttention(16, 1, 1, 0)
    assert {name for name, _ in alone.named_parameters()} == {
        *("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")
    }
    assert layer(torch.randn(1, 3, 16)).shape == (1, 3, 16)


def test_balance_is_k_when_even() -> None:
    p = torch.full((2, 6, 4), 0.25)
    mask = torch.zeros(2, 6, 4, dtype=torch.bool)
    mask[:, ::2, :2] = mask[:, 1::2, 2:] = True
    torch.testing.assert_close(load_balance(p, mask), torch.tensor(2.0))
    lopsided = torch.tensor([0.7, 0.1, 0.1, 0.1]).expand(2, 6, 4)
    assert load_balance(lopsided, top(lopsided, 2)) > 2.5


def test_routing_by_norms_is_blind_to_rotation_and_scale() -> None:
    q = torch.randn(2, 8, 5, 6)
    gates = NormRouter(4, 2)(q)
    assert gates.mask is not None
    norm = q[:, 4:].norm(dim=-1).transpose(1, 2)
    assert (norm.masked_fill(~gates.mask, -1).topk(2, -1).values == norm.topk(2, -1).values).all()
    assert set(gates.gate.unique().tolist()) == {0.0, 1.0}
    again = NormRouter(0.5, 0.75)(7 * q.flip(-1))
    assert again.mask is not None and torch.equal(again.mask, gates.mask)


def test_only_straight_through_teaches_the_choice() -> None:
    """Without it, queries of a head that is not chosen get no gradient."""
    for through in (False, True):
        layer = MoHLlamaAttention(16, 4, 2, straight_through=through)
        x = torch.randn(1, 6, 16)
        with routed(layer) as seen:
            layer(x)[:, -1].sum().backward()
        assert seen[0].mask is not None and layer.q_proj.weight.grad is not None
        last = seen[0].mask[0, -1]
        grad = layer.q_proj.weight.grad.view(4, 4, 16)[2:].flatten(1).abs().sum(1)
        assert bool((grad[~last] > 0).all()) is through
        assert (grad[last] > 0).all()


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@torch.no_grad()
def test_decoders_are_routed_by_norms(name: str, tmp_path: Path) -> None:
    model, text = TEXT[name](), words()
    plain = model(**text).logits
    fitted = copy.deepcopy(model)
    transom.apply(fitted, "moh", router="query", host="decoder", shared=0.5, active=0.75)
    changed = fitted(**text).logits
    assert not torch.allclose(changed, plain, atol=1e-3)
    # with a cache the same tokens choose the same heads
    ids = fitted.generate(**text, max_new_tokens=4, do_sample=False)
    longer = fitted.generate(**text, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(ids, longer)
    usage = head_usage(fitted, [dict(text)])
    assert usage.active() == pytest.approx(0.75)
    transom.save(fitted, tmp_path / "moh.safetensors")
    loaded = transom.load(model, tmp_path / "moh.safetensors")
    torch.testing.assert_close(loaded(**text).logits, changed)
    transom.remove(model)
    assert torch.equal(model(**text).logits, plain)
    transom.apply(model, "moh", **MoH.neutral(), host="decoder")
    there = text["attention_mask"].bool()
    torch.testing.assert_close(model(**text).logits[there], plain[there], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("host", ["timm-class", "hf-dinov2"])
@torch.no_grad()
def test_both_paths_agree_in_a_host(host: str) -> None:
    outs = []
    for path in ("dense", "skip"):
        model = HOSTS[host]()
        transom.apply(model, "moh", active=0.5, path=path)
        outs.append(call(model, images(host)))
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def _trained(coefficient: float) -> float:
    """Evenness of the heads' use after some steps on noise, from a router that prefers one head."""
    torch.manual_seed(0)
    model = HOSTS["timm-class"]()
    method = MoH(shared=0.0, active=0.25)
    transom.apply(model, method)
    model.train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("wg.weight"):
                parameter.normal_(std=0.5)
                parameter[0] += 2
    training: Training = method.training(coefficient=coefficient)
    optimizer = torch.optim.Adam(
        [p for n, p in model.named_parameters() if n.endswith("wg.weight")], lr=0.05
    )
    x = images("timm-class", 16)
    for step in range(30):
        training.at_step(model, step, 30)
        outputs = model(x)
        loss = outputs.square().mean()
        extra = training.extra_loss(model, outputs)
        assert extra is not None
        optimizer.zero_grad()
        (loss + extra).backward()
        optimizer.step()
    training.at_step(model, 30, 30)
    assert not any(m._forward_hooks for m in model.modules())
    entropy = head_usage(model.eval(), [x]).entropy()
    return sum(entropy) / len(entropy)


def test_the_loss_spreads_tokens_over_heads() -> None:
    assert _trained(1.0) > _trained(0.0) + 0.05


@pytest.mark.parametrize("threads", [1, 2])
def test_where_it_pays(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the path "auto" takes: short sequences and small savings are computed densely."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert not pays(50, 0.6)
    assert pays(197, 0.6) is (threads == 1) and not pays(197, 0.85)
    assert pays(1024, 0.75) and not pays(1024, 1.0)


def test_what_cannot_be_routed_is_refused() -> None:
    with pytest.raises(SettingsError, match="nothing could choose"):
        MoHAttention(16, 4, 2, 0)
    with pytest.raises(SettingsError, match="at most 2"):
        MoHAttention(16, 4, 2, 3)
    with pytest.raises(SettingsError, match="shared ≤ active"):
        MoH(shared=0.5, active=0.25)
    with pytest.raises(SettingsError, match="router='query'"):
        MoH(host="decoder")
    with pytest.raises(FitError, match="router='query'"):
        transom.apply(HOSTS["timm-rotary"](), "moh")
    with pytest.raises(SettingsError, match="0 routers"):
        head_usage(nn.Linear(2, 2), [torch.zeros(2)])
    assert head_counts(12, 0.25, 0.75) == (3, 6)
    assert head_counts(4, 1.0, 1.0) == (4, 0)
