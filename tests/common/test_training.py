"""Fitted hosts in training: randomness, gradients, gradient checkpointing, precision."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any, get_args

import pytest
import timm.layers
import torch
from torch import Tensor, nn

import transom
from tests.common.cases import DROPS, MERGES, METHODS, close, fitted, same
from tests.common.hosts import HOSTS, call, hf, images, timm_vit
from tests.common.probes import Listen, WriteOut
from transom.slots import Part

# later releases of transformers have another name for it, which earlier ones do not know
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")

NOISY = {
    "timm": partial(
        timm_vit,
        drop_path_rate=0.4,
        pos_drop_rate=0.1,
        attn_drop_rate=0.1,
        proj_drop_rate=0.1,
        init_values=0.5,
    ),
    "dinov2": partial(
        hf, "Dinov2Model", "Dinov2Config", drop_path_rate=0.4, attention_probs_dropout_prob=0.1
    ),
    "vit": partial(
        hf,
        "ViTModel",
        "ViTConfig",
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    ),
}


@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_a_method_that_only_looks_changes_nothing(host: str) -> None:
    """Keys, class rows, size bias and operators run through every part of every host."""
    model, x = HOSTS[host](), images(host)
    plain = call(model, x)
    for method in (Listen(), WriteOut()):
        transom.apply(model, method)
        close(call(model, x), plain, 1e-5)
        transom.remove(model)
    transom.apply(model, WriteOut(sharpness=3.0))
    assert not same(call(model, x), plain)


@pytest.mark.parametrize("host", NOISY)
@pytest.mark.parametrize("method", [transom.registry.methods()["none"](), Listen()])
def test_noise_in_training_is_the_hosts(host: str, method: Any) -> None:
    """Dropout and drop path draw the same numbers in the same order as without a method."""
    model, x = NOISY[host]().train(), images(host)
    torch.manual_seed(1)
    plain = call(model, x)
    assert not same(call(model, x), plain)
    transom.apply(model, method)
    torch.manual_seed(1)
    close(call(model, x), plain, 1e-5)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss that reads every output."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(2)
    loss = torch.stack([(out.double() ** 2).sum() for out in call(model, x)]).sum()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=[False, True], ids=["saved-tensors", "reentrant"])
def reentrant(request: pytest.FixtureRequest) -> Iterator[bool]:
    before = timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(request.param)
    yield request.param
    timm.layers.set_reentrant_ckpt(before)


@pytest.mark.parametrize("host", ["timm", "dinov2"])
@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_gives_the_same_gradients(method: str, host: str, reentrant: bool) -> None:
    # in double: with and without gradients, fused attention may take kernels that round differently
    model: Any = fitted(NOISY[host]().double().train(), method)
    x = images(host).double()
    before = copy.deepcopy(model.state_dict())
    expected = gradients(model, x)
    assert len(expected) > 30
    model.load_state_dict(before)  # norms with statistics have moved on
    _checkpoint(model, reentrant)

    passes: list[str] = []
    blocks: Any = transom.fittings(model)[0].host.stack
    first = next(iter(blocks._modules.values()))
    replaced: Any = transom.fittings(model)[0].fills[0].norms[0]
    (replaced or first.norm1).register_forward_hook(lambda *_: passes.append("forward"))
    got = gradients(model, x)
    assert passes == ["forward"] * 2, "a checkpointed block runs once more in the backward pass"
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5)


def _checkpoint(model: Any, reentrant: bool) -> None:
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})


@pytest.mark.parametrize("host", ["timm-registers", "timm-map", "hf-siglip", "hf-clip"])
@pytest.mark.parametrize("method", [MERGES, DROPS])
@pytest.mark.parametrize("restore", ["end", "every"])
def test_checkpointing_with_restored_tokens(
    method: str, restore: Any, host: str, reentrant: bool
) -> None:
    model: Any = fitted(HOSTS[host]().train(), method, restore=restore)
    x = images(host)
    expected = gradients(model, x)
    _checkpoint(model, reentrant)
    for name, gradient in gradients(model, x).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("host", ["timm-class", "hf-vit"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_every_parameter(method: str, host: str) -> None:
    model, x = HOSTS[host]().train(), images(host)
    plain = gradients(model, x)
    fitted(model, method)
    got = gradients(model, x)
    new = {n for n, p in model.named_parameters() if "transom" in n.split(".") and p.requires_grad}
    assert got.keys() <= plain.keys() | new
    assert new <= got.keys()
    gone = plain.keys() - got.keys()
    assert gone <= _replaced(model), "a part of the host that still runs gets no gradient"
    assert all(torch.isfinite(gradient).all() for gradient in got.values())


def _replaced(model: nn.Module) -> set[str]:
    """Names of the parameters whose part of the host is replaced by what is fitted."""
    found = set()
    for f in transom.fittings(model):
        if f.front.tokenizer is not None:
            found |= {id(p) for n, p in model.named_parameters() if "patch_embed" in n}
        for view, fill in zip(f.host.views, f.fills, strict=True):
            instead = (fill.norms[0], fill.mixer, fill.norms[1], fill.ffn)
            for name, new in zip(get_args(Part), instead, strict=True):
                part = view.part(name)
                if new is not None and part is not None:
                    found |= {id(p) for p in part.parameters()}
    return {n for n, p in model.named_parameters() if id(p) in found}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("host", ["timm-registers", "timm-average", "hf-dinov2", "hf-clip"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_dtypes(method: str, host: str, dtype: torch.dtype) -> None:
    """Half precision gives half-precision outputs that point where those of float32 do."""
    model, x = HOSTS[host](), images(host)
    expected = call(fitted(model, method), x)
    transom.remove(model)
    model = fitted(model.to(dtype), method)
    got = call(model, x.to(dtype))
    assert [t.shape for t in got] == [t.shape for t in expected]
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        assert torch.isfinite(a).all()
        if a.dim() > 1:
            alike = torch.cosine_similarity(a.float().flatten(), b.flatten(), 0)
            assert alike > (0.9 if dtype != torch.float64 else 0.9999)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_converted_after_fitting(method: str) -> None:
    x = images("timm-registers").bfloat16()
    first = fitted(HOSTS["timm-registers"]().bfloat16(), method)
    second = fitted(HOSTS["timm-registers"](), method).bfloat16()
    assert same(call(first, x), call(second, x))


@pytest.mark.parametrize("host", ["timm-class", "hf-vit"])
@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: str, host: str) -> None:
    model, x = fitted(HOSTS[host]().train(), method), images(host)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(model, x)[0]
    assert torch.isfinite(out).all()
    out.float().sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
