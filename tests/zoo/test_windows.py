"""Hosts whose attention stays inside windows: all slots but `tokens`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import transom
from tests.common.cases import anatomy, close, same
from tests.common.probes import OwnFfn, OwnNorm, Rebuild, WriteOut
from transom.errors import FitError, HostError
from transom.slots import Fill


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) * 0.1
            parameter.copy_(noise + 1 if parameter.dim() == 1 else noise)
    return model.eval()


def swin(version: str = "", **changes: Any) -> nn.Module:
    settings: dict[str, Any] = {
        "img_size": 48, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5,
        "window_size": 4 if not version else 3,
    }  # fmt: skip
    module = timm.models.swin_transformer_v2 if version else timm.models.swin_transformer
    return randomised(getattr(module, f"SwinTransformer{version}")(**{**settings, **changes}))


def sam(**changes: Any) -> nn.Module:
    return randomised(
        timm.models.vision_transformer_sam.VisionTransformerSAM(
            img_size=40,
            patch_size=8,
            embed_dim=16,
            depth=3,
            num_heads=2,
            window_size=2,
            global_attn_indexes=(1,),
            neck_chans=8,
            num_classes=5,
            init_values=0.5,
            **{"use_rel_pos": True, **changes},
        )
    )


HOSTS = {
    "swin": swin,
    "swin-padded": lambda: swin(img_size=56, always_partition=True, strict_img_size=False),
    "swin-v2": lambda: swin("V2"),
    "sam": sam,
    "sam-qk-norm": lambda: sam(use_rel_pos=False, qk_norm=True),
}


def images(model: Any) -> Tensor:
    size = model.patch_embed.img_size
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


class Replace(Rebuild):
    """Replaces norms where there are any to replace, and the ffn."""

    def _fill(self, view: Any) -> Fill:
        norms = tuple(view.part(n) for n in ("norm1", "norm2"))
        own = tuple(None if n is None else OwnNorm(n, self.factor) for n in norms)
        return Fill(norms=own, ffn=OwnFfn(view.part("ffn"), self.factor))


class Mix(Rebuild):
    """Replaces the whole attention."""


Replace.needs_grid = Mix.needs_grid = False
METHODS = {"attention": WriteOut, "parts": Replace}
STRONG = {"attention": {"sharpness": 3.0}, "parts": {"factor": 1.5}}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("slot", METHODS)
@torch.no_grad()
def test_slots(host: str, slot: str) -> None:
    model: Any = HOSTS[host]()
    x = images(model)
    plain, before = model(x), anatomy(model)
    transom.apply(model, "none")
    assert torch.equal(model(x), plain)
    transom.remove(model)
    transom.apply(model, METHODS[slot]())
    close([model(x)], [plain], 1e-5)
    close([copy.deepcopy(model)(x)], [plain], 1e-5)
    transom.remove(model)
    transom.apply(model, METHODS[slot](**STRONG[slot]))
    assert not same([model(x)], [plain])
    transom.remove(model)
    assert anatomy(model) == before
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("host", HOSTS)
def test_tokens_are_refused_with_the_reason(host: str) -> None:
    model = HOSTS[host]()
    before = anatomy(model)
    with pytest.raises(HostError, match="windows"):
        transom.apply(model, "tome", r=2)
    assert anatomy(model) == before
    with pytest.raises(FitError, match="attention"):
        transom.apply(model, Mix(), check=False)
    assert anatomy(model) == before


@pytest.mark.parametrize("host", ["swin", "sam"])
def test_checkpointing_changes_no_gradient(host: str) -> None:
    seen = []
    for checkpointing in (False, True):
        model: Any = HOSTS[host]()
        transom.apply(model, WriteOut(sharpness=2.0))
        model.set_grad_checkpointing(checkpointing)
        model.train()
        model(images(model)).square().sum().backward()
        seen.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(seen[0]) > 20
    assert seen[0].keys() == seen[1].keys()
    for name, grad in seen[0].items():
        torch.testing.assert_close(seen[1][name], grad, atol=1e-5, rtol=1e-4, msg=name)
