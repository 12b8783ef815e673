"""The measured results: tables of `docs/results`, and the charts that are made of them.

Every table is a CSV file with its conditions in front as `# name: value`. Which papers a row is
about is read from its cells: a cell that is a slug of a card belongs to that paper. How a table is
drawn depends on its columns.
"""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from transom.cards import load_cards
from transom.gallery.charts import Chart, Point, Series

HOSTS = "hosts"  # the table of hosts has pages of its own kind
_NAMED = ("method", "operator", "room")  # columns that say whose row it is
_QUIET = ("plain", "random", "none", "timm", "sdpa", "masked sdpa", "no bias")
_QUALITIES = {
    "fine_tuned": "accuracy after fine-tuning (%)",
    "accuracy": "accuracy (%)",
    "agreement": "agreement with the plain host",
    "map correlation": "correlation with the plain map",
    "cosine": "cosine to the plain features",
}
# Qualities that say nothing where the weights are random, as in these tables.
_TIMED_ONLY = ("token_reduction",)


@dataclass(frozen=True)
class Result:
    """One table.

    Attributes:
        name: of its file, without the ending.
        title: in words.
        says: what it measures.
        command: what makes it.
        facts: the conditions it was measured under.
        columns: in the order of the file.
        rows: cells by column, as written.
        path: of the file.
    """

    name: str
    title: str
    says: str
    command: str
    facts: dict[str, str]
    columns: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    path: Path = field(repr=False)

    def about(self, slug: str) -> list[dict[str, str]]:
        """The rows of one paper."""
        return [row for row in self.rows if any(row.get(c) == slug for c in _NAMED)]

    def slugs(self) -> set[str]:
        """The papers it says something about."""
        found = {row[c] for row in self.rows for c in _NAMED if c in row}
        return found & load_cards().keys()


def folder() -> Path | None:
    """Where the tables are: in the package, else in the checkout; None where they are nowhere."""
    inside = resources.files("transom") / "data" / "results"
    checkout = Path(__file__).parents[3] / "docs" / "results"
    for path in (Path(str(inside)), checkout):
        if path.is_dir():
            return path
    return None


@functools.cache
def results() -> dict[str, Result]:
    """Every table but that of the hosts, by name."""
    where = folder()
    if where is None:
        return {}
    says = _described(where / "README.md")
    found = (_read(path, says) for path in sorted(where.glob("*.csv")) if path.stem != HOSTS)
    return {result.name: result for result in found if result.rows}


def _read(path: Path, described: dict[str, tuple[str, str]]) -> Result:
    facts, lines = {}, []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            name, _, value = line.lstrip("# ").partition(": ")
            facts[name] = value
        else:
            lines.append(line)
    reader = csv.DictReader(lines)
    rows = tuple(dict(row) for row in reader if row)
    command, says = described.get(path.stem, ("", ""))
    command = facts.pop("command", "") or command
    title = path.stem.replace("_", " ").capitalize()
    return Result(
        path.stem, title, says, command, facts, tuple(reader.fieldnames or ()), rows, path
    )


def _described(readme: Path) -> dict[str, tuple[str, str]]:
    """Command and meaning of each table, from the list that stands beside them."""
    if not readme.is_file():
        return {}
    found = {}
    for line in readme.read_text(encoding="utf-8").splitlines():
        row = re.match(r"\| `([^`]*benchmarks/(\w+)\.py[^`]*)` \| (.*) \|$", line)
        if row:
            found[row[2]] = (row[1], row[3])
    return found


def charts(result: Result, about: str = "") -> list[Chart]:
    """The charts that the columns of a table allow.

    Args:
        result: the table.
        about: only charts in which this paper has a point; all for "".
    """
    columns = set(result.columns)
    if "speedup_limit" in columns and result.name in _TIMED_ONLY:
        made = _limits(result)
    elif "speedup" in columns and (quality := next((q for q in _QUALITIES if q in columns), "")):
        made = _paretos(result, quality)
    elif {"operator", "tokens", "ms"} <= columns:
        made = _growth(result)
    elif {"images_per_s", "gmacs", "model"} <= columns:
        made = _throughput(result)
    else:
        made = []
    return [c for c in made if not about or any(s.key == about for s in c.series)]


def headline(slug: str) -> str:
    """The largest measured speed-up of a paper, in one short line; "" where none was gained."""
    found = []
    for result in results().values():
        for row in result.about(slug):
            speed, where = _value(row, "speedup"), row.get("host") or row.get("model")
            if speed is not None and speed > 1.0 and where:
                # models that ship with transom are very small, so the others are told first
                found.append((not where.startswith("transom/"), speed, where))
    if not found:
        return ""
    _, speed, where = max(found)
    return f"up to {speed:.2f}× on {where.rpartition('transom/')[2]}"


