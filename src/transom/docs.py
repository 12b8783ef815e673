"""Keeps the generated parts of the documentation current.

    python -m transom.docs            rewrite what is stale
    python -m transom.docs --check    change nothing; name what is stale and exit with 1

Two things are generated, from the registry, the cards and the measured results: what stands
between `<!-- generated:NAME -->` and `<!-- /generated -->` in README.md and docs/, and one page
docs/papers/SLUG.md for every paper that works.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console

from transom import hosts, registry
from transom.cards import Card, Code, load_cards
from transom.errors import TransomError
from transom.gallery.results import results
from transom.parity import parity

_PART = re.compile(
    r"(?P<open><!-- generated:(?P<name>[\w-]+) -->)\n(?P<body>.*?)(?P<close><!-- /generated -->)",
    re.DOTALL,
)


def build(root: Path) -> dict[Path, str]:
    """What every documentation file with a generated part should hold.

    Args:
        root: of the repository, where README.md and docs/ are.

    Raises:
        TransomError: a file asks for a part that does not exist.
    """
    wanted = {}
    papers = root / "docs" / "papers"
    for path in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        if path.parent != papers and path.is_file():
            text = path.read_text(encoding="utf-8")
            if _PART.search(text):
                wanted[path] = _filled(path, text)
    for each in _working():
        wanted[papers / f"{each.slug}.md"] = page(each)
    return wanted


def stale(root: Path) -> list[Path]:
    """Files whose generated parts are not current, pages that should not exist included."""
    wanted = build(root)
    wrong = [
        path
        for path, text in wanted.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    return wrong + [page for page in _pages(root) if page not in wanted]


def write(root: Path) -> list[Path]:
    """Make every generated part current; returns the files that changed."""
    changed = stale(root)
    wanted = build(root)
    for path in changed:
        if path in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
        else:
            path.unlink()
    return changed


def page(card: Card) -> str:
    """The page of one paper that works: its facts, its settings, its room's own words."""
    room = registry.rooms()[card.slug]
    words = inspect.cleandoc(room.module.__doc__ or "")
    year = str(card.year)
    when = card.venue if card.venue and year in card.venue else f"{card.venue}, first {year}"
    facts = [
        ("paper", f"{card.title} ({when if card.venue else year})"),
        ("family", card.family),
        ("kind", card.kind),
        ("authors' code", _code(card)),
        ("links", " ".join(f"<{link}>" for link in card.links)),
        ("parity", str(parity().get(card.slug, "no golden case exists"))),
        ("works here as", ", ".join(room.kinds)),
        ("room", f"`{room.module.__name__}`"),
    ]
    return "\n".join(
        [
            "<!-- made by `python -m transom.docs`: change the room or the card, not this page -->",
            f"# {card.name}",
            "",
            *_table(["", ""], [fact for fact in facts if fact[1]]),
            "",
            *_sections(room),
            "## From its room",
            "",
            "```text",
            words,
            "```",
            "",
        ]
    )


def _sections(room: registry.Room) -> list[str]:
    """What there is to use: settings of the method, backbones, everything else."""
    lines: list[str] = []
    if room.method is not None:
        lines += ["## Settings", "", *_settings(room.method), ""]
    if room.backbones:
        rows = [
            (f"`{b.name}`", str(b.size), _figure(b.params), _figure(b.gmacs))
            for b in room.backbones
        ]
        heads = ["timm model", "image", "parameters in millions", "GMACs"]
        lines += ["## Backbones", "", "Figures as published.", "", *_table(heads, rows), ""]
    if room.offers:
        others = [(f"`{o.name}`", str(o.kind), _where(o.build)) for o in room.offers]
        lines += ["## Also here", "", *_table(["name", "kind", "from"], others), ""]
    return lines


def _figure(published: float | None) -> str:
    return "" if published is None else f"{published:g}"


def _where(build: Callable[..., object]) -> str:
    return f"`{build.__module__}.{getattr(build, '__qualname__', type(build).__name__)}`"


def settings_of(method: type) -> list[tuple[str, str, str, str]]:
    """Name, type, default and meaning of every setting; in Markdown."""
    meanings = _meanings(method)
    return [
        (f"`{field.name}`", f"`{field.type}`", _default(field), meanings.get(field.name, ""))
        for field in dataclasses.fields(method)
        if field.init
    ]


