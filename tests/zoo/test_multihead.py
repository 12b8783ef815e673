"""Hosts on nn.MultiheadAttention keep its fast path, its hooks and its order of dimensions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import transom
from tests.common.cases import same
from tests.zoo.timm_probes import REDUCED, TOTAL, far, images, run
from tests.zoo.timm_zoo import DEPTH, FITS, ImageTower, own, randomised

MULTIHEAD = [f for f in ("torchvision-vit", "openai-clip-form", "open-clip") if f in FITS]


@pytest.mark.parametrize("family", MULTIHEAD)
def test_the_fast_path_stays_what_it_is(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain calls take PyTorch's fast path as often as before; hooks on the attention fire."""
    calls, fired = [], []
    native = torch._native_multi_head_attention

    def counted(*args: Any) -> Any:
        calls.append(1)
        return native(*args)

    monkeypatch.setattr(torch, "_native_multi_head_attention", counted)
    model, x = own(FITS[family]), images()
    attention = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    attention[0].register_forward_hook(lambda *args: fired.append(1))
    with torch.no_grad():
        expected = run(model, x)
        fast = len(calls)
        assert fast == (0 if family == "openai-clip-form" else DEPTH)
        transom.apply(model, "none", check=False)
        assert same(run(model, x), expected)
        assert len(calls) == 2 * fast
        transom.remove(model)
        transom.apply(model, "tome", r=REDUCED, check=False)
        reduced = run(model, x)
        assert len(calls) == 2 * fast
        assert len(fired) == 3
    # with gradients PyTorch leaves the fast path
    assert far(run(model, x), reduced) < 1e-5
    transom.remove(model)
    with torch.no_grad():
        assert same(run(model, x), expected)
    assert len(calls) == 3 * fast


@torch.no_grad()
def test_towers_that_take_the_batch_second() -> None:
    """(N, B, D) and (B, N, D) are two ways to write the same."""
    second, first = ImageTower(), ImageTower(batch_first=True)
    randomised(second)
    first.load_state_dict(second.state_dict())
    first.eval()
    x, outs = images(3), []
    for model in (first, second):
        transom.apply(model, "tome", r=REDUCED)
        outs.append(model(x))
    assert far(outs[:1], outs[1:]) < 1e-5

    # a loop of one's own sees the form it knows
    h = torch.randn(TOTAL + 1, 3, 32)
    for i, block in enumerate(second.transformer.resblocks):
        h = block(h)
        assert h.shape == (TOTAL + 1 - REDUCED * (i + 1), 3, 32)


@pytest.mark.skipif("open-clip-both-towers" not in FITS, reason="open_clip is not installed")
@torch.no_grad()
def test_the_text_tower_is_left_alone() -> None:
    model: Any = own(FITS["open-clip-both-towers"])
    words = torch.randint(1, 64, (2, 8))
    expected = model.encode_text(words)
    transom.apply(model, "tome", r=REDUCED)
    assert transom.fittings(model)[0].host.name == "visual"
    assert torch.equal(model.encode_text(words), expected)
    assert len(model(images(), words)) == 3
