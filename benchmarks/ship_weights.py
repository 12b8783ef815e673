"""Make a trained model one that ships with transom: weights in fp16, facts, a model card.

    transom train recipes/digits_vit.yaml --out runs/digits
    python benchmarks/ship_weights.py runs/digits digits-vit

Writes digits-vit.safetensors, .json and .md to src/transom/assets. The accuracy on the card is that
of the written file, read back, in fp32 arithmetic.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from transom.measure import models
from transom.measure.environment import describe
from transom.measure.preprocessing import classes_of, preprocessing_of
from transom.train import Score, evaluate, parse_recipe
from transom.train.checkpoints import latest, write
from transom.train.data import load_splits, pictures
from transom.train.logs import rows
from transom.train.loop import timm_args

ASSETS = Path(__file__).parents[1] / "src" / "transom" / "assets"
LIMIT = 12e6


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder that transom train wrote")
    parser.add_argument("name", help="of the model, without transom/")
    given = parser.parse_args()

    result, weights = finished(given.run) or stopped(given.run)
    recipe = parse_recipe(result["recipe"])
    if recipe.method is not None:
        raise SystemExit("only plain models ship; this one has a method fitted")
    state = load_file(weights)
    half: dict[str, Tensor] = {
        n: t.half() if t.is_floating_point() else t for n, t in state.items()
    }
    ASSETS.mkdir(exist_ok=True)
    path = ASSETS / f"{given.name}.safetensors"
    write(half, path)
    if path.stat().st_size > LIMIT:
        path.unlink()
        raise SystemExit(f"the weights are larger than {LIMIT / 1e6:.0f} MB")
    facts: dict[str, Any] = {"name": recipe.model.name, "args": timm_args(recipe.model)}
    facts_path = ASSETS / f"{given.name}.json"
    facts_path.write_text(json.dumps(facts))

    model = models.create(f"transom/{given.name}")
    splits = load_splits(recipe.data, preprocessing_of(model), classes_of(model) or 0)
    score = evaluate(model, splits.test)
    few = replace(recipe.data, test_limit=1000, train_limit=1)
    part = evaluate(model, load_splits(few, preprocessing_of(model), classes_of(model) or 0).test)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=ASSETS
    ).stdout.strip()
    facts |= {
        "accuracy": score.accuracy,
        "accuracy_of_1000": part.accuracy,
        "test_images": score.count,
        "train_images": result["train_images"],
        "parameters": result["parameters"],
        "confusion": score.confusion.tolist(),
        "commit": commit,
        "seconds": result["seconds"],
        "machine": result["environment"],
        "steps": result["steps"],
        "stopped": result.get("stopped", False),
        "recipe": result["recipe"],
    }
    facts_path.write_text(json.dumps(facts, indent=1) + "\n")
    (ASSETS / f"{given.name}.md").write_text(card(given.name, facts, score))
    print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB, {score.accuracy:.2f} %")


def finished(run: Path) -> tuple[dict[str, Any], Path] | None:
    """The result of a finished run and its weights."""
    path = run / "result.json"
    return (json.loads(path.read_text()), run / "model.safetensors") if path.is_file() else None


def stopped(run: Path) -> tuple[dict[str, Any], Path]:
    """The same of the last checkpoint of a run that was stopped."""
    last = latest(run / "checkpoints")
    if last is None:
        raise SystemExit(f"{run} holds neither a result nor a checkpoint")
    facts = json.loads((last / "run.json").read_text())
    average = last / "average.safetensors"
    weights = average if average.is_file() else last / "model.safetensors"
    recipe = parse_recipe(facts["recipe"])
    made = [row for row in rows(run / "steps.csv") if int(row["step"]) <= facts["step"]]
    return {
        "recipe": facts["recipe"],
        "stopped": True,
        "steps": facts["step"],
        "train_images": len(pictures(recipe.data.train).pictures),
        "parameters": sum(t.numel() for t in load_file(weights).values()),
        "seconds": float(made[-1]["seconds"]),
        "environment": {**describe(), "threads": 1},
    }, weights


def card(name: str, facts: dict[str, Any], score: Score) -> str:
    """The model card as Markdown."""
    recipe = facts["recipe"]
    test = recipe["data"]["test"] or f"{recipe['data']['holdout']:.0%} of every class, held out"
    machine = facts["machine"]
    table = "\n".join(
        f"| {i} | " + " | ".join(map(str, row)) + " |" for i, row in enumerate(facts["confusion"])
    )
    head = " | ".join(str(i) for i in range(len(facts["confusion"])))
    budget = f"{recipe['epochs']} epochs, {facts['steps']} steps"
    if facts["stopped"]:
        seen = facts["steps"] * recipe["batch_size"] * recipe["accumulate"]
        budget = (
            f"stopped after step {facts['steps']} ({seen:,} images) of {recipe['epochs']} epochs"
        )
    return f"""# transom/{name}

A small model for tests and comparisons of methods. Trained on a small budget, it is not what its
architecture can reach; do not use it for anything else.

| | |
| --- | --- |
| architecture | `{facts["name"]}` with {json.dumps(facts["args"])} |
| parameters | {facts["parameters"]:,}, stored in fp16 |
| trained on | {Path(recipe["data"]["train"]).name}, {facts["train_images"]:,} images |
| judged on | {Path(test).name}, {score.count:,} images |
| accuracy | {score.accuracy:.2f} % (loss {score.loss:.4f}) |
| budget | {budget} on {machine["device"]}, {machine["threads"]} thread(s): \
{facts["seconds"]:.0f} s beside other work |
| seed | {recipe["seed"]} |
| commit | {facts["commit"]} |
| machine | {machine["processor"]}, torch {machine["torch"]}, timm {machine["timm"]} |

The whole recipe is in `{name}.json`; `transom train` with it repeats the run.

Confusion matrix, true class by predicted class:

| | {head} |
|{" --- |" * (len(facts["confusion"]) + 1)}
{table}
"""


if __name__ == "__main__":
    main()
