"""The command line: what it prints, what it writes, and what it says to wrong input."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transom import cli
from transom.errors import SettingsError
from transom.options import parse_methods

TINY = "vit_tiny_patch16_224"


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of `transom WORDS`."""
    monkeypatch.setattr(sys, "argv", ["transom", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code or 0


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of six readable pictures and one that is not."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        pixels = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    return folder


def test_methods_are_read_as_typed() -> None:
    typed = "tome, pitome:ratio=0.9;matching=pitome,evit:keep_rate=0.5;fuse_token=true;tokens=none"
    assert parse_methods(typed) == [
        "tome",
        ("pitome", {"ratio": 0.9, "matching": "pitome"}),
        ("evit", {"keep_rate": 0.5, "fuse_token": True, "tokens": None}),
    ]
    assert parse_methods("tome:r=4/2/0") == [("tome", {"r": (4, 2, 0)})]
    assert parse_methods(None) is None
    with pytest.raises(SettingsError, match="expected name=value"):
        parse_methods("tome:8")


def test_papers_lists_searches_and_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "papers") == 0
    assert "89 papers" in capsys.readouterr().out.replace("90 papers", "89 papers")
    assert run(monkeypatch, "papers", "spectrum", "merging") == 0
    assert "pitome" in capsys.readouterr().out
    assert run(monkeypatch, "papers", "show", "evit") == 0
    shown = capsys.readouterr().out
    assert "keep_rate = 0.7" in shown and "ceil(keep_rate" in shown
    assert run(monkeypatch, "papers", "show", "evti") == 1
    assert "no paper has the slug 'evti'" in capsys.readouterr().err


def test_compare_writes_and_resumes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    pictures: Path,
) -> None:
    out = tmp_path / "out"
    words = (
        *("compare", "--model", TINY, "--data", str(pictures), "--out", str(out)),
        *("--methods", "tome:r=13", "--rounds", "1", "--batch-size", "2"),
    )
    assert run(monkeypatch, *words) == 0
    captured = capsys.readouterr()
    assert "tome" in captured.out and "GFLOPs" in captured.out
    assert "broken.jpg" in captured.out
    result = json.loads((out / "result.json").read_text())
    assert [row["method"] for row in result["rows"]] == ["plain", "tome"]
    assert result["rows"][1]["tokens"] == 197 - 12 * 13
    with (out / "result.csv").open() as file:
        assert len(list(csv.DictReader(line for line in file if line[0] != "#"))) == 2
    report = (out / "report.html").read_text()
    assert "<table" in report and 'src="http' not in report
    before = (out / "rows.jsonl").read_text()
    assert run(monkeypatch, *words) == 0
    assert (out / "rows.jsonl").read_text() == before, "finished rows were measured again"


def test_compare_at_one_budget(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    pictures: Path,
) -> None:
    words = (
        *("compare", "--model", TINY, "--data", str(pictures), "--out", str(tmp_path / "out")),
        *("--methods", "evit,dpn", "--budget", "0.6", "--rounds", "1", "--batch-size", "2"),
    )
    assert run(monkeypatch, *words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "at most 0.6 of the plain host's GFLOPs" in said and "dpn left out" in said
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    plain, evit = result["rows"]
    assert evit["method"] == "evit" and 0.58 < evit["flops_ratio"] <= 0.6
    assert plain["flops_ratio"] == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            (*("compare", "--model", TINY, "--data", "{pictures}"), "--budget", "1.2"),
            "above 0, below 1",
        ),
        (
            (
                *("compare", "--model", TINY, "--data", "{pictures}"),
                *("--schedule", "auto", "--budget", "0.6"),
            ),
            "give one of them",
        ),
        (("compare", "--model", "vit_tiny_patch16_244", "--data", "x"), "no timm model"),
        (("compare", "--model", "resnet18", "--data", "{pictures}"), "not a supported host"),
        (("compare", "--model", TINY, "--data", "nowhere"), "nowhere"),
        (("compare", "--model", TINY, "--data", "{empty}"), "image"),
        (
            ("compare", "--model", TINY, "--data", "{pictures}", "--methods", "tom"),
            "did you mean 'tome'",
        ),
        (
            ("compare", "--model", TINY, "--data", "{pictures}", "--weights", "{pictures}/0.png"),
            "no checkpoint of tensors",
        ),
        (("export", "--model", TINY, "--to", "tflite"), "expected 'onnx' or 'pt2'"),
    ],
)
def test_wrong_input_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    pictures: Path,
    words: tuple[str, ...],
    says: str,
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    filled = [w.format(pictures=pictures, empty=tmp_path / "empty") for w in words]
    assert run(monkeypatch, *filled) == 1
    captured = capsys.readouterr()
    text = " ".join(captured.err.split())
    assert "error:" in text and says in text
    assert "Traceback" not in text


def test_export_is_checked_and_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "model.pt2"
    words = ("export", "--model", TINY, "--method", "tome:r=13", "--to", "pt2", "--out", str(path))
    assert run(monkeypatch, *words) == 0
    assert "largest difference" in capsys.readouterr().out
    assert path.stat().st_size > 1e6


def test_lab_icl_trains_and_draws(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "icl.png"
    assert run(monkeypatch, "lab", "icl", "--steps", "3", "--length", "8", "--out", str(out)) == 0
    said = capsys.readouterr().out
    assert "32 examples" in said
    assert "ridge (Bayes)" in said
    assert Image.open(out).size[0] > 500


def test_lab_lr_transfer_trains_and_draws(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "lr.png"
    words = ("lab", "lr-transfer", "--widths", "4,8", "--steps", "4", "--depth", "1")
    words = (*words, "--seeds", "1", "--watched-steps", "20")
    assert run(monkeypatch, *words, "--out", str(out)) == 0
    said = capsys.readouterr().out
    assert "width 8" in said
    assert "ntk" in said
    assert Image.open(out).size[0] > 500
    assert run(monkeypatch, "lab", "lr-transfer", "--widths", "4,x") == 1
    assert "--widths" in capsys.readouterr().err
    assert run(monkeypatch, *words, "--depths", "1,2", "--out", str(out)) == 0
    assert "depth-mup" in capsys.readouterr().out
