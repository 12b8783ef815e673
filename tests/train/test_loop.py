"""The loop: it learns, it goes on where it was, and it says what is wrong."""

from __future__ import annotations

import csv
import json
import resource
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import transom
from transom.errors import CheckpointError, DataError, SettingsError, TrainingError
from transom.papers.tokens.evit import EViT
from transom.registry import Training
from transom.train import Moment, build_model, read_recipe, train
from transom.train.objective import divergence

from .conftest import recipe

MIXED: dict[str, Any] = {
    "augment": {"scale": [0.6, 1.0], "auto": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "cutmix": 1.0},
    "ema": 0.9,
    "accumulate": 2,
    "checkpoint_steps": 2,
}


class Killed(Exception):
    pass


def kill_after(step: int) -> Callable[[Moment], None]:
    def watch(now: Moment) -> None:
        if now.step == step:
            raise Killed

    return watch


def curve(out: Path) -> list[tuple[str, str]]:
    with (out / "steps.csv").open() as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file)]


def same(a: Path, b: Path) -> bool:
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_digits_are_learnt_in_a_minute(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "recipes" / "digits_vit.yaml"
    began = time.process_time()
    done = train(read_recipe(path), tmp_path)
    assert done.score.accuracy >= 97.0
    assert time.process_time() - began < 60
    assert done.score.count == 359


@pytest.mark.parametrize("stop", [1, 2, 3, 5], ids=lambda step: f"killed-after-{step}")
def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path: Path, stop: int) -> None:
    config = recipe(**MIXED)  # 3 steps an epoch, checkpoints after 2, 3, 4 and 6
    whole = train(config, tmp_path / "whole")
    with pytest.raises(Killed):
        train(config, tmp_path / "parts", watch=kill_after(stop))
    parts = train(config, tmp_path / "parts")
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert len(curve(tmp_path / "whole")) == 6
    assert same(tmp_path / "whole", tmp_path / "parts")
    assert parts.score.loss == whole.score.loss
    again = train(config, tmp_path / "parts")
    assert again.score.loss == whole.score.loss, "a finished run is only judged again"


def test_runs_repeat_and_seeds_differ(tmp_path: Path) -> None:
    one = recipe(epochs=1)
    train(one, tmp_path / "a")
    torch.rand(5)
    train(one, tmp_path / "b")
    train(recipe(epochs=1, seed=1), tmp_path / "c")
    assert curve(tmp_path / "a") == curve(tmp_path / "b") != curve(tmp_path / "c")
    train(recipe(epochs=1, workers=2), tmp_path / "d")
    assert curve(tmp_path / "d") == curve(tmp_path / "a"), "workers change nothing"


def test_another_recipe_does_not_go_on(tmp_path: Path) -> None:
    train(recipe(epochs=1), tmp_path)
    with pytest.raises(TrainingError, match=r"differs in \['optim.lr'\]"):
        train(recipe(epochs=1, optim={"lr": 2e-3}), tmp_path)
    train(recipe(epochs=1, optim={"lr": 2e-3}), tmp_path, fresh=True)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    config = recipe(epochs=2)
    with pytest.raises(Killed):
        train(config, tmp_path / "parts", watch=kill_after(7))
    (before,) = (tmp_path / "parts" / "checkpoints").iterdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"could not be written.*step-00000006 is intact"):
            train(config, tmp_path / "parts")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "parts" / "checkpoints").iterdir()) == [before]
    train(config, tmp_path / "whole")
    train(config, tmp_path / "parts")
    assert same(tmp_path / "parts", tmp_path / "whole")


def test_a_broken_checkpoint_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(recipe(), tmp_path, watch=kill_after(7))
    (last,) = (tmp_path / "checkpoints").iterdir()
    (last / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(recipe(), tmp_path)


def test_nan_names_and_saves_the_batch(tmp_path: Path) -> None:
    config = recipe(optim={"lr": 1e30, "name": "sgd", "warmup_epochs": 0})
    with pytest.raises(TrainingError, match=r"the loss of step \d+ is .*digit \d+.*finite"):
        train(config, tmp_path)
    saved = load_file(tmp_path / "bad-batch-0.safetensors")
    assert saved["images"].shape == (16, 3, 8, 8) and saved["labels"].shape == (16,)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"batch_size": 200}, DataError, "fewer than one batch of 200"),
        ({"model": {"args": {"num_classes": 5}}}, DataError, "the head has 5 classes"),
        ({"model": {"args": {"num_classes": 0}}}, SettingsError, "no classification head"),
        ({"model": {"args": {"detph": 3}}}, transom.errors.HostError, "does not take .*detph"),
        ({"optim": {"name": "adamx"}}, SettingsError, "optim.name is 'adamx'"),
        ({"optim": {"warmup_epochs": 9}}, SettingsError, "expected a shorter warm-up"),
        ({"method": {"name": "evti"}}, SettingsError, "did you mean 'evit'"),
        (
            {"method": {"name": "evit", "training": {"strat": 0.1}}},
            SettingsError,
            "it has start and end",
        ),
        (
            {"method": {"name": "tome", "training": {"start": 0.1}}},
            SettingsError,
            "tome adds nothing to training",
        ),
        ({"precision": "fp16", "device": "cpu"}, SettingsError, "fp16"),
    ],
)
def test_what_cannot_be_trained(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    if "model" in changes:
        size = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 4, "num_heads": 2}
        changes = {"model": {"args": {**size, **changes["model"]["args"]}}}
    with pytest.raises(error, match=says):
        train(recipe(**changes), tmp_path)


