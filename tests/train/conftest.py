"""Runs that are small enough to be made many times."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")

from transom.train import Recipe, parse_recipe

TINY: dict[str, Any] = {
    "model": {
        "name": "vit_tiny_patch16_224",
        "args": {
            "img_size": 8,
            "patch_size": 2,
            "embed_dim": 16,
            "depth": 4,
            "num_heads": 2,
            "num_classes": 10,
            "drop_path_rate": 0.1,
        },
        "mean": [0.3, 0.3, 0.3],
        "std": [0.38, 0.38, 0.38],
        "crop_pct": 1.0,
    },
    "data": {"train": "digits", "train_limit": 96, "test_limit": 40},
    "optim": {"lr": 1e-3, "warmup_epochs": 0.5},
    "epochs": 2,
    "batch_size": 16,
    "log_steps": 1,
}


def recipe(**changes: Any) -> Recipe:
    """The tiny recipe with changes; sections are merged."""
    content = copy.deepcopy(TINY)
    for key, value in changes.items():
        merges = isinstance(value, dict) and isinstance(content.get(key), dict)
        content[key] = {**content[key], **value} if merges else value
    return parse_recipe(content)