def _settings(method: type) -> list[str]:
    rows = settings_of(method)
    example = f"from {method.__module__} import {method.__name__}"
    if all(row[2] for row in rows):
        values = "".join(f"    {row[0].strip('`')}={row[2].strip('`')},\n" for row in rows)
        call = f"(\n{values})" if rows else "()"
        example += f"\n\nmethod = {method.__name__}{call}  # the defaults"
    code = ["```python", *example.split("\n"), "```"]
    if not rows:
        return [*code, "", "It has no settings."]
    return [*code, "", *_table(["setting", "type", "default", "meaning"], rows)]


def _default(field: dataclasses.Field[object]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return ""
    # As the formatter writes it, so that the page's code passes the same checks as the rest.
    return f"`{_literal(value)}`"


def _literal(value: object) -> str:
    """A value in Python, with double quotes."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple) and value:
        return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


def _meanings(method: type) -> dict[str, str]:
    """What the class docstring says about each field under `Attributes:` or `Args:`."""
    lines = inspect.cleandoc(method.__doc__ or "").split("\n")
    heads = [i for i, line in enumerate(lines) if line.strip() in ("Attributes:", "Args:")]
    if not heads:
        return {}
    section: list[str] = []
    for line in lines[heads[0] + 1 :]:
        if line and not line.startswith(" "):
            break
        section.append(line)
    meanings: dict[str, str] = {}
    name = ""
    for line in textwrap.dedent("\n".join(section)).split("\n"):
        entry = re.match(r"(\w+)(?: \([^)]*\))?: (.*)", line)
        if entry:
            name = entry[1]
            meanings[name] = entry[2].strip()
        elif name and line.strip():
            meanings[name] += " " + line.strip()
    return meanings


def _working() -> list[Card]:
    rooms = registry.rooms()
    return [card for card in load_cards().values() if card.slug in rooms]


def _coming() -> list[Card]:
    rooms = registry.rooms()
    return [card for card in load_cards().values() if card.slug not in rooms]


def _papers_in() -> list[str]:
    rooms, records = registry.rooms(), parity()
    rows = []
    for card in _working():
        record = records.get(card.slug)
        golden = f"{record.passed} / {record.passed + record.failed}" if record else ""
        link = f"[`{card.slug}`](docs/papers/{card.slug}.md)"
        kinds = ", ".join(rooms[card.slug].kinds)
        rows.append((link, card.title, card.family, str(card.year), kinds, golden))
    return _table(["slug", "paper", "family", "year", "works as", "parity"], rows)


def _papers_coming() -> list[str]:
    cards = sorted(_coming(), key=lambda card: (card.family, card.slug))
    rows = [
        (f"`{card.slug}`", card.title, card.family, str(card.year), card.kind) for card in cards
    ]
    return _table(["slug", "paper", "family", "year", "kind"], rows)


def _papers_count() -> list[str]:
    listed = [card for card in load_cards().values() if not card.anchor]
    working = [card for card in _working() if not card.anchor]
    anchors = [f"`{card.slug}`" for card in _working() if card.anchor]
    more = f", and {', '.join(anchors)}, which they are compared with" if anchors else ""
    return [f"{len(working)} of the {len(listed)} papers of the list work today{more}."]


def _baselines() -> list[str]:
    rows = []
    for slug, method in registry.methods().items():
        if slug not in load_cards():
            says = inspect.cleandoc(method.__doc__ or "").split("\n\n")[0].replace("\n", " ")
            rows.append((f"`{slug}`", says))
    return _table(["slug", "what it does"], rows)


def _hosts() -> list[str]:
    rows = []
    for adapter in hosts.ADAPTERS:
        first, _, rest = inspect.cleandoc(adapter.__doc__ or "").partition("\n\n")
        second = re.split(r"(?<=\.)\s", rest)[0]
        rows.append((f"`{adapter.__name__}`", f"{first} {second}".replace("\n", " ").strip()))
    return _table(["adapter", "models"], rows)


def _host_fields() -> list[str]:
    rows = [(f"`{name}`", says) for name, says in _meanings(hosts.Host).items()]
    return _table(["field", "what it is"], rows)


def _speeds() -> list[str]:
    """Token methods on one host: what they gain, and what the FLOPs would allow."""
    found = results()["token_reduction"]
    host, shown = "ViT-B/16", ("evit", "tome", "pitome", "crossget")
    own = [row for row in found.rows if row["host"] == host]
    gains = {(row["method"], row["settings"], row["batch_size"]): row["speedup"] for row in own}
    rows = []
    for row in own:
        if row["method"] not in shown or row["batch_size"] != "8":
            continue
        each = [float(gains[row["method"], row["settings"], size]) for size in ("1", "8")]
        rows.append(
            (
                f"`{row['method']}`",
                row["settings"],
                row["tokens"],
                f"{float(row['gflops']):.1f}",
                f"{float(row['speedup_limit']):.2f}×",
                *(f"{gain:.2f}×" for gain in each),
            )
        )
    facts, plain = found.facts, own[0]
    head = [
        "method",
        "settings",
        "tokens left",
        "GFLOPs",
        "FLOPs allow",
        "at batch 1",
        "at batch 8",
    ]
    return [
        f"{host} at 224 pixels ({plain['tokens']} tokens, {float(plain['gflops']):.1f} GFLOPs) on "
        f"{facts['threads']} threads of an {facts['processor']}, float32, "
        f"{facts['date']}, by `{found.command}`. Speed-ups over the plain model:",
        "",
        *_table(head, rows),
    ]


def _accuracies() -> list[str]:
    """Token methods at one budget on the ViT that ships: accuracy before and after fine-tuning."""
    own = [row for row in results()["trained_methods"].rows if row["model"].endswith("cifar10-vit")]
    groups: dict[str, list[dict[str, str]]] = {}
    for row in own:
        if row["method"] == "plain" or row["keep_rate"] == "0.7":
            groups.setdefault(row["method"], []).append(row)
    rows = []
    for method, runs in groups.items():
        first, tuned = runs[0], [float(run["fine_tuned"]) for run in runs]
        before = first["off_the_shelf"]
        rows.append(
            (
                method if " " in method or method == "plain" else f"`{method}`",
                f"{float(first['gflops']) * 1000:.0f}",
                f"{float(first['speedup']):.2f}×",
                f"{float(before):.1f}" if before else "–",
                f"{sum(tuned) / len(tuned):.1f}",
                str(len(runs)),
            )
        )
    first = own[0]
    head = ["method", "MFLOPs", "speed-up", "off the shelf", "fine-tuned", "seeds"]
    return [
        f"Accuracy in percent of `{first['model']}` on {first['test_images']} test images, off the "
        f"shelf and after the same fine-tuning on {first['train_images']} images, by "
        "`python benchmarks/trained_methods.py` with the arguments that stand at its top:",
        "",
        *_table(head, rows),
    ]


PARTS: dict[str, Callable[[], list[str]]] = {
    "speeds": _speeds,
    "accuracies": _accuracies,
    "papers-in": _papers_in,
    "papers-coming": _papers_coming,
    "papers-count": _papers_count,
    "baselines": _baselines,
    "hosts": _hosts,
    "host-fields": _host_fields,
}


def _filled(path: Path, text: str) -> str:
    def fill(part: re.Match[str]) -> str:
        name = part["name"]
        if name not in PARTS:
            raise TransomError(
                f"{path} asks for the generated part {name!r}; known are {', '.join(PARTS)}"
            )
        lines = PARTS[name]()
        if path.parent.name == "docs":
            lines = [line.replace("](docs/", "](") for line in lines]
        return "\n".join([part["open"], "", *lines, "", part["close"]])

    return _PART.sub(fill, text)


def _pages(root: Path) -> list[Path]:
    return sorted((root / "docs" / "papers").glob("*.md"))


def _code(card: Card) -> str:
    if card.code is None:
        return card.code_status
    return f"{_link(card.code)}, {card.code_status}"


def _link(code: Code) -> str:
    return f"[{code.repository}]({code.url}) ({code.licence or 'no licence file'})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in cells),
    ]


def _root() -> Path:
    """The checkout this module is in, else the folder the command runs in."""
    for folder in [*Path(__file__).resolve().parents, Path.cwd()]:
        if (folder / "pyproject.toml").is_file() and (folder / "docs").is_dir():
            return folder
    raise TransomError("no documentation here: run this in a checkout of transom")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m transom.docs`; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m transom.docs", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="change nothing, report stale files")
    parser.add_argument("--root", type=Path, help="the checkout (default: the one in use)")
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True, highlight=False)
    try:
        root = options.root or _root()
        paths = stale(root) if options.check else write(root)
    except TransomError as error:
        console.print(f"error: {error}", markup=False)
        return 2
    for path in paths:
        console.print(f"{'stale' if options.check else 'written'}: {path.relative_to(root)}")
    if options.check and paths:
        console.print("run `python -m transom.docs` and commit the result")
    return 1 if options.check and paths else 0


if __name__ == "__main__":
    sys.exit(main())
