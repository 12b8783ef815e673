"""What token methods lose off the shelf, and what the same fine-tuning gives back.

    python benchmarks/trained_methods.py --recipe recipes/digits_evit.yaml
    python benchmarks/trained_methods.py LIMITS --keep-rates 0.7 --smaller 0
    python benchmarks/trained_methods.py LIMITS --keep-rates 0.7 --smaller 1 --add --methods SLUGS

made what is in docs/results, with data.train_limit=12800 data.test_limit=5000 for LIMITS and the
slugs of all methods without a keep rate for SLUGS; on the digits, too, some came with --add.

Every method takes as many tokens out of each block as EViT at the keep rate, so that all cost
about the same; those that cannot be told how many, and those that take none out, follow with their
default settings and no keep rate. The recipe fixes model, data and budget. With the methods: the
plain model after the same fine-tuning, random pruning, and a smaller plain model of at most EViT's
FLOPs, trained from scratch with the base model's own recipe and the fine-tuning's number of epochs
on top. Writes docs/results/trained_methods.csv; each row is there as soon as it is known. Rows of
other models stay, and with --add those of this model that are not measured again.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import math
import multiprocessing
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import transom
from transom import registry
from transom.measure.cost import gflops, interleaved
from transom.measure.environment import describe
from transom.measure.preprocessing import classes_of, preprocessing_of
from transom.measure.subjects import shared_copy
from transom.train import Recipe, build_model, evaluate, parse_recipe, read_recipe, train
from transom.train.data import load_splits
from transom.train.recipe import MethodPart

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "results" / "trained_methods.csv"
ASSETS = ROOT / "src" / "transom" / "assets"
COLUMNS = (
    *("model", "method", "settings", "keep_rate", "seed", "gflops", "speedup"),
    *("off_the_shelf", "fine_tuned", "test_images", "epochs", "train_images", "date", "machine"),
)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "cifar10_evit.yaml")
    parser.add_argument("--keep-rates", type=float, nargs="*", default=[0.7, 0.5])
    parser.add_argument("--layers", type=int, nargs="+", help="blocks that EViT reduces in")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--smaller", type=int, help="seeds of the smaller plain model, which is "
                        "trained from scratch; as --seeds by default")  # fmt: skip
    parser.add_argument("--methods", nargs="+", help="slugs; all that fit by default")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once, one thread each")
    parser.add_argument("--add", action="store_true", help="rows of this model that are not "
                        "measured again stay")  # fmt: skip
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--page", action="store_true", help="only write the page of the rows there")
    parser.add_argument("changes", nargs="*", help="of the recipe, KEY=VALUE")
    given = parser.parse_args()
    given.smaller = given.seeds if given.smaller is None else given.smaller
    if given.page:
        page(given.out.with_suffix(".md"), read(given.out))
        return

    recipe = read_recipe(given.recipe, given.changes)
    host = build_model(recipe.model)
    splits = load_splits(recipe.data, preprocessing_of(host), classes_of(host) or 0)
    common = {
        "model": recipe.model.name,
        "test_images": len(splits.test),
        "train_images": len(splits.train.pictures),
        "epochs": recipe.epochs,
        "date": datetime.date.today().isoformat(),
        "machine": f"{describe()['processor']}, {torch.get_num_threads()} thread(s)",
    }
    # what is timed is timed first, while nothing trains beside it
    plan = [
        ({**common, **values}, trained)
        for values, trained in planned(given, recipe, host, splits, splits.test.sample(64))
    ]
    again = {name(values) for values, _ in plan}
    stay = [row for row in read(given.out) if row["model"] != recipe.model.name or given.add]
    stay = [row for row in stay if name(row) not in again]
    finish(plan, stay, given)
    page(given.out.with_suffix(".md"), read(given.out))


Planned = tuple[dict[str, Any], Recipe]


def planned(
    given: argparse.Namespace, recipe: Recipe, host: nn.Module, splits: Any, batch: torch.Tensor
) -> Iterator[Planned]:
    """Each row but for its accuracy after training, and the recipe of that training."""
    values: dict[str, Any] = {
        "method": "plain",
        "gflops": cost(host, batch),
        "speedup": 1.0,
        "off_the_shelf": score(host, splits),
    }
    if not given.methods or "plain" in given.methods:
        for seed in range(given.seeds):
            yield {**values, "seed": seed}, replace(recipe, method=None, seed=seed)
    for rate in [*given.keep_rates, None]:
        chosen = others(host) if rate is None else methods(host, *taken(host, rate, given.layers))
        for slug, settings in chosen:
            if given.methods and slug not in given.methods:
                continue
            fitted = shared_copy(host)
            transom.apply(fitted, slug, check=False, **settings)
            values = {
                "method": slug,
                "settings": json.dumps(settings),
                "keep_rate": rate,
                "gflops": cost(fitted, batch),
                "speedup": speedup(host, fitted, batch, given.rounds),
                "off_the_shelf": score(fitted, splits),
            }
            print(values, flush=True)
            for seed in range(given.seeds):
                # of random, another seed is another subset
                more = {"seed": seed} if slug == "random" else {}
                part = MethodPart(slug, {**settings, **more})
                yield {**values, "seed": seed}, replace(recipe, method=part, seed=seed)
        if rate is not None and given.smaller:
            fitted = shared_copy(host)
            layers = given.layers and tuple(given.layers)
            transom.apply(fitted, "evit", check=False, keep_rate=rate, layers=layers)
            yield from smaller(recipe, rate, cost(fitted, batch), host, batch, given)


def smaller(
    recipe: Recipe,
    rate: float,
    limit: float,
    host: nn.Module,
    batch: torch.Tensor,
    given: argparse.Namespace,
) -> Iterator[Planned]:
    """Rows of a plain model, narrower than the host, of at most so many GFLOPs."""
    own = recipe.model.name.removeprefix("transom/")
    path = ASSETS / f"{own}.json"
    if not path.is_file():
        print(f"no smaller plain model: {recipe.model.name} does not ship with its recipe")
        return
    base = parse_recipe(json.loads(path.read_text())["recipe"])
    base = replace(base, data=replace(base.data, test_limit=recipe.data.test_limit))
    heads = base.model.args["num_heads"]
    for width in range(base.model.args["embed_dim"] - heads, 0, -heads):
        part = replace(base.model, args={**base.model.args, "embed_dim": width})
        small = build_model(part)
        if cost(small, batch) <= limit:
            break
    epochs = base.epochs + recipe.epochs
    values = {
        "method": "smaller plain",
        "settings": json.dumps({"embed_dim": width}),
        "keep_rate": rate,
        "gflops": cost(small, batch),
        "speedup": speedup(host, small, batch, given.rounds),
        "epochs": epochs,
    }
    for seed in range(given.smaller):
        yield {**values, "seed": seed}, replace(base, model=part, seed=seed, epochs=epochs)


def finish(plan: list[Planned], stay: list[dict[str, Any]], given: argparse.Namespace) -> None:
    """Train and write each row as soon as it is known, in the plan's order.

    The longest begin, then all with the first seed, so that a run that is stopped has every method.
    """
    known: dict[int, float] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.jobs, context, torch.set_num_threads, (1,)) as pool:
        order = sorted(range(len(plan)), key=lambda i: (-plan[i][1].epochs, plan[i][1].seed))
        running = {pool.submit(tune, plan[i][1]): i for i in order}
        for done in as_completed(running):
            i = running[done]
            known[i] = done.result()
            found = [{**plan[j][0], "fine_tuned": known[j]} for j in sorted(known)]
            write(given.out, [*stay, *found])
            print(f"{len(known)}/{len(plan)} {plan[i][0]['method']}: {known[i]}", flush=True)


def name(row: dict[str, Any]) -> tuple[str, ...]:
    """What a row is about, but for its seed."""
    rate = row.get("keep_rate")
    return row["model"], row["method"], "" if rate is None else str(rate)


def taken(model: nn.Module, rate: float, layers: list[int] | None) -> tuple[list[int], int]:
    """Tokens that EViT takes out of each block at a keep rate, and the patches there are."""
    from transom.hosts import find

    host = find(model)
    assert host.grid is not None
    patches = left = host.grid[0] * host.grid[1]
    removed = []
    for block in range(host.depth):
        reduces = block in (layers or {host.depth * part // 4 for part in (1, 2, 3)})
        kept = math.ceil(rate * left) if reduces else left
        removed.append(left - kept)
        left = kept
    return removed, patches


def methods(model: nn.Module, removed: list[int], patches: int) -> list[tuple[str, dict[str, Any]]]:
    """Slugs with settings that take so many tokens out of each block."""
    counts, left = [], patches + 1
    for count in removed:
        left -= count
        counts.append(left)
    found: list[tuple[str, dict[str, Any]]] = []
    for slug, cls in registry.methods().items():
        settings = {"counts": tuple(counts)} if slug == "random" else cls.removing(removed, patches)
        if slug not in ("none", "slice") and settings is not None and fits(model, slug, settings):
            found.append((slug, settings))
    return found


def others(model: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """Slugs of the methods that cannot be told how many tokens to take out."""
    controls = ("none", "random", "slice")
    found = registry.methods().items()
    slugs = [s for s, cls in found if s not in controls and cls.removing([1], 4) is None]
    return [(slug, {}) for slug in slugs if fits(model, slug, {})]


def fits(model: nn.Module, slug: str, settings: dict[str, Any]) -> bool:
    """Whether a method can be fitted; says why not."""
    try:
        transom.apply(shared_copy(model), slug, check=False, **settings)
    except transom.errors.TransomError as error:
        print(f"{slug} is left out: {error}", flush=True)
        return False
    return True


def tune(recipe: Recipe) -> float:
    """Accuracy after a recipe, in percent."""
    with tempfile.TemporaryDirectory() as folder:
        return round(train(recipe, folder).score.accuracy, 3)


def score(model: nn.Module, splits: Any) -> float:
    """Accuracy on the test split, in percent."""
    return round(evaluate(model, splits.test).accuracy, 3)


def cost(model: nn.Module, batch: torch.Tensor) -> float:
    """GFLOPs of an image."""
    return float(f"{gflops(lambda: model.eval()(batch)) / len(batch):.5g}")


def speedup(host: nn.Module, fitted: nn.Module, batch: torch.Tensor, rounds: int) -> float:
    """Times as fast as the host, both timed side by side on batches of 64."""
    with torch.inference_mode():
        runs = {"host": lambda: host.eval()(batch), "fitted": lambda: fitted.eval()(batch)}
        times = interleaved(runs, rounds=rounds, warmup=3)
    return round(times["host"].median_ms / times["fitted"].median_ms, 3)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows that are there."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """All rows so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)


