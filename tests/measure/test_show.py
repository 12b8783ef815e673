"""Showing a comparison: table, data frame, CSV, plot, report. On made-up rows."""

from __future__ import annotations

import builtins
import csv
import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from transom import parity
from transom.errors import DataError, TransomError
from transom.measure import Comparison, Picture, Row, Section
from transom.measure.plot import front
from transom.measure.report import render


def row(method: str, speed: float, cosine: float, **settings: Any) -> Row:
    plain = method == "plain"
    return Row(
        method=method, settings=settings, tokens=101, lengths=(150, 101), gflops=4.0 / speed,
        flops_ratio=1 / speed, ms=(9.0, 10.0, 12.0), speedup=(speed * 0.9, speed, speed * 1.1),
        limit=speed * 1.2, over_twin=None if plain else (1.0, 1.05, 1.1), memory_mib=34.56,
        quality={"cosine": cosine, "mean absolute difference": 1 - cosine},
        control={} if plain else {"cosine": cosine - 0.1, "mean absolute difference": 0.2},
        rounds=7, batch_size=8,
    )  # fmt: skip


@pytest.fixture
def comparison() -> Comparison:
    rows = [
        row("plain", 1.0, 1.0),
        row("tome", 1.2, 0.99, r=4),
        row("tome", 1.5, 0.95, r=8),
        row("evit", 1.4, 0.94, keep_rate=0.7),
        row("random", 1.9, 0.80, keep_rate=0.5),
    ]
    environment: dict[str, str | int | float] = {
        "model": "tiny", "device": "cpu", "images": 12, "command": "transom compare --model tiny",
    }  # fmt: skip
    skipped = [("pitome", "it needs <what> the host lacks")]
    return Comparison(rows, environment, skipped, [("a.jpg", "broken")])


def test_the_table_fits_120_columns(comparison: Comparison) -> None:
    console = Console(width=120, color_system=None)
    with console.capture() as captured:
        console.print(comparison.table())
    text = captured.get()
    assert "…" not in text
    for word in ("GFLOPs", "speed-up", "limit", "÷ twin", "MiB", "keep_rate=0.7", "1.50×", "±15%"):
        assert word in text
    assert "noise of a speed-up ±10.0%" in text and "pitome left out" in text
    assert "images skipped as unreadable: 1 (a.jpg)" in text
    assert max(map(len, str(comparison).splitlines())) <= 120


def test_numbers_keep_three_digits() -> None:
    small = dataclasses.replace(row("tome", 1.0, 1.0), gflops=0.00904)
    assert "0.00904" in str(Comparison([small], {}))


def test_long_settings_are_shortened() -> None:
    assert row("tome", 1, 1, r=tuple(range(12))).label == "r=(0, 1, …, 11)"


def test_csv_and_data_frame(comparison: Comparison, tmp_path: Path) -> None:
    with comparison.to_csv(tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [r["method"] for r in rows] == ["plain", "tome", "tome", "evit", "random"]
    assert float(rows[1]["speedup"]) == 1.2 and rows[0]["time_over_twin"] == ""
    assert float(rows[1]["cosine (random)"]) == pytest.approx(0.89)
    pytest.importorskip("pandas")
    frame = comparison.to_dataframe()
    assert list(frame.columns) == list(rows[0]) and len(frame) == 5
    with pytest.raises(DataError, match="no row was measured"):
        Comparison([], {}).to_csv(tmp_path / "none.csv")


def test_without_pandas_the_way_out_is_named(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "pandas":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TransomError, match="pip install pandas"):
        comparison.to_dataframe()


def test_the_front_is_what_nothing_else_beats(comparison: Comparison) -> None:
    best = [(r.method, r.speedup[1]) for r in front(comparison.rows, "cosine")]
    assert best == [("plain", 1.0), ("tome", 1.2), ("tome", 1.5)]  # the control is no candidate
    lower = [(r.method, r.speedup[1]) for r in front(comparison.rows, "mean absolute difference")]
    assert lower == best


@pytest.mark.parametrize("y", [None, "mean absolute difference"])
@pytest.mark.parametrize("dark", [False, True])
def test_plot(comparison: Comparison, tmp_path: Path, y: str | None, dark: bool) -> None:
    path = tmp_path / "plots" / "pareto.png"
    figure = comparison.plot(path, y, dark=dark)
    axes = figure.axes[0]
    assert "speed-up" in axes.get_xlabel() and (y or "cosine") in axes.get_ylabel()
    assert axes.yaxis_inverted() == (y is not None)
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("L"), dtype=float)
    assert pixels.shape[1] > 1000 and pixels.std() > 10
    assert (pixels.mean() < 100) == dark


def test_a_plot_of_nothing_is_refused(comparison: Comparison) -> None:
    with pytest.raises(DataError, match=r"'top-1' to plot; measured are \['cosine'"):
        comparison.plot(y="top-1")
    with pytest.raises(DataError, match="no row has a measure None"):
        Comparison([], {}).plot()


def test_the_report_needs_nothing_else(comparison: Comparison, tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    figure = comparison.plot()
    section = Section(
        "cat <1>", "one photograph",
        [Picture(pixels, "plain"), Picture(Image.fromarray(pixels), "tome", photo=True),
         Picture(figure, "figure")],
    )  # fmt: skip
    path = comparison.save(tmp_path / "out" / "report.html", title="Mine", sections=[section])
    text = path.read_text(encoding="utf-8")
    assert not list(path.parent.glob("*.part"))
    addresses = re.findall(r'(?:src|srcset|href)="([^"]{0,30})', text)
    assert addresses and all(address.startswith("data:image/") for address in addresses)
    assert not re.search(r"@import|url\(|<link", text)
    assert "<title>Mine</title>" in text and "cat &lt;1&gt;" in text
    assert "transom compare --model tiny" in text
    assert "it needs &lt;what&gt; the host lacks" in text
    assert text.count("<tr") == 1 + len(comparison.rows)
    assert "prefers-color-scheme: dark" in text and "interrupted" not in text


def test_the_report_is_the_same_for_the_same_rows(comparison: Comparison) -> None:
    assert render(comparison) == render(comparison)


def test_the_report_of_an_interrupted_run(comparison: Comparison) -> None:
    comparison.interrupted = True
    comparison.rows = comparison.rows[:1]
    assert "rows are missing" in render(comparison)
    comparison.rows = []
    assert "No row was measured" in render(comparison)


def test_what_is_no_picture_is_named(comparison: Comparison) -> None:
    for image, message in [(np.zeros((2, 2)), "float64"), ("cat.png", "is a str")]:
        with pytest.raises(DataError, match=message):
            render(comparison, sections=[Section("x", images=[Picture(image, "cat")])])


def test_no_speed_is_shown_while_parity_fails(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "1.40×" in str(comparison)
    monkeypatch.setattr(parity, "parity", lambda: {"evit": parity.Parity(passed=5, failed=1)})
    text = str(comparison)
    assert "1.40×" not in text and "1.50×" in text
    assert "no speed is shown while parity fails: evit" in text
