"""Every way to call a fitted host, and what the whole network owes to an exact copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import transom
from tests.common.cases import DROPS, MERGES, METHODS, close, fitted, same
from tests.common.hosts import HOSTS, PATCH, call, images, tensors

TWO = ("timm-class", "hf-vit")


@pytest.mark.parametrize("host", TWO)
@pytest.mark.parametrize("method", METHODS)
def test_with_and_without_gradients(method: str, host: str) -> None:
    model, x = fitted(HOSTS[host](), method), images(host)
    with torch.no_grad():
        expected = call(model, x)
    with torch.inference_mode():
        assert same(call(model, x), expected)
    close([t.detach() for t in call(model, x)], expected)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        assert same(tensors(torch.func.functional_call(model, parameters, (x,))), expected)


@pytest.mark.parametrize("host", TWO)
@pytest.mark.parametrize("method", [MERGES, DROPS])
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@torch.no_grad()
def test_one_image_at_a_time_by_vmap(method: str, host: str) -> None:
    model, x = fitted(HOSTS[host](), method), images(host)
    got = torch.func.vmap(lambda image: call(model, image[None])[0][0])(x)
    torch.testing.assert_close(got, call(model, x)[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_loops_of_a_user() -> None:
    """Each pass over the blocks is a call of its own, nested ones included."""
    model: Any = fitted(HOSTS["timm-class"](), MERGES)
    x = images("timm-class")
    expected = model.forward_features(x)
    start = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))

    y = start
    for block in model.blocks:
        y = block(y)
        model(x[:1])  # somebody measures in between
    assert torch.equal(model.norm(y), expected)
    assert torch.equal(model.norm(model.blocks(start)), expected)
    y = start
    for block in model.blocks[:2]:
        y = block(y)
    assert y.shape[1] == 9
    first, second = iter(model.blocks), iter(model.blocks)
    one, two = start, start[:1]
    for a, b in zip(first, second, strict=True):
        one, two = a(one), b(two)
    assert torch.equal(model.norm(one), expected)
    torch.testing.assert_close(model.norm(two), expected[:1])
    assert len(model.blocks) == 3
    assert isinstance(model.blocks[-1], nn.Module)


@torch.no_grad()
def test_the_encoder_of_transformers_alone() -> None:
    model: Any = fitted(HOSTS["hf-vit"](), MERGES)
    x = images("hf-vit")
    hidden = model.vit.embeddings(x)
    expected = model.vit(x).last_hidden_state
    stack = transom.fittings(model)[0].host.stack
    for layer in stack:  # type: ignore[attr-defined]
        hidden = layer(hidden)
        hidden = hidden if isinstance(hidden, torch.Tensor) else hidden[0]
    torch.testing.assert_close(model.vit.layernorm(hidden), expected)


@torch.no_grad()
def test_the_towers_of_clip() -> None:
    model: Any = HOSTS["hf-clip"]()
    x, words = images("hf-clip"), torch.tensor([[0, 5, 9, 1]])
    plain = tensors(model.get_text_features(input_ids=words))
    fitted(model, MERGES)
    assert same(tensors(model.get_text_features(input_ids=words)), plain)
    out = model(input_ids=words, pixel_values=x)
    alone = tensors(model.get_image_features(pixel_values=x))
    # the length as the model takes it: another route rounds otherwise
    unit = [t / t.square().sum(-1, keepdim=True).sqrt() for t in alone]
    assert any(t.shape == out.image_embeds.shape and same([t], [out.image_embeds]) for t in unit)


COPIES = ["timm-class", "timm-registers", "timm-average", "timm-rich", "hf-dinov2", "hf-siglip"]


@pytest.mark.parametrize("host", COPIES)
@torch.no_grad()
def test_merging_an_exact_copy_changes_nothing(host: str) -> None:
    """Two equal patches without positions: one of them is enough, if it counts twice.

    The whole network agrees in every output once tokens are restored: attention, pooling, all.
    """
    model: Any = HOSTS[host]().double()
    for name, parameter in model.named_parameters():
        if "pos" in name and "embed" in name:
            parameter.zero_()
    x = images(host).double()
    # a patch at an even and a patch at an odd position, whatever the prefix
    x[:, :, :PATCH, PATCH : 2 * PATCH] = x[:, :, PATCH : 2 * PATCH, 2 * PATCH : 3 * PATCH]
    plain = call(model, x)
    for restore in ("end", "every"):
        transom.apply(model, MERGES, r=1, where=0, restore=restore)
        with transom.trace(model) as trace:
            close(call(model, x), plain, 1e-6)
        index, prefix = trace.tokens[0].index, trace.tokens[0].layout.prefix
        assert index is not None
        assert torch.equal(index[:, prefix + 1], index[:, prefix + 6])
        transom.remove(model)
    transom.apply(model, MERGES, r=1, where=0, prop_attn=False, restore="end")
    with pytest.raises(AssertionError):
        close(call(model, x), plain, 1e-6)
