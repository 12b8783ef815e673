"""One training loop on accelerate: from scratch, fine-tuning with a fitted method, distillation."""

from __future__ import annotations

from transom.train.evaluate import Score, evaluate
from transom.train.loop import Moment, Outcome, build_model, train
from transom.train.recipe import Recipe, parse_recipe, read_recipe

__all__ = [
    "Moment",
    "Outcome",
    "Recipe",
    "Score",
    "build_model",
    "evaluate",
    "parse_recipe",
    "read_recipe",
    "train",
]