def _limits(result: Result) -> list[Chart]:
    """Speed-up measured over the speed-up that the FLOPs would allow."""
    made = []
    for title, rows in _split(result, ("host", "batch_size")):
        points = {
            name: [
                Point(
                    float(row["speedup_limit"]),
                    float(row["speedup"]),
                    f"{row.get('settings', '')} {float(row['speedup']):.2f}× measured, "
                    f"{float(row['speedup_limit']):.2f}× allowed by its FLOPs".strip(),
                )
                for row in own
                if _value(row, "speedup") and _value(row, "speedup_limit")
            ]
            for name, own in _by(rows, "method").items()
        }
        made.append(
            Chart(
                title,
                "speed-up the FLOPs would allow (×)",
                "speed-up measured (×)",
                _series(points),
                diagonal="all that the FLOPs allow",
            )
        )
    return made


def _paretos(result: Result, quality: str) -> list[Chart]:
    """Quality over measured speed-up; seeds are averaged."""
    made = []
    group = next((c for c in _NAMED if c in result.columns), "model")
    for title, rows in _split(result, ("model", "host", "tokens", "keep_rate")):
        points = {}
        for name, own in _by(rows, group).items():
            seen = _averaged(own, quality)
            if seen:
                points[name] = sorted(seen, key=lambda p: p.x)
        if sum(map(len, points.values())) > 1:
            made.append(
                Chart(
                    title,
                    "measured speed-up (×)",
                    _QUALITIES[quality],
                    _series(points),
                    front=True,
                    joined=max(map(len, points.values())) < 6,
                )
            )
    return made


def _averaged(rows: Sequence[dict[str, str]], quality: str) -> list[Point]:
    """One point a setting, the mean over its seeds."""
    settings = [c for c in ("settings", "ratio") if c in rows[0]]
    points = []
    for own in _group(rows, settings).values():
        pairs = [(_value(r, "speedup"), _value(r, quality)) for r in own]
        whole = [(s, q) for s, q in pairs if s is not None and q is not None]
        if not whole:
            continue
        speed, value = (sum(column) / len(whole) for column in zip(*whole, strict=True))
        told = " ".join(f"{c} {own[0][c]}" for c in settings if own[0][c] not in ("", "{}"))
        seeds = f", mean of {len(whole)} seeds" if len(whole) > 1 else ""
        points.append(Point(speed, value, f"{told} {value:.4g} at {speed:.2f}×{seeds}".strip()))
    return points


def _growth(result: Result) -> list[Chart]:
    """Milliseconds over tokens, both logarithmic, one chart an operator."""
    made = []
    for operator, rows in _by(result.rows, "operator").items():
        series = []
        for form, own in _by(rows, "form").items():
            points = [
                Point(tokens, ms, f"{ms:g} ms for {tokens:g} tokens")
                for row in own
                if (tokens := _value(row, "tokens")) and (ms := _value(row, "ms"))
            ]
            if points:
                quiet = form in _QUIET
                series.append(Series(form, points, "" if quiet else operator, quiet))
        if series:
            made.append(Chart(operator, "tokens", "milliseconds", series, log=True))
    return made


def _throughput(result: Result) -> list[Chart]:
    """Images a second over multiply-adds, one point a model."""
    points: dict[str, list[Point]] = {}
    for row in result.rows:
        macs, speed = _value(row, "gmacs"), _value(row, "images_per_s")
        if macs and speed:
            says = f"{row['model']} at {row.get('image', '?')}: {speed:g} images/s, {macs:g} GMACs"
            points.setdefault(row.get("room", row["model"]), []).append(Point(macs, speed, says))
    series = _series(points)
    return [Chart("Throughput", "GMACs", "images a second", series, log=True, joined=False)]


def _series(points: dict[str, list[Point]]) -> list[Series]:
    known = load_cards()
    made = [
        Series(
            name,
            own,
            name if name in known else "",
            quiet=name in _QUIET or name.startswith("random"),
        )
        for name, own in points.items()
        if own
    ]
    return sorted(made, key=lambda s: not s.quiet)


def _split(result: Result, columns: Sequence[str]) -> list[tuple[str, list[dict[str, str]]]]:
    """The rows apart where one of these columns has more than one value; never by a sparse one."""
    apart = []
    for column in columns:
        values = {row.get(column, "") for row in result.rows if row.get(column, "")}
        if column in result.columns and 1 < len(values) <= 8 and column != "keep_rate":
            apart.append(column)
    groups = _group(result.rows, apart)
    if not apart:
        return [(result.title, list(result.rows))]
    label = {"batch_size": "batch", "tokens": "tokens"}
    return [
        (
            ", ".join(
                f"{label[c]} {v}" if c in label else v for c, v in zip(apart, key, strict=True)
            ),
            own,
        )
        for key, own in groups.items()
    ]


def _group(
    rows: Iterable[dict[str, str]], columns: Sequence[str]
) -> dict[tuple[str, ...], list[dict[str, str]]]:
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(c, "") for c in columns), []).append(row)
    return groups


def _by(rows: Iterable[dict[str, str]], column: str) -> dict[str, list[dict[str, str]]]:
    return {key[0]: own for key, own in _group(rows, [column]).items()}


def _value(row: dict[str, str], column: str) -> float | None:
    try:
        return float(row.get(column, ""))
    except ValueError:
        return None
