"""Jobs for the tests: each does one thing that a job may do, without a model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from transom.errors import GalleryError


def run(spec: dict[str, Any], folder: Path, emit: Callable[[dict[str, Any]], None]) -> Any:
    emit({"step": "begun", "done": 0, "total": 2, "process": os.getpid()})
    chore = spec.get("model", "quick")
    if chore == "slow":
        time.sleep(60)
    elif chore == "greedy":
        held = []
        while True:
            held.append(bytearray(os.urandom(1 << 20) * 16))
            time.sleep(0.01)
    elif chore == "dying":
        os._exit(3)
    elif chore == "refusing":
        raise GalleryError("this model is not taken")
    elif chore == "broken":
        raise ValueError("a bug")
    emit({"step": "half", "done": 1, "total": 2})
    Image.new("RGB", (8, 8), "red").save(folder / "plain.webp", "WEBP")
    frame = {"file": "plain.webp", "label": "as it is"}
    return {
        "model": "a chore",
        "budget": spec.get("budget", ""),
        "table": {"columns": [["method", "its slug"]], "rows": [[["plain", "plain"]]]},
        "plot": {"quality": "cosine", "lower": False, "points": []},
        "pictures": [{"method": "plain", "settings": "", "frames": [frame], "maps": []}],
        "skipped": [],
        "notes": [],
        "environment": {},
    }
