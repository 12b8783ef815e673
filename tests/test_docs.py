"""The documentation is true: its Python runs, its generated parts are current, its links exist.

Blocks of one page run in order and share their names, in an empty folder. A block is left out
when the line above it is `<!-- skip: REASON -->`.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from transom import docs
from transom.errors import TransomError

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    path
    for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))
    if path.name != "CHANGELOG.md"
]
# Added by hand from a run of the demo.
PICTURES = {"docs/images/demo.png"}


@dataclass(frozen=True)
class Block:
    """One fenced block of Python; `line` is where its code begins, counted from 0."""

    code: str
    line: int
    skip: str


def blocks(text: str) -> Iterator[Block]:
    lines = text.split("\n")
    i = 0
    while i < len(lines):
        fence = re.match(r"^(\s*)```(\w*)\s*$", lines[i])
        if not fence:
            i += 1
            continue
        end = next(j for j in range(i + 1, len(lines)) if lines[j].strip() == "```")
        if fence[2] == "python":
            skip = re.match(r"^\s*<!-- skip: (.+) -->$", lines[i - 1])
            code = "\n".join(line[len(fence[1]) :] for line in lines[i + 1 : end])
            yield Block(code, i + 1, skip[1] if skip else "")
        i = end + 1


def has_code(path: Path) -> bool:
    return any(not block.skip for block in blocks(path.read_text(encoding="utf-8")))


def page(path: Path) -> Any:
    measures = "transom.compare(" in path.read_text(encoding="utf-8")
    marks = [pytest.mark.slow] if measures else []
    return pytest.param(path, id=str(path.relative_to(ROOT)), marks=marks)


@pytest.mark.parametrize("path", [page(path) for path in PAGES if has_code(path)])
def test_python_of_the_page_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # A module of its own: dataclasses look theirs up by name.
    module = types.ModuleType("docs_page")
    monkeypatch.setitem(sys.modules, "docs_page", module)
    for block in blocks(path.read_text(encoding="utf-8")):
        if not block.skip:
            # Blank lines in front keep the page's line numbers in a traceback.
            exec(compile("\n" * block.line + block.code, str(path), "exec"), vars(module))


def test_blocks_are_found_and_skipped() -> None:
    text = "a\n```python\nx = 1\n```\n<!-- skip: hub -->\n```python\ny\n```\n```sh\nls\n```\n"
    assert list(blocks(text)) == [Block("x = 1", 2, ""), Block("y", 6, "hub")]


def test_generated_parts_are_current() -> None:
    names = [str(path.relative_to(ROOT)) for path in docs.stale(ROOT)]
    assert not names, f"run `python -m transom.docs`; stale: {names}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_inside_the_repository_exist(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            continue
        there = (path.parent / target.split("#")[0]).resolve()
        assert there.exists() or str(there.relative_to(ROOT)) in PICTURES, target


@pytest.mark.parametrize("name", ["demo", "test"])
def test_the_readme_holds_the_commands_that_ci_runs(name: str) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    part = re.search(rf"<!-- command:{name} -->\n(.*?)<!-- /command -->", text, re.DOTALL)
    assert part is not None
    lines = [line for line in part[1].split("\n") if line.strip() and not line.startswith("```")]
    assert len(lines) == 1
    assert lines[0].startswith("pip install -e '.[")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "docs" / "papers").mkdir(parents=True)
    (tmp_path / "README.md").write_text("a\n<!-- generated:papers-in -->\n<!-- /generated -->\nb\n")
    return tmp_path


def test_writing_makes_current_and_changes_nothing_twice(checkout: Path) -> None:
    assert checkout / "README.md" in docs.stale(checkout)
    assert docs.write(checkout)
    assert not docs.stale(checkout)
    assert not docs.write(checkout)
    text = (checkout / "README.md").read_text()
    assert text.startswith("a\n<!-- generated")
    assert text.endswith("<!-- /generated -->\nb\n")
    assert "[`tome`](docs/papers/tome.md)" in text
    assert (checkout / "docs" / "papers" / "tome.md").read_text().count("\n# ToMe\n") == 1


def test_check_names_the_stale_file_and_leaves_it(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (checkout / "README.md").read_text()
    assert docs.main(["--check", "--root", str(checkout)]) == 1
    assert "stale: README.md" in capsys.readouterr().out
    assert (checkout / "README.md").read_text() == before
    assert docs.main(["--root", str(checkout)]) == 0
    assert docs.main(["--check", "--root", str(checkout)]) == 0


def test_the_page_of_a_paper_that_no_longer_works_is_removed(checkout: Path) -> None:
    docs.write(checkout)
    orphan = checkout / "docs" / "papers" / "gone.md"
    orphan.write_text("old")
    assert docs.stale(checkout) == [orphan]
    docs.write(checkout)
    assert not orphan.exists()


def test_an_unknown_part_is_an_error(checkout: Path) -> None:
    (checkout / "README.md").write_text("<!-- generated:zebra -->\n<!-- /generated -->\n")
    with pytest.raises(TransomError, match=r"asks for the generated part 'zebra'; known are"):
        docs.build(checkout)
    assert docs.main(["--root", str(checkout)]) == 2
