"""ViTamin: sizes as published, conversion of CLIP models, and locked-text tuning."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from transom.errors import CheckpointError, SettingsError
from transom.papers.vision_language.vitamin import clip, convert, encoder, lock_text

# name, image size, published parameters in millions and multiply-adds in 1e9
SIZES = [
    ("vitamin_small_224", 224, 22.0, 5.50),
    ("vitamin_base_224", 224, 87.5, 21.8),
    ("vitamin_large_224", 224, 333.3, 72.6),
    ("vitamin_xlarge_256", 256, 436.1, 125.3),
]
# open_clip's name: width, heads and layers of the text tower, and width of the joint space
TEXTS = {
    "ViTamin-S": (384, 6, 12, 384),
    "ViTamin-B": (512, 8, 12, 512),
    "ViTamin-L": (768, 12, 12, 768),
    "ViTamin-L2": (1024, 16, 24, 1024),
    "ViTamin-XL-256": (1152, 16, 27, 1152),
    "ViTamin-S-LTT": (768, 12, 12, 768),
    "ViTamin-B-LTT": (768, 12, 12, 768),
}


@pytest.mark.parametrize(("name", "size", "params", "gmacs"), SIZES)
def test_cost_is_the_published_one(name: str, size: int, params: float, gmacs: float) -> None:
    """The authors did not count the two products of q, k and v inside attention."""
    with torch.device("meta"), torch.no_grad():
        model: Any = timm.create_model(name, num_classes=0).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, size, size))
    attention = len(model.blocks) * 2 * model.patch_embed.num_patches**2 * model.embed_dim
    have = (counter.get_total_flops() / 2 - attention) / 1e9
    assert have == pytest.approx(gmacs, rel=0.01)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, rel=0.01)


def small(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 64, "num_classes": 5, **changes}
    return encoder(8, (8, 16), (1, 2), 32, 2, 2, **sizes).eval()


def test_token_grid_is_that_of_a_vit_16_and_no_norm_looks_at_the_batch() -> None:
    model = small(img_size=(64, 96))
    assert model.forward_features(torch.randn(1, 3, 64, 96)).shape == (1, 4 * 6, 32)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    with pytest.raises(SettingsError, match="two numbers"):
        encoder(8, (8, 16, 32), (1, 1, 1), 32, 2, 2)


@torch.no_grad()
def test_a_clip_model_becomes_an_image_tower() -> None:
    tower = small()
    projection = torch.randn(5, 32)
    state: dict[str, Tensor] = {
        f"visual.trunk.{name}": value
        for name, value in tower.state_dict().items()
        if not name.startswith("head.")
    }
    state |= {"visual.head.proj.weight": projection, "text.positional_embedding": torch.ones(2)}
    state["logit_scale"] = torch.ones(())
    other = small()
    other.load_state_dict(convert(state), strict=True)
    x = torch.randn(2, 3, 64, 64)
    pooled = tower.forward_head(tower.forward_features(x), pre_logits=True)
    torch.testing.assert_close(other(x), pooled @ projection.T)


@pytest.mark.parametrize("variant", TEXTS)
def test_text_towers_are_the_published_ones(variant: str) -> None:
    open_clip = pytest.importorskip("open_clip")
    config = open_clip.get_model_config(variant)
    text = config["text_cfg"]
    assert (text["width"], text["heads"], text["layers"], config["embed_dim"]) == TEXTS[variant]
    assert (text["context_length"], text["vocab_size"]) == (77, 49408)


def towers(width: int) -> nn.Module:
    model = pytest.importorskip("open_clip.model")
    return model.CustomTextCLIP(
        embed_dim=16,
        vision_cfg={"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
        text_cfg={
            "context_length": 8,
            "vocab_size": 32,
            "width": width,
            "heads": 2,
            "layers": 1,
        },
    )


def test_locked_text_tuning_trains_the_image_tower_only() -> None:
    model, teacher = towers(16), towers(16)
    assert lock_text(model, teacher.state_dict()) is model
    for name, value in teacher.text.state_dict().items():
        assert torch.equal(model.text.state_dict()[name], value)
    image, text, scale = model(torch.randn(2, 3, 32, 32), torch.randint(1, 32, (2, 8)))[:3]
    (image @ text.T * scale).diagonal().sum().backward()
    assert all(p.grad is None for p in model.text.parameters())
    assert all(p.grad is not None for p in model.visual.parameters())
    assert model.logit_scale.grad is not None


def test_a_teacher_that_does_not_fit_is_refused() -> None:
    with pytest.raises(CheckpointError, match="does not fit"):
        lock_text(towers(16), towers(32).state_dict())
    with pytest.raises(CheckpointError, match="no text tower"):
        lock_text(towers(16), {"visual.proj": torch.ones(1)})


def test_unknown_variant_names_the_known_ones() -> None:
    pytest.importorskip("open_clip")
    with pytest.raises(SettingsError, match="ViTamin-S"):
        clip("ViTamin-M")
