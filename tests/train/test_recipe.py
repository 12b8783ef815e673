"""Recipes: what is written is what runs, and what is misspelt is said."""

from __future__ import annotations

from pathlib import Path

import pytest

import transom
from transom import registry
from transom.errors import SettingsError, TransomError
from transom.registry import Method
from transom.train import build_model, read_recipe

from .conftest import recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
FITTED = [path for path in RECIPES if read_recipe(path).method is not None]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_read(path: Path) -> None:
    assert read_recipe(path).model.name


def test_there_are_recipes() -> None:
    assert {"digits_vit", "cifar10_vit", "cifar10_cct"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", FITTED, ids=lambda path: path.stem)
def test_the_method_of_a_recipe_fits_its_model(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.method is not None
    model = build_model(recipe.model)
    transom.apply(model, recipe.method.name, **recipe.method.settings)
    method = registry.build(recipe.method.name, recipe.method.settings)
    assert isinstance(method.training(**recipe.method.training), registry.Training)


def test_every_method_that_is_trained_has_a_recipe() -> None:
    """On the CIFAR-10 ViT, if it fits there."""
    written = {recipe.method.name for recipe in map(read_recipe, RECIPES) if recipe.method}
    base = read_recipe(RECIPES[0].parent / "cifar10_finetune.yaml").model
    for slug, method in registry.methods().items():
        trains = method().needs_training or method.training is not Method.training
        if not trains or slug in written:
            continue
        with pytest.raises(TransomError):
            transom.apply(build_model(base), slug)


def test_a_recipe_may_extend_another(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "model: {name: vit_tiny_patch16_224}\ndata: {train: digits}\noptim: {lr: 0.1, clip: 1.0}\n"
    )
    own = tmp_path / "own.yaml"
    own.write_text("extends: base.yaml\noptim: {lr: 0.2}\nepochs: 3\n")
    read = read_recipe(own, ["epochs=4"])
    assert (read.optim.lr, read.optim.clip, read.epochs) == (0.2, 1.0, 4)
    third = tmp_path / "third.yaml"
    third.write_text("extends: own.yaml\n")
    with pytest.raises(SettingsError, match="extends another recipe"):
        read_recipe(third)
    own.write_text("extends: nowhere.yaml\n")
    with pytest.raises(SettingsError, match="there is no recipe"):
        read_recipe(own)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {name: vit_tiny_patch16_224}\ndata: {train: digits}\n")
    return path


def test_changes_are_typed(path: Path) -> None:
    read = read_recipe(
        path,
        [
            "optim.lr=3e-4",
            "epochs=7",
            "augment.scale=[0.5, 1]",
            "model.args.depth=3",
            "method.name=evit",
            "method.settings.keep_rate=0.5",
            "data.test=null",
        ],
    )
    assert read.optim.lr == 3e-4 and read.epochs == 7
    assert read.augment.scale == (0.5, 1)
    assert read.model.args == {"depth": 3}
    assert read.method is not None and read.method.settings == {"keep_rate": 0.5}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("epoch=3", "unknown key 'epoch' .did you mean 'epochs'"),
        ("optim.layer_deacy=0.7", "did you mean 'optim.layer_decay'"),
        ("lr=0.1", "did you mean 'optim.lr'"),
        ("augment.xyz=1", "unknown key 'augment.xyz'; its section may have"),
        ("epochs=many", "epochs is 'many'; expected an integer"),
        ("epochs=0", "epochs is 0; expected an integer of at least 1"),
        ("precision=fp8", "precision is 'fp8'"),
        ("optim.lr=-1", "expected a positive rate"),
        ("optim=adamw", "'optim' is 'adamw'; expected a section"),
        ("augment.hflip=2", "augment.hflip is 2"),
        ("epochs", "expected key=value"),
        ("ema=1.5", "ema is 1.5"),
        ("distil={weight: 2}", "a weight from 0 to 1"),
        ("data.holdout=0", "data.holdout is 0"),
    ],
)
def test_wrong_changes_are_named(path: Path, change: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        read_recipe(path, [change])


def test_odd_batches_are_not_mixed(path: Path) -> None:
    with pytest.raises(SettingsError, match="even number"):
        read_recipe(path, ["batch_size=15", "augment.mixup=0.8"])


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no recipe"):
        read_recipe(tmp_path / "none.yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text("model: [")
    with pytest.raises(SettingsError, match="cannot be read as YAML"):
        read_recipe(path)
    path.write_text("just words")
    with pytest.raises(SettingsError, match="holds no recipe"):
        read_recipe(path)
    path.write_text("data: {train: digits}")
    with pytest.raises(SettingsError, match="has no 'model'"):
        read_recipe(path)


def test_differences_are_dotted() -> None:
    assert recipe().differences(recipe()) == []
    other = recipe(epochs=3, optim={"lr": 1.0})
    assert recipe().differences(other) == ["epochs", "optim.lr"]
