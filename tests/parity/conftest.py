"""Finds the golden cases: files with input, parameters and output of official implementations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .golden import Golden

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared" / "papers"
RECORD = HERE.parents[1] / "src" / "transom" / "data" / "parity.json"
OUTCOMES = pytest.StashKey[dict[str, dict[str, int]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--goldens",
        action="append",
        metavar="DIR",
        help="folder with golden cases (default: those of the project, and ../shared/papers)",
    )
    parser.addoption(
        "--record",
        action="store_true",
        help="write the outcome of every paper's golden cases to src/transom/data/parity.json",
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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    golden = getattr(item, "callspec", None) and item.callspec.params.get("golden")
    if golden and report.when == "call" and item.config.getoption("--record"):
        seen = item.config.stash.setdefault(OUTCOMES, {})
        counts = seen.setdefault(golden.slug, {"passed": 0, "failed": 0})
        if report.outcome in counts:  # a skipped case is one that is not implemented
            counts[report.outcome] += 1
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    seen = session.config.stash.get(OUTCOMES, None)
    if seen is not None:
        ran = {slug: counts for slug, counts in sorted(seen.items()) if any(counts.values())}
        lines = ",\n".join(f"  {json.dumps(slug)}: {json.dumps(c)}" for slug, c in ran.items())
        RECORD.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
