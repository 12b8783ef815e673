"""What people get wrong with models that see: no image, several, images gone, layers that are not.

A method either goes on as it should, or says what is the matter; it never silently does nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import transom
from tests.zoo.test_decoders import IMAGE, SEEING, inputs, llava, words
from transom import registry
from transom.errors import SettingsError, TokensError

REDUCE: dict[str, dict[str, Any]] = {
    "dpn": {"layers": (1,), "strides": (((3, 3),),), "adaptive": False},
    "dyvte": {"exit_layer": 1},
    "random-visual": {"keep_rate": 0.5, "layers": (1,)},
}


def test_every_method_that_lets_image_tokens_go_is_tried() -> None:
    known = {
        slug
        for slug, cls in registry.methods().items()
        if cls.takes == "decoder" and (".tokens." in cls.__module__ or "visual" in slug)
    }
    assert known == set(REDUCE)


@pytest.mark.parametrize("slug", REDUCE)
@pytest.mark.parametrize("name", SEEING)
@torch.no_grad()
def test_a_prompt_without_an_image_is_left_alone(slug: str, name: str) -> None:
    model, given = SEEING[name](), words()
    plain = model(**given).logits
    text = model.generate(**given, max_new_tokens=4, do_sample=False)
    transom.apply(model, slug, **REDUCE[slug])
    with transom.trace(model) as trace:
        got = model(**given).logits
    assert trace.lengths == [14] * 4
    real = given["attention_mask"].bool()
    torch.testing.assert_close(got[real], plain[real], atol=1e-5, rtol=1e-5)
    assert torch.equal(model.generate(**given, max_new_tokens=4, do_sample=False), text)


@torch.no_grad()
def test_a_batch_in_which_one_prompt_has_no_image() -> None:
    """It is read as if it were alone, whatever the other one loses."""
    model, given = llava(), inputs("llava")
    given["attention_mask"] = torch.ones_like(given["attention_mask"])
    given["input_ids"][1] = torch.arange(3, 23)
    given["pixel_values"] = given["pixel_values"][:1]
    alone = model(input_ids=given["input_ids"][1:]).logits[:, -1]
    for slug in ("dyvte", "random-visual"):
        transom.apply(model, slug, **REDUCE[slug])
        got = model(**given).logits[:, -1]
        torch.testing.assert_close(got[1:], alone, atol=1e-5, rtol=1e-5)
        transom.remove(model)


def two_images(gap: int) -> dict[str, Tensor]:
    """One prompt with two images of nine tokens and some words between them."""
    ids = words(1, length=24 + gap)["input_ids"]
    ids[:, 2:11] = IMAGE
    ids[:, 11 + gap : 20 + gap] = IMAGE
    pixels = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.mark.parametrize("gap", [0, 3])
@torch.no_grad()
def test_several_images(gap: int) -> None:
    given, model = two_images(gap), llava()
    count = given["input_ids"].shape[1]
    for slug, left in (("dyvte", count - 18), ("random-visual", count - 9)):
        transom.apply(model, slug, **REDUCE[slug])
        with transom.trace(model) as trace:
            model(**given)
        assert trace.lengths == [count, left, left, left]
        out = model.generate(**given, max_new_tokens=3, do_sample=False)
        assert out.shape[1] == count + 3
        transom.remove(model)
    transom.apply(model, "dpn", **REDUCE["dpn"])
    says = "prompt 0 holds 2 images" if gap else "give one image a prompt"
    with pytest.raises(TokensError, match=says):
        model(**given)


@pytest.mark.parametrize("hide", [False, True])
@pytest.mark.parametrize("slug", ["dpn", "imbalanced-attention", "var"])
def test_images_gone_before_a_layer_that_needs_them(slug: str, hide: bool) -> None:
    model, given = llava(), {k: v[:1] for k, v in inputs("llava").items()}
    settings = {**registry.methods()[slug].grid(4, 9)[-1]}
    if slug == "dpn":
        settings = {**REDUCE["dpn"], "layers": (2,)}
    transom.apply(model, "dyvte", exit_layer=0, hide=hide)
    where = None if slug == "dpn" else slice(1, None)
    transom.apply(model, slug, where=where, **settings)
    with pytest.raises(TokensError, match=f"{slug} needs image tokens in a block behind"):
        model(**given)
    with pytest.raises(TokensError, match="earlier blocks, or let them leave later"):
        model.generate(**given, max_new_tokens=2, do_sample=False)
    transom.remove(model, "dyvte")
    assert model(**given).logits.isfinite().all()
    # a prompt that never had an image needs none
    transom.remove(model)
    transom.apply(model, "dyvte", exit_layer=0)
    transom.apply(model, slug, where=where, **settings)
    assert model(**words()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("slug", "settings", "word"),
    [
        ("dyvte", {"exit_layer": 3}, "expected 0 to 2"),
        ("dyvte", {"exit_layer": 99}, "4 layers"),
        ("dyvte", {"exit_layer": -1}, "from 0"),
        ("dpn", {"layers": (4,), "strides": (((2, 2),),)}, "layers 0 to 3"),
        ("random-visual", {"layers": (1, 4)}, "blocks 0 to 3"),
        ("random-visual", {"counts": (20, 11)}, "the host has 4"),
        ("random-visual", {"keep_rate": 1.5}, "from 0, at most 1"),
    ],
)
def test_layers_and_numbers_out_of_range(slug: str, settings: dict[str, Any], word: str) -> None:
    model = llava()
    with pytest.raises(SettingsError, match=word):
        transom.apply(model, slug, **settings)
    assert not transom.fittings(model)