def test_the_keep_rate_falls_and_ends_at_its_own(tmp_path: Path) -> None:
    method = {"name": "evit", "settings": {"keep_rate": 0.5}, "training": {"end": 0.5}}
    training = EViT(keep_rate=0.5).training(end=0.5)
    host = nn.Identity()
    rates = [training.at_step(host, step, 12)["override"] for step in range(13)]
    assert rates[0] == 1.0 and rates[6:] == [0.5] * 7
    assert all(a > b for a, b in pairwise(rates[:7]))
    done = train(recipe(method=method, ema=0.9), tmp_path)
    (fitting,) = transom.fittings(done.model)
    assert fitting.method.settings()["override"] == 0.5
    with transom.trace(done.model) as trace:
        done.model(torch.zeros(1, 3, 8, 8))
    assert trace.lengths[-1] == 1 + 2  # 16 patches, three times halved


def test_a_fine_tuned_fitting_is_loaded_again(tmp_path: Path) -> None:
    config = recipe(epochs=1, method={"name": "evit"})
    done = train(config, tmp_path)
    model = build_model(config.model)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    transom.load(model, tmp_path / "fitting.safetensors")
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(model.eval()(x), done.model(x))


def test_a_method_adds_its_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pull(Training):
        def extra_loss(self, model: nn.Module, outputs: Tensor) -> Tensor:
            assert transom.fittings(model)
            return 100 * outputs.square().mean()

    train(recipe(method={"name": "evit"}), tmp_path / "without")
    monkeypatch.setattr(EViT, "training", lambda self: Pull())
    train(recipe(method={"name": "evit"}), tmp_path / "with")
    with_it, without = (float(curve(tmp_path / n)[0][1]) for n in ("with", "without"))
    assert with_it > without + 0.1


def test_the_teacher_is_the_plain_host(tmp_path: Path) -> None:
    """A student that is its own teacher, unmixed and undropped, has nothing to learn from it."""
    size = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 4, "num_heads": 2}
    plain = {"model": {"args": {**size, "num_classes": 10}}, "distil": {"weight": 1.0}}
    train(recipe(**plain), tmp_path / "plain")
    assert abs(float(curve(tmp_path / "plain")[0][1])) < 1e-6
    train(recipe(**plain, method={"name": "evit"}), tmp_path / "fitted")
    assert abs(float(curve(tmp_path / "fitted")[-1][1])) > 1e-6


def test_divergence_against_the_definition() -> None:
    student, teacher = torch.randn(3, 5, dtype=torch.double), torch.randn(3, 5, dtype=torch.double)
    p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
    expected = 4 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(divergence(student, teacher, 2.0), expected)


def test_accumulated_batches_make_the_step_of_a_large_one(tmp_path: Path) -> None:
    size = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 4, "num_heads": 2}
    model = {"args": {**size, "num_classes": 10}}
    train(recipe(epochs=1, model=model, batch_size=32), tmp_path / "large")
    train(recipe(epochs=1, model=model, batch_size=8, accumulate=4), tmp_path / "small")
    large, small = ([float(loss) for _, loss in curve(tmp_path / n)] for n in ("large", "small"))
    assert small == pytest.approx(large, rel=1e-4)


def test_layer_decay_warm_up_and_logs(tmp_path: Path) -> None:
    config = recipe(optim={"layer_decay": 0.5, "warmup_epochs": 1, "lr": 1e-2, "min_lr": 0.0})
    train(config, tmp_path)
    with (tmp_path / "steps.csv").open() as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert rates[:6] == sorted(rates[:6]) and rates[6:] == sorted(rates[6:], reverse=True)
    assert rates[6] == pytest.approx(1e-2)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["steps"] == 12 and result["train_images"] == 96
    assert sum(map(sum, result["confusion"])) == result["test_images"]
    with (tmp_path / "tests.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]


def test_bfloat16_learns(tmp_path: Path) -> None:
    config = recipe(precision="bf16", epochs=4, method={"name": "evit"})
    done = train(config, tmp_path)
    losses = [float(loss) for _, loss in curve(tmp_path)]
    assert losses[-1] < losses[0]
    assert next(done.model.parameters()).dtype == torch.float32
    x = torch.rand(2, 3, 8, 8)
    plain = build_model(config.model)
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"))
    transom.load(plain, tmp_path / "fitting.safetensors")
    assert torch.equal(done.model(x), plain.eval()(x)), "what is handed out computes in fp32"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_average_is_a_model_of_its_own(tmp_path: Path, precision: str) -> None:
    """Its forward is its own too, where mixed precision wraps that of the model."""
    slow = {"ema": 0.99, "method": {"name": "evit"}, "precision": precision}
    done = train(recipe(**slow, optim={"lr": 0.1, "name": "sgd"}), tmp_path)
    x = torch.rand(4, 3, 8, 8)
    after = load_file(tmp_path / "checkpoints" / "step-00000012" / "model.safetensors")
    assert not torch.allclose(after["head.weight"], done.model.get_parameter("head.weight"))
    assert done.model(x).dtype == torch.float32
    same = build_model(recipe().model)
    same.load_state_dict(load_file(tmp_path / "model.safetensors"))
    transom.load(same, tmp_path / "fitting.safetensors")
    assert torch.equal(done.model(x), same.eval()(x))


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run(tmp_path: Path) -> None:
    size = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = {"args": {**size, "num_classes": 10}}
    train(recipe(epochs=1, model=model), tmp_path / "eager")
    done = train(recipe(epochs=1, model=model, compile=True), tmp_path / "compiled")
    eager, compiled = (
        [float(loss) for _, loss in curve(tmp_path / n)] for n in ("eager", "compiled")
    )
    assert compiled == pytest.approx(eager, rel=1e-4)
    assert all("_orig_mod" not in n for n in load_file(done.out / "model.safetensors"))