def page(path: Path, rows: list[dict[str, str]]) -> None:
    """The rows as Markdown: means over seeds, with the lowest and highest."""
    text = [
        "# Methods off the shelf and after the same fine-tuning\n",
        "Made by `python benchmarks/trained_methods.py` with the arguments that stand at its top;",
        "every row is in `trained_methods.csv`.",
        "Test accuracy in percent: the mean over seeds, with the lowest and highest. At one keep",
        "rate all methods take the same number of tokens out of each block; without one a method",
        "has its default settings. `smaller plain` is narrower, of at most EViT's FLOPs, trained",
        "from scratch for the epochs of the model and of its fine-tuning together. Speed-ups are",
        "those of batches of 64; of models as small as these they are coarse.",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        first = own[0]
        text += [
            f"\n## {model}\n",
            f"{first['train_images']} training and {first['test_images']} test images, "
            f"{first['epochs']} epoch(s) of fine-tuning, {first['machine']}, {first['date']}. "
            f"One test image is {100 / int(first['test_images']):.2f} points.\n",
            "| keep rate | method | GFLOPs | speed-up | off the shelf | fine-tuned | seeds |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        groups: dict[tuple[str, str], list[dict[str, str]]] = {}
        for row in own:
            groups.setdefault((row["keep_rate"], row["method"]), []).append(row)
        means = {key: mean(group) for key, group in groups.items()}
        for (rate, method), group in groups.items():
            tuned = [float(row["fine_tuned"]) for row in group]
            before = group[0]["off_the_shelf"]
            before = f"{float(before):.2f}" if before else "–"
            text.append(
                f"| {rate or '–'} | {method} | {float(group[0]['gflops']):.4g} | "
                f"{float(group[0]['speedup']):.2f}× | {before} | "
                f"{means[rate, method]:.2f} ({min(tuned):.2f}–{max(tuned):.2f}) | {len(group)} |"
            )
        text.append("")
        for (rate, method), value in means.items():
            controls = [c for c in ("random", "smaller plain") if (rate, c) in means]
            better = [c for c in controls if means[rate, c] >= value and c != method]
            if method not in ("plain", "random", "smaller plain") and better:
                text.append(f"- {method} at {rate} does not beat {' nor '.join(better)}.")
    path.write_text("\n".join(text) + "\n")


def mean(rows: list[dict[str, str]]) -> float:
    """Mean accuracy after fine-tuning."""
    return sum(float(row["fine_tuned"]) for row in rows) / len(rows)


if __name__ == "__main__":
    main()
