"""Schedules chosen by measurement."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

import transom
from transom.errors import CheckpointError, SettingsError
from transom.measure import schedule


@given(st.integers(1, 24), st.integers(4, 400), st.floats(0.05, 0.95))
def test_removals_keep_to_their_budget(depth: int, patches: int, part: float) -> None:
    for weights in schedule.patterns(depth).values():
        assert sum(weights) == pytest.approx(1)
        removed, left = schedule.removals(weights, patches, part), patches
        assert len(removed) == depth
        for r in removed:
            assert 0 <= r <= left // 2
            left -= r
        assert sum(removed) <= part * patches + 0.5


@pytest.mark.parametrize("slug", ["tome", "pitome", "evit"])
def test_methods_remove_what_they_are_told(slug: str) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=112, depth=4, embed_dim=48).eval()
    removed = [0, 13, 7, 1]
    settings = transom.registry.methods()[slug].removing(removed, 49)
    transom.apply(model, slug, check=False, **settings)
    with torch.no_grad(), transom.trace(model) as trace:
        model(torch.randn(2, 3, 112, 112))
    assert trace.lengths == [50, 37, 30, 29]


def test_choice_is_measured_and_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=4).eval()
    images = torch.randn(2, 3, 224, 224)
    found = schedule.choose(model, images, "tome", 1.2, batch_size=2, rounds=2)
    assert len(found.candidates) == len(schedule.patterns(4))
    assert any(row is found.row for _, row in found.candidates)
    assert found.row.lengths[-1] == 197 - sum(found.settings["r"])
    path = found.to_json(tmp_path / "tome.json")
    transom.apply(model, "tome", schedule=path)
    assert transom.fittings(model)[0].method.r == found.settings["r"]
    transom.remove(model)
    with pytest.raises(CheckpointError, match="for 'tome', not for 'evit'"):
        transom.apply(model, "evit", schedule=path)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="is no schedule"):
        transom.apply(model, "tome", schedule=path)
    assert not transom.fittings(model)


def test_what_cannot_be_scheduled_says_so() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48).eval()
    with pytest.raises(SettingsError, match="above 1"):
        schedule.choose(model, torch.randn(1, 3, 32, 32), "tome", 0.5)
    with pytest.raises(SettingsError, match="cannot be told"):
        schedule.choose(model, torch.randn(1, 3, 32, 32), "none", 1.5)
