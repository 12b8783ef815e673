"""Planted data: the tokens that matter survive with every method that chooses, not at random.

An encoder without training cannot know what matters but by what the class token looks at and by
what differs from the rest. Both are planted: a background of patches that are all alike, and a few
patches that differ from it and from each other, to which the class token's query points. What
Dependency-ViT keeps it has to learn; tests/papers/test_dependency_vit.py shows that it does.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import transom
from tests.zoo.test_decoders import IMAGE, llava, seeing
from transom import registry

WIDTH, SIDE, PATCH = 24, 6, 4
COUNT = SIDE * SIDE
IMPORTANT = 3
DEPTH = 2
METHODS = {
    "tome": {"r": 9},
    "pitome": {"ratio": 0.7},
    "crossget": {"r": 9},
    "evit": {"keep_rate": 0.6, "layers": (0, 1)},
}


def looking() -> nn.Module:
    """A transformer whose tokens are their patches and whose class token looks for colour."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIDE * PATCH, patch_size=PATCH, depth=DEPTH,
        embed_dim=WIDTH, num_heads=1, num_classes=0,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        # channels 0 to 2 hold the colour of a patch with either sign, 6 the background
        for colour in range(3):
            model.patch_embed.proj.weight[colour, colour] = 1 / PATCH**2
            model.patch_embed.proj.weight[3 + colour, colour] = -1 / PATCH**2
        model.patch_embed.proj.bias[6] = 1.0
        eye = torch.eye(WIDTH)
        for block in model.blocks:
            block.norm1 = nn.Identity()
            block.attn.qkv.weight.copy_(torch.cat([eye * 3, eye, torch.zeros_like(eye)]))
        model.cls_token[..., :3] = 1.0
    return model


def planted(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, 24, 24), and which of the 36 patches are important (B, 36)."""
    cells = 0.02 * torch.randn(count, COUNT, 3, generator=rng)
    important = torch.zeros(count, COUNT, dtype=torch.bool)
    for b in range(count):
        places = torch.randperm(COUNT, generator=rng)[:IMPORTANT]
        important[b, places] = True
        cells[b, places] = 2.0 * torch.eye(3)
    pixels = cells.view(count, SIDE, SIDE, 3).permute(0, 3, 1, 2)
    return pixels.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3), important


@torch.no_grad()
def survivors(slug: str, settings: dict[str, Any]) -> tuple[float, float]:
    """Part of the important patches that end as tokens of their own, and patches left ÷ all."""
    model = looking()
    pixels, important = planted(32, torch.Generator().manual_seed(0))
    transom.apply(model, slug, restore="never", **settings)
    with transom.trace(model) as trace:
        model(pixels)
    index = trace.tokens[-1].index
    assert index is not None
    alone = []
    for b in range(len(pixels)):
        groups = index[b, 1:]
        for place in important[b].nonzero()[:, 0]:
            mine = groups == groups[place]
            alone.append(bool(groups[place] >= 0) and int(mine.sum()) == 1)
    return sum(alone) / len(alone), (trace.lengths[-1] - 1) / COUNT


@pytest.mark.parametrize("slug", METHODS)
def test_what_matters_stays_and_random_loses_it(slug: str) -> None:
    stays, left = survivors(slug, METHODS[slug])
    assert left < 0.6
    assert stays == 1.0
    counts = (1 + round(COUNT * left**0.5), 1 + round(COUNT * left))
    by_chance, same = survivors("random", {"counts": counts})
    assert same == pytest.approx(left, abs=0.03)
    assert by_chance < 0.75


def test_every_method_for_images_that_chooses_without_training_is_tried() -> None:
    chosen = {
        slug
        for slug, cls in registry.methods().items()
        if ".tokens." in cls.__module__ and cls.takes == "encoder" and not cls().needs_training
    }
    assert chosen == set(METHODS)


@torch.no_grad()
def through(slug: str, settings: dict[str, Any]) -> tuple[float, int]:
    """How much of a planted peak is left among the image tokens behind a layer, and their number.

    One image token of each prompt has a channel that stands out from all others.
    """
    model = llava()
    given = seeing("llava")
    given["attention_mask"] = torch.ones_like(given["attention_mask"])
    image = (given["input_ids"] == IMAGE).nonzero().view(2, -1, 2)[..., 1]
    peaks = []
    for chosen in range(9):
        place = image[:, chosen]

        def plant(x: Tensor, place: Tensor = place) -> Tensor:
            x = x.clone()
            x[torch.arange(2), place, 5] = 50.0
            return x

        transom.apply(model, slug, check=False, **settings)
        edits = {"blocks.0.residual.pre": plant}
        with (
            transom.intervene(model, edits, decoder=True),
            transom.capture(model, "blocks.1.residual.pre", decoder=True) as seen,
            transom.trace(model) as trace,
        ):
            model(**given)
        visual = trace.tokens[0].visual
        assert visual is not None
        x = seen["blocks.1.residual.pre"][..., 5].masked_fill(~visual, 0.0)
        peaks += (x.amax(1) > 40).tolist()
        count = int(visual.sum(1)[0])
        transom.remove(model)
    return sum(peaks) / len(peaks), count


def test_a_peak_in_a_picture_survives_pooling_and_not_random_pruning() -> None:
    pooled, count = through("dpn", {"layers": (0,), "strides": (((3, 3),),), "adaptive": False})
    assert (pooled, count) == (1.0, 1)
    some, same = through("random-visual", {"layers": (0,), "keep_rate": 0.1})
    assert same == count
    assert some < 0.3
