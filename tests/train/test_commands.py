"""`transom train` as it is typed, and several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from transom import cli

from .conftest import TINY, recipe


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["transom", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code or 0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(TINY))  # JSON is YAML
    return path


def test_train_writes_logs_and_weights(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    path: Path,
) -> None:
    out = tmp_path / "out"
    assert run(monkeypatch, "train", str(path), "epochs=1", "--out", str(out)) == 0
    captured = capsys.readouterr()
    assert "of 40 test images" in captured.out
    assert "epoch 1/1  test" in captured.err and "images/s" in captured.err
    names = {p.name for p in out.iterdir()}
    assert {"model.safetensors", "steps.csv", "tests.csv", "result.json", "recipe.json"} <= names
    assert run(monkeypatch, "train", str(path), "epochs=2", "--out", str(out)) == 1
    assert "differs in ['epochs']" in " ".join(capsys.readouterr().err.split())
    assert run(monkeypatch, "train", str(path), "epochs=2", "--out", str(out), "--fresh") == 0


def test_a_misspelt_key_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: Path
) -> None:
    assert run(monkeypatch, "train", str(path), "optim.weight_dacay=1") == 1
    text = " ".join(capsys.readouterr().err.split())
    assert "did you mean 'optim.weight_decay'" in text and "Traceback" not in text


def test_tensorboard_has_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from transom.train import train

    train(recipe(epochs=1), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 7))
    assert len(events.Scalars("test/accuracy")) == 1


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path: Path, path: Path) -> None:
    """Two processes with batches of 8 make the steps of one with batches of 16."""
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += ["-m", "transom.cli"]
    plain = "model.args.drop_path_rate=0"
    words = ["train", str(path), plain, "device=cpu", "--out"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", *launch, *words, str(tmp_path / "two"), "batch_size=8"],
        check=True,
        env=env,
        timeout=300,
    )
    subprocess.run(
        [sys.executable, "-m", "transom.cli", *words, str(tmp_path / "one")],
        check=True,
        env=env,
        timeout=300,
    )
    one, two = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("one", "two"))
    assert one["steps"] == two["steps"] == 12
    assert two["loss"] == pytest.approx(one["loss"], rel=0.02)
    assert two["test_images"] == one["test_images"]


@pytest.mark.slow
def test_processes_that_do_not_find_each_other(tmp_path: Path, path: Path) -> None:
    """Without a GPU accelerate makes no group of them, and two runs would write one folder."""
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", *launch, "-m", "transom.cli", "train", str(path), "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert "2 processes were launched, but each would train alone" in done.stderr
    assert not out.exists()
