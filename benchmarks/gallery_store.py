"""How fast the gallery's database takes entries in, and finds them again.

    pip install 'transom[gallery]'
    python benchmarks/gallery_store.py [--entries 100000] [--queries 1000] [--db URL]

Entries are made up: titles of 5 to 13 and abstracts of 100 to 220 words, drawn from 40,000 words
as often as words are in English (Zipf), so that a few stand in almost every entry. They come as the
public JSON form, 5,000 a file, and are read, checked, merged and stored as `transom papers import`
does it. Queries are of five kinds: `title`, four words of one entry's title; `sentence`, eight
words of one abstract, as they stand there; `frequent`, three of the 30 most frequent words; `one`,
one word, however rare; `typing`, the first half of a rare word. Beside them the newest page, a page
far back, trending and related entries. Each is timed from the call to the list of entries, on one
thread, after 20 calls that do not count. Writes docs/results/gallery_store.csv with the machine in
it, and prints the table.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import json
import random
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from transom.gallery.feed import read
from transom.gallery.store import Store, open_store
from transom.measure.environment import describe

OUT = Path(__file__).parents[1] / "docs" / "results" / "gallery_store.csv"
WORDS = 40_000
FILE = 5_000
WARMUP = 20


def vocabulary(chance: random.Random) -> list[str]:
    """Words that sound like some, the most frequent first."""
    parts = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "en", "or", "al")]
    made: dict[str, None] = {}
    while len(made) < WORDS:
        made["".join(chance.choices(parts, k=chance.randint(2, 4)))] = None
    return list(made)


def items(count: int, words: list[str], chance: random.Random) -> Iterator[dict[str, Any]]:
    """Items of the public JSON form."""
    weights = list(itertools.accumulate(1 / (rank + 2.7) for rank in range(len(words))))
    first = datetime.date(2015, 1, 1)
    for number in range(count):
        drawn = chance.choices(words, cum_weights=weights, k=chance.randint(105, 233))
        cut = chance.randint(5, 13)
        day = first + datetime.timedelta(days=number * 3650 // count)
        yield {
            "title": " ".join(drawn[:cut]).capitalize(),
            "publishedAt": f"{day}T00:00:00.000Z",
            "numComments": chance.randint(0, 9),
            "paper": {
                "id": f"{day:%y%m}.{number % 100_000:05}",
                "summary": " ".join(drawn[cut:]),
                "authors": [{"name": " ".join(chance.sample(words, 2)).title()} for _ in range(4)],
                "upvotes": chance.randint(0, 200),
            },
        }


def taken_in(store: Store, folder: Path, count: int, words: list[str]) -> tuple[float, float]:
    """Seconds for reading the files, and for storing what they hold."""
    chance, reading, storing = random.Random(1), 0.0, 0.0
    source = items(count, words, chance)
    path = folder / "feed.json"
    while batch := list(itertools.islice(source, FILE)):
        path.write_text(json.dumps(batch), encoding="utf-8")
        begun = time.perf_counter()
        entries = read(path)
        read_at = time.perf_counter()
        store.add(entries)
        reading += read_at - begun
        storing += time.perf_counter() - read_at
    return reading, storing


def queries(store: Store, words: list[str], count: int) -> dict[str, list[str]]:
    """Lines to search for, of each kind."""
    chance = random.Random(2)
    some = store.many([chance.randint(1, store.count()) for _ in range(count)])
    rare = [chance.choice(words[2000:]) for _ in range(count)]
    return {
        "title": [" ".join(chance.sample(e.title.split(), 4)) for e in some],
        "sentence": [" ".join(e.abstract.split()[20:28]) for e in some],
        "frequent": [" ".join(chance.sample(words[:30], 3)) for _ in range(count)],
        "one": [chance.choice(words) for _ in range(count)],
        "typing": [word[: max(3, len(word) // 2)] for word in rare],
    }


def timed(calls: list[Callable[[], object]]) -> list[float]:
    """Milliseconds of each call but the first few."""
    spent = []
    for call in calls:
        begun = time.perf_counter()
        call()
        spent.append((time.perf_counter() - begun) * 1e3)
    return spent[min(WARMUP, len(spent) // 2) :]


def rows(store: Store, words: list[str], count: int) -> Iterator[dict[str, Any]]:
    """One row a kind of question."""
    kinds = queries(store, words, count)
    searches: list[float] = []
    for kind, lines in kinds.items():
        spent = timed([lambda line=line: store.search(line, 20, meaning=False) for line in lines])
        searches += spent
        yield _row(f"search: {kind}", spent)
    yield _row("search: all kinds", searches)
    chance = random.Random(3)
    far = store.page(limit=1)[0].id // 2
    ids = [chance.randint(1, store.count()) for _ in range(max(40, count // 10))]
    yield _row("page: newest", timed([lambda: store.page(limit=50) for _ in ids]))
    yield _row("page: far back", timed([lambda: store.page(before=far, limit=50) for _ in ids]))
    yield _row("trending", timed([lambda: store.trending(20) for _ in ids]))
    yield _row("related", timed([lambda one=one: store.related(one, 5) for one in ids]))


def _row(name: str, spent: list[float]) -> dict[str, Any]:
    cuts = statistics.quantiles(spent, n=100, method="inclusive")
    return {
        "what": name,
        "calls": len(spent),
        "median_ms": f"{statistics.median(spent):.2f}",
        "p95_ms": f"{cuts[94]:.2f}",
        "p99_ms": f"{cuts[98]:.2f}",
        "entries_per_s": "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=1000, help="of each kind")
    parser.add_argument("--db", help="an empty database; a file of SQLite by default")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    words = vocabulary(random.Random(0))
    with tempfile.TemporaryDirectory() as folder:
        url = given.db or f"sqlite:///{folder}/gallery.sqlite"
        with open_store(url) as store:
            if store.count():
                raise SystemExit(f"the database holds {store.count()} entries; give an empty one")
            reading, storing = taken_in(store, Path(folder), given.entries, words)
            rates = {
                "import": reading + storing,
                "import: reading alone": reading,
                "import: storing alone": storing,
            }
            table = [
                {
                    "what": name,
                    "calls": given.entries,
                    "median_ms": "",
                    "p95_ms": "",
                    "p99_ms": "",
                    "entries_per_s": f"{given.entries / seconds:.0f}",
                }
                for name, seconds in rates.items()
            ]
            table += rows(store, words, given.queries)
            kind = store.engine.dialect.name
    facts = {
        **describe(),
        "database": f"SQLite {sqlite3.sqlite_version}" if kind == "sqlite" else kind,
        "sqlalchemy": metadata.version("sqlalchemy"),
        "entries": given.entries,
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/gallery_store.py --entries {given.entries} "
        f"--queries {given.queries}",
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in facts.items())
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    for row in table:
        print("  ".join(str(value).rjust(12) for value in row.values()))


if __name__ == "__main__":
    main()
