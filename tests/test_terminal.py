"""Where the commands print, and how wide."""

from __future__ import annotations

import pytest

from transom.terminal import UNBROKEN, console, errors


def test_a_pipe_breaks_no_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    words = " ".join(["word"] * 38)  # 189 characters
    console().print(words)
    errors().print(words)
    told = capsys.readouterr()
    assert told.out == told.err == f"{words}\n"
    assert console().width == UNBROKEN


def test_columns_count_at_each_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (60, 140):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert console().width == errors().width == columns
        assert console(at_least=120).width == max(columns, 120)
