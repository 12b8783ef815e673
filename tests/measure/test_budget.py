"""One budget for all: settings found by counting operations, and what cannot meet it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import transom
from tests.zoo.test_decoders import llava, seeing
from transom import registry
from transom.errors import FitError, SettingsError
from transom.measure import Comparison, budget, gflops
from transom.registry import Method

FAST: dict[str, Any] = {"rounds": 1, "batch_size": 2, "control": False}


def vit(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=48, patch_size=4, depth=4, embed_dim=24, num_heads=2,
        num_classes=5, **settings,
    ).eval()  # fmt: skip


IMAGES = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@functools.cache
def at(wished: float) -> Comparison:
    return transom.compare(vit(), IMAGES, budget=wished, **FAST)


@pytest.mark.parametrize("wished", [0.85, 0.6])
def test_every_token_method_meets_the_budget_or_says_why_not(wished: float) -> None:
    result = at(wished)
    rows = {row.method: row for row in result.rows}
    tokens = {s for s, cls in registry.methods().items() if ".tokens." in cls.__module__}
    left_out = dict(result.skipped)
    assert rows.keys() | left_out.keys() == tokens | {"plain", "random"}
    assert {"tome", "pitome", "evit", "crossget", "dependency-vit", "random"} <= rows.keys()
    for slug, row in rows.items():
        if slug == "plain":
            continue
        assert row.flops_ratio <= wished
        assert row.flops_ratio > wished - 0.03, f"{slug} ({row.label}) is far below the budget"
    assert "fits decoders" in left_out["dpn"] and "fits decoders" in left_out["dyvte"]
    assert "no setting that changes how many tokens" in left_out["t2t-vit"]


def test_the_ratio_is_that_of_the_counter() -> None:
    plain = gflops(lambda: vit()(IMAGES))
    for row in at(0.6).rows[1:]:
        model = transom.apply(vit(), row.method, **row.settings)
        assert gflops(lambda m=model: m(IMAGES)) / plain == pytest.approx(row.flops_ratio)


def test_a_smaller_budget_leaves_fewer_tokens() -> None:
    many, few = ({r.method: r for r in at(wished).rows} for wished in (0.85, 0.6))
    for slug in many.keys() - {"plain"}:
        assert few[slug].tokens < many[slug].tokens


def test_what_cannot_reach_it_is_listed_with_its_strongest_setting() -> None:
    result = transom.compare(vit(), IMAGES, ["dependency-vit", "evit"], budget=0.48, **FAST)
    assert [row.method for row in result.rows] == ["plain", "evit"]
    (reason,) = [why for slug, why in result.skipped if slug == "dependency-vit"]
    assert "does not reach 0.48" in reason and "prune_ratio=" in reason
    assert reason in result.caption()
    with pytest.raises(FitError, match=r"none of the methods meets the budget 0\.48.*dependency"):
        transom.compare(vit(), IMAGES, ["dependency-vit"], budget=0.48, **FAST)


def test_the_caption_tells_the_budget_and_what_is_not_trained() -> None:
    caption = at(0.6).caption()
    assert "at most 0.6 of the plain host's GFLOPs" in caption
    assert "not trained, so only the costs count: dependency-vit" in caption
    assert at(0.6).environment["budget"] == 0.6


def test_what_is_set_stays_set() -> None:
    given = [
        ("evit", {"fuse_token": True}),
        ("evit", {"keep_rate": 0.9}),
        ("tome", {"prop_attn": False}),
        registry.build("tome", {"r": 3}),
    ]
    fused, fixed, tome, instance = transom.compare(vit(), IMAGES, given, budget=0.6, **FAST).rows[
        1:
    ]
    assert fused.settings["fuse_token"] is True and 0.57 < fused.flops_ratio <= 0.6
    assert fixed.settings == {"keep_rate": 0.9} and fixed.flops_ratio > 0.6
    assert tome.settings["prop_attn"] is False and 0.57 < tome.flops_ratio <= 0.6
    assert instance.settings == {"r": 3} and instance.flops_ratio > 0.6


def test_a_host_without_a_class_token_gets_the_reason() -> None:
    model = vit(class_token=False, global_pool="avg")
    result = transom.compare(model, IMAGES, ["evit", "tome"], budget=0.7, **FAST)
    assert [row.method for row in result.rows] == ["plain", "tome"]
    assert "class token" in dict(result.skipped)["evit"]


def answered(model: Any, images: Tensor) -> Tensor:
    """The next word after a prompt with each picture."""
    ids = seeing("llava")["input_ids"][:1].expand(len(images), -1)
    mask = torch.ones_like(ids)
    return model(input_ids=ids, attention_mask=mask, pixel_values=images).logits[:, -1]


def test_a_model_that_sees_and_speaks_has_the_methods_of_both_its_parts() -> None:
    pictures = seeing("llava")["pixel_values"]
    methods = ["tome", "dpn", "dyvte", "random-visual"]
    result = transom.compare(
        llava(), pictures, methods, budget=0.8, forward=answered, rounds=1, batch_size=2
    )
    rows = {row.method: row for row in result.rows}
    assert {"dpn", "dyvte", "random-visual"} <= rows.keys()
    for slug in ("dpn", "dyvte", "random-visual"):
        assert 0.7 < rows[slug].flops_ratio <= 0.8
        assert rows[slug].tokens < 20 and len(rows[slug].lengths) == 4
        assert rows[slug].over_twin is not None
    assert rows["dpn"].control["cosine"] != rows["dpn"].quality["cosine"]
    reasons = dict(result.skipped)
    assert "does not reach 0.8" in reasons["tome"]  # the eyes are a small part of this model


def test_a_decoder_alone_is_a_host_too() -> None:
    from tests.zoo.test_decoders import language, words

    def read(model: Any, images: Tensor) -> Tensor:
        ids = words(len(images))["input_ids"]
        return model(input_ids=ids).logits[:, -1]

    result = transom.compare(language("Llama"), torch.randn(2, 3, 4, 4), forward=read, **FAST)
    assert {row.method for row in result.rows} == {"plain", "dpn", "dyvte", "random-visual"}
    for row in result.rows:
        assert row.lengths == (14,) * 4 and row.flops_ratio == 1  # there is no picture to lose


@pytest.mark.parametrize("wished", [0, 1, 1.5, -0.2])
def test_bad_budgets(wished: float) -> None:
    with pytest.raises(SettingsError, match="above 0, below 1"):
        transom.compare(vit(), IMAGES, budget=wished, **FAST)


def ratio_of(method: Method) -> float:
    """A made-up host: what remains is the product of what each block keeps."""
    rate = getattr(method, "keep_rate", None)
    if not isinstance(rate, float):
        raise SettingsError("no rate")
    return 0.2 + 0.8 * rate


def test_the_search_is_near_from_below_and_asks_for_nothing_twice() -> None:
    cls = registry.methods()["random"]
    knob = budget.dial(cls, {}, 12, 196)
    assert isinstance(knob, budget.Dial)
    asked: list[Method] = []

    def ratio(method: Method) -> float:
        asked.append(method)
        return ratio_of(method)

    for wished in (0.95, 0.61, 0.3):
        found = budget.meet(cls, knob, wished, ratio).settings
        assert found is not None
        got = 0.2 + 0.8 * found["keep_rate"]
        assert wished - budget.NEAR <= got <= wished
    assert budget.meet(cls, knob, 0.1, ratio).settings is None
    assert len(asked) < 4 * (budget.TRIES + 1)


def test_dials_run_from_mild_to_strong_and_hold_what_a_method_takes() -> None:
    found = {}
    for slug, cls in registry.methods().items():
        knob = budget.dial(cls, {}, 12, 196)
        if isinstance(knob, budget.Dial):
            found[slug] = knob
            start = max(knob.low, 0.0) + 0.5
            registry.build(slug, knob.at(start))
    assert {"tome", "crossget", "pitome", "evit", "random", "dpn", "dyvte"} <= found.keys()
    assert found["dyvte"].at(0.0) == {"exit_layer": 8} and found["dyvte"].at(2.0)["exit_layer"] == 2
    assert found["pitome"].at(0.0) == {"ratio": 1.0}
    assert sum(found["tome"].at(0.5)["r"]) == 98
    assert sum(found["tome"].at(6.0)["r"]) > 190


def test_dials_say_why_there_is_none() -> None:
    dial, known = budget.dial, registry.methods()
    assert "no setting" in str(dial(known["none"], {}, 12, 196))
    assert "keep_rate is set" in str(dial(known["evit"], {"keep_rate": 0.5}, 12, 196))
