"""Finds the golden cases: files with input, parameters and output of official implementations."""

from __future__ import annotations

from pathlib import Path

import pytest

from .golden import Golden

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared" / "papers"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--goldens",
        action="append",
        metavar="DIR",
        help="folder with golden cases (default: those of the project, and ../shared/papers)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden" not in metafunc.fixturenames:
        return
    given = metafunc.config.getoption("--goldens")
    folders = [Path(folder) for folder in given] if given else [HERE / "goldens", SHARED]
    for folder in folders:
        if given and not folder.is_dir():
            raise pytest.UsageError(f"--goldens {folder} is not a folder")
    cases: dict[str, Golden] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.safetensors")):
            golden = Golden.open(path)
            cases.setdefault(golden.name, golden)
    metafunc.parametrize("golden", [pytest.param(g, id=name) for name, g in cases.items()])
