"""Models that something else has wrapped, quantised or not filled yet."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import transom
from transom.errors import HostError


def small() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, embed_dim=48, num_classes=5
    ).eval()


def bites_and_goes(model: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model(x)
        transom.apply(model, "tome", r=3)
        assert not torch.equal(model(x), plain)
        transom.remove(model)
        assert torch.equal(model(x), plain)


def test_int8_weights() -> None:
    quantised = torch.ao.quantization.quantize_dynamic(small(), {nn.Linear}, dtype=torch.qint8)
    bites_and_goes(quantised)


def test_data_parallel() -> None:
    bites_and_goes(nn.DataParallel(small()))


def test_compiled_in_place() -> None:
    model = small()
    model.compile(backend="eager")
    bites_and_goes(model)


def test_lora_through_peft() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    bites_and_goes(peft.get_peft_model(small(), peft.LoraConfig(target_modules=["qkv"])).eval())


def test_a_model_without_data_is_fitted_and_filled_later() -> None:
    with torch.device("meta"):
        model = small()
    filled = small()
    transom.apply(model, "tome", r=3)
    model.load_state_dict(filled.state_dict(), assign=True)
    transom.apply(filled, "tome", r=3)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), filled(x))


def test_a_model_in_two_places_says_so() -> None:
    model = small()
    model.blocks[1].to("meta")
    with pytest.raises(HostError, match=r"does not run on the example.*device"):
        transom.apply(model, "tome", r=3)
    assert not transom.fittings(model)
