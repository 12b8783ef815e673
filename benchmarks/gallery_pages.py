"""How long the pages of the gallery take, with many imported entries.

    python benchmarks/gallery_pages.py [--entries 100000] [--rounds 200]

Synthetic entries are imported into a new SQLite database; then every kind of page is asked of the
application in this process, without a socket, after one request that warms it. The static site is
built once, without drawings. Writes docs/results/gallery_pages.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from fastapi.testclient import TestClient

from transom.gallery.feed import Entry
from transom.gallery.server import create_app
from transom.gallery.site import build
from transom.gallery.store import open_store
from transom.measure.environment import describe

OUT = Path(__file__).parents[1] / "docs" / "results" / "gallery_pages.csv"
TOPICS = [
    "attention",
    "token",
    "vision",
    "language",
    "transformer",
    "merging",
    "diffusion",
    "routing",
]
# As in real text: few words are frequent, most are rare.
WORDS = [*TOPICS, *(f"term{i:05d}" for i in range(20_000))]
WEIGHTS = [1 / (rank + 1) for rank in range(len(WORDS))]


def entries(count: int, seed: int = 0) -> Iterator[Entry]:
    """Papers that do not exist, over five years."""
    draw = random.Random(seed)
    last = datetime.date(2025, 12, 1)
    total = list(itertools.accumulate(WEIGHTS))
    for i in range(count):
        title = " ".join(draw.choices(WORDS, cum_weights=total, k=7)).capitalize()
        yield Entry(
            title=f"{title} {i}",
            abstract=" ".join(draw.choices(WORDS, cum_weights=total, k=120)),
            authors=(f"Author {i % 5000}", f"Author {i % 777}"),
            author_count=2,
            organisation=None,
            date=last - datetime.timedelta(days=i * 1800 // count),
            comments=draw.randrange(20),
            votes=draw.randrange(200),
            arxiv_id=f"{20 + i % 6}{1 + i % 12:02d}.{i % 100000:05d}",
            repo=None,
            project=None,
            slug=None,
        )


def timed(client: TestClient, paths: list[str], rounds: int) -> list[float]:
    """Milliseconds of each request, the paths in turn."""
    client.get(paths[0])
    seconds = []
    for i in range(rounds):
        began = time.perf_counter()
        answer = client.get(paths[i % len(paths)])
        seconds.append(1e3 * (time.perf_counter() - began))
        assert answer.status_code == 200, answer.text[:200]
    return sorted(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        build(Path(folder) / "site", drawings=False)
        whole = 1e3 * (time.perf_counter() - began)
        rows.append({"page": "static site, all pages", "p50_ms": whole, "p95_ms": whole})
        with open_store(f"sqlite:///{folder}/gallery.sqlite") as store:
            store.add(entries(options.entries))
            deep = store.page(limit=5000)[-1].id
            kinds = {
                "feed": ["/"],
                "feed, 5,000 entries down": [f"/?before={deep}"],
                "feed, filtered": ["/?family=tokens", "/?host=timm-vit", "/?status=runs"],
                "paper": ["/papers/tome", "/papers/rmt", "/papers/evit"],
                "entry": [f"/entries/{deep}"],
                "search while typing": [
                    f"/api/search?q={word}+{other}"
                    for word, other in itertools.product(TOPICS, ("tok", "term001", "vis"))
                ],
                "results": ["/results"],
            }
            with TestClient(create_app(store), base_url="http://localhost") as client:
                for name, paths in kinds.items():
                    found = timed(client, paths, options.rounds)
                    rows.append(
                        {
                            "page": name,
                            "p50_ms": statistics.median(found),
                            "p95_ms": found[int(0.95 * (len(found) - 1))],
                        }
                    )
    facts = {**describe("cpu"), "date": datetime.date.today().isoformat()}
    facts |= {"entries": options.entries, "rounds": options.rounds}
    facts["command"] = (
        f"python benchmarks/gallery_pages.py --entries {options.entries} --rounds {options.rounds}"
    )
    with options.out.open("w", newline="", encoding="utf-8") as file:
        for name, value in facts.items():
            file.write(f"# {name}: {value}\n")
        writer = csv.DictWriter(file, ["page", "p50_ms", "p95_ms"], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            print(f"{row['page']:28} p50 {row['p50_ms']:9.2f} ms  p95 {row['p95_ms']:9.2f} ms")
            writer.writerow({k: v if isinstance(v, str) else f"{v:.3f}" for k, v in row.items()})


if __name__ == "__main__":
    main()
