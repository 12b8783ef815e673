"""The demo: fewer tokens in a real backbone, and what that does to real saliency maps."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import transom
from transom.demo.photos import Photo, load_photos
from transom.demo.saliency import SaliencyModel, load_saliency_model
from transom.lens.fates import draw_fates
from transom.measure.compare import compare
from transom.measure.comparison import Comparison
from transom.measure.data import ImageSet
from transom.measure.preprocessing import preprocessing_of
from transom.measure.quality import correlation, cosine, mean_absolute_difference
from transom.measure.report import Picture, Section
from transom.measure.row import Row

# Three budgets each; they leave about the same part of the work to every method.
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("tome", {"r": 5}),
    ("tome", {"r": 10}),
    ("tome", {"r": 16}),
    ("pitome", {"ratio": 0.975}),
    ("pitome", {"ratio": 0.945}),
    ("pitome", {"ratio": 0.89}),
    ("evit", {"keep_rate": 0.9}),
    ("evit", {"keep_rate": 0.7}),
    ("evit", {"keep_rate": 0.5}),
    ("random", {"keep_rate": 0.9}),
    ("random", {"keep_rate": 0.7}),
    ("random", {"keep_rate": 0.5}),
]
SHOWN = 1  # which of a method's budgets the pictures show


def run(
    out: str | os.PathLike[str],
    *,
    methods: list[tuple[str, dict[str, Any]]] = METHODS,
    photographs: int | None = None,
    batch_size: int = 4,
    seconds: float = 2.0,
    rounds: int | None = None,
    seed: int = 0,
    progress: Callable[[Row, int, int], None] | None = None,
    command: str = "transom demo",
) -> Comparison:
    """Compare methods on the saliency model and write `report.html`.

    Args:
        out: folder for the report; made if it is not there.
        methods: slug and settings of each row.
        photographs: use only the first so many.
        batch_size: images of a call.
        seconds: time for the timing of one row, about.
        rounds: samples of every time instead of `seconds`.
        seed: of the random control.
        progress: called after each row with the row, rows done and rows in all.
        command: what repeats this; goes into the report.

    Returns:
        The comparison. An interrupt ends it early with the rows that are done.

    Raises:
        TransomError: a package the demo needs is missing.
    """
    model = load_saliency_model()
    photos = load_photos()[:photographs]
    images = ImageSet(
        torch.stack([photo.tensor for photo in photos]),
        preprocessing_of(model.backbone),
        names=tuple(photo.name for photo in photos),
    )
    given = [(slug, {**s, "seed": seed} if slug == "random" and seed else s) for slug, s in methods]
    comparison = compare(
        model,
        images,
        given,
        target="backbone",
        restore="end",
        forward=tokens_and_maps,
        quality=fidelity,
        batch_size=batch_size,
        seconds=seconds,
        rounds=rounds,
        seed=seed,
        control=False,  # random pruning has rows of its own here
        progress=progress,
        command=command,
    )
    if comparison.interrupted:
        return comparison
    comparison.save(
        Path(out) / "report.html",
        title="transom demo: saliency with fewer tokens",
        sections=pictures(model, photos, _middle(methods)),
    )
    return comparison


def tokens_and_maps(model: Any, images: Tensor) -> dict[str, Tensor]:
    """Final tokens (B, P + N, D) and saliency maps (B, 1, H, W) of a batch."""
    tokens = model.backbone.forward_features(images)
    return {"last_hidden_state": tokens, "saliency": model.decode(tokens, images)}


def fidelity(output: dict[str, Tensor], plain: dict[str, Tensor]) -> dict[str, Tensor]:
    """How close saliency maps and final features stay to the plain model's, one number an image."""
    return {
        "map correlation": correlation(output["saliency"], plain["saliency"]),
        "map difference": mean_absolute_difference(output["saliency"], plain["saliency"]),
        "cosine": cosine(output["last_hidden_state"], plain["last_hidden_state"]),
    }


def _middle(methods: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    by_slug: dict[str, list[dict[str, Any]]] = {}
    for slug, settings in methods:
        by_slug.setdefault(slug, []).append(settings)
    return [(slug, given[min(SHOWN, len(given) - 1)]) for slug, given in by_slug.items()]


def pictures(
    model: SaliencyModel, photos: list[Photo], methods: list[tuple[str, dict[str, Any]]]
) -> list[Section]:
    """For each photograph the saliency map and the token fates of every method.

    Args:
        model: with nothing fitted.
        photos: to show.
        methods: slug and settings, one column each.

    Returns:
        One section a photograph, the first two unfolded.
    """
    images = torch.stack([photo.tensor for photo in photos])
    columns: list[tuple[str, Tensor, Any]] = []
    with torch.inference_mode():
        columns.append(("plain", model(images), None))
        for slug, settings in methods:
            transom.apply(model.backbone, slug, restore="end", check=False, **settings)
            try:
                with transom.trace(model.backbone) as trace:
                    maps = model(images)
                columns.append((_name(slug, settings), maps, trace.tokens[-1]))
            finally:
                transom.remove(model.backbone)
    sections = []
    for i, photo in enumerate(photos):
        shown = [Picture(photo.display, "photograph", photo=True)]
        shown += [
            Picture(heat(photo.display, maps[i, 0]), f"{name}: saliency", photo=True)
            for name, maps, _ in columns
        ]
        for name, _, record in columns[1:]:
            fates = draw_fates(photo.display, record.index[i], record.layout)
            left = int(record.index[i].max()) + 1
            shown.append(Picture(fates, f"{name}: {left} of {record.layout.count} tokens left"))
        caption = "Merged patches share a colour and a border; dropped ones are dark."
        sections.append(Section(photo.name, caption, shown, open=i < 2))
    return sections


def _name(slug: str, settings: dict[str, Any]) -> str:
    return " ".join([slug, *(f"{k}={v}" for k, v in settings.items())])


def heat(display: np.ndarray, saliency: Tensor) -> np.ndarray:
    """Saliency (H, W) in [0, 1] as a colour map over the grey photograph, uint8 (H, W, 3)."""
    from matplotlib import colormaps

    colours = colormaps["magma"](saliency.clamp(0, 1).cpu().numpy())[..., :3] * 255
    grey = display.mean(-1, keepdims=True)
    return np.asarray((0.75 * colours + 0.25 * grey).round(), dtype=np.uint8)
