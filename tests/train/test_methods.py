"""What training is for: a method gets back what it lost off the shelf."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import torch

import transom
from transom.errors import HostError
from transom.measure import models
from transom.measure.preprocessing import classes_of, preprocessing_of
from transom.train import build_model, evaluate, parse_recipe, read_recipe, train
from transom.train.data import load_splits

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", models.shipped())
def test_shipped_weights_do_what_their_card_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # recipes name their data from here
    base = name.removeprefix("transom/")
    assets = resources.files("transom").joinpath("assets")
    facts = json.loads(assets.joinpath(f"{base}.json").read_text())
    part = parse_recipe(facts["recipe"]).data
    source = Path(part.test or part.train)
    if source.suffix == ".parquet" and not source.is_file():
        pytest.skip(f"{source.name} is not here")
    limited = replace(part, train_limit=100, test_limit=1000)
    model = models.create(name)
    splits = load_splits(limited, preprocessing_of(model), classes_of(model) or 0)
    score = evaluate(model, splits.test)
    assert score.count == min(1000, facts["test_images"])
    assert score.accuracy == pytest.approx(facts["accuracy_of_1000"], abs=1.0)
    assert assets.joinpath(f"{base}.safetensors").stat().st_size <= 12e6
    assert f"{facts['accuracy']:.2f} %" in assets.joinpath(f"{base}.md").read_text()


def test_unknown_weights_are_named() -> None:
    with pytest.raises(HostError, match=r"it ships .*transom/digits-vit"):
        models.create("transom/digits-vti")


def test_fine_tuning_evit_regains_half_of_what_pruning_loses(tmp_path: Path) -> None:
    """The shipped digits model reads the class in its first blocks, so these are pruned."""
    changes = ["method.settings={keep_rate: 0.5, layers: [0, 1, 2]}", "epochs=5", "distil=null"]
    recipe = read_recipe(ROOT / "recipes" / "digits_evit.yaml", changes)
    assert recipe.method is not None
    host = build_model(recipe.model)
    test = load_splits(recipe.data, preprocessing_of(host), 10).test
    plain = evaluate(host, test).accuracy
    transom.apply(host, "evit", **recipe.method.settings)
    pruned = evaluate(host, test).accuracy
    assert plain - pruned > 3, "there has to be something to regain"
    tuned = train(recipe, tmp_path)
    (fitting,) = transom.fittings(tuned.model)
    assert fitting.method.settings()["override"] == 0.5
    with transom.trace(tuned.model) as trace:
        tuned.model(torch.zeros(1, 3, 8, 8))
    assert trace.lengths == [9, 5, 3, 3]
    assert tuned.score.accuracy - pruned >= (plain - pruned) / 2
