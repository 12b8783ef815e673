"""T2T-ViT: soft splits, random features, the tokenizer in other hosts."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

import transom
from tests.common.cases import anatomy, same
from tests.common.hosts import HOSTS, call, images
from transom import registry
from transom.errors import FitError, SettingsError
from transom.ops.tokens_to_token import SPLITS, TokenPerformer, TokensToToken
from transom.papers.tokens.t2t_vit import T2T, T2TViT

registry.rooms()


@pytest.mark.parametrize("patch", SPLITS)
def test_soft_splits_make_as_many_tokens_as_patches(patch: int) -> None:
    made = TokensToToken(64, patch, embed_dim=24, token_dim=8)
    assert made(torch.randn(2, 3, 64, 64)).shape == (2, (64 // patch) ** 2, 24)
    assert made.tokens(torch.randn(1, 3, 32, 48)).shape == (1, 6 * (16 // patch) ** 2, 24)


def test_tokens_see_beyond_their_patch() -> None:
    made = TokensToToken(64, 16, embed_dim=8, token_dim=8, kind="transformer").eval()
    for layer in (made.attention1, made.attention2):
        torch.nn.init.zeros_(layer.attn["proj"].weight)  # what is left reaches by overlap alone
    x = torch.randn(1, 3, 64, 64)
    y = x.clone()
    y[..., 15:16, 15:16] += 1.0  # the last pixel of patch 0
    changed = (made(x) - made(y)).abs().amax(-1)[0].view(4, 4) > 1e-7
    assert changed[0, 0] and changed[1, 1] and not changed[3, 3]


def test_more_random_features_are_nearer_to_softmax() -> None:
    torch.manual_seed(0)
    q, k, v = (0.5 * torch.randn(3, 1, 64, 16)).unbind(0)
    expected = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    errors = []
    for ratio in (1, 64):
        found = []
        for seed in range(8):
            torch.manual_seed(seed)
            layer = TokenPerformer(16, 16, kernel_ratio=1.0).eval()
            if ratio > 1:  # orthogonal blocks side by side
                rows = [TokenPerformer(16, 16, kernel_ratio=1.0).w for _ in range(ratio)]
                layer.w = torch.nn.Parameter(torch.cat(rows))
            a, b = layer.features(q), layer.features(k)
            y = (a @ (b.mT @ v)) / (a @ b.sum(1).unsqueeze(-1))
            found.append((y - expected).square().mean().item())
        errors.append(sum(found) / len(found))
    assert errors[1] < errors[0] / 4


def test_scale_of_published_checkpoints() -> None:
    with torch.device("meta"):
        plain, wide = T2TViT(depth=1), T2TViT(depth=1, qk_scale="width")
    assert plain.blocks[0].attn.scale == pytest.approx((768 / 12) ** -0.5)
    assert wide.blocks[0].attn.scale == pytest.approx(768**-0.5)
    with pytest.raises(SettingsError, match="'width'"):
        T2TViT(qk_scale="head")


@pytest.mark.parametrize("kind", ["performer", "transformer"])
@pytest.mark.parametrize("host", ["timm-class", "timm-registers", "hf-vit", "hf-clip-vision"])
@torch.no_grad()
def test_tokenizer_in_a_host(host: str, kind: Any) -> None:
    model, x = HOSTS[host](), images(host)
    plain, before = call(model, x), anatomy(model)
    transom.apply(model, T2T(kind, token_dim=8))
    got = call(model, x)
    assert [t.shape for t in got] == [t.shape for t in plain]
    assert not same(got, plain)
    transom.remove(model)
    assert anatomy(model) == before
    assert same(call(model, x), plain)


def test_patches_that_no_splits_stand_for_are_refused() -> None:
    model = timm.create_model("vit_tiny_patch16_224", patch_size=14, img_size=28, depth=1)
    with pytest.raises(FitError, match="has \\(14, 14\\)"):
        transom.apply(model, "t2t-vit")


def test_a_model_learns_with_it() -> None:
    """One step on a fixed batch lowers the loss: gradients reach the first split."""
    torch.manual_seed(0)
    model = T2TViT(img_size=32, embed_dim=32, depth=1, num_heads=2, num_classes=4, token_dim=8)
    steps = torch.optim.AdamW(model.parameters(), 1e-2)
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(model(x), y)
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(float(loss.detach()))
    assert model.patch_embed.attention1.kqv.weight.grad.abs().max() > 0
    assert losses[-1] < 0.5 * losses[0]
