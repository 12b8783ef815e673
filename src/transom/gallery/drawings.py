"""Pictures of a mechanism at work, drawn by running it on a trained model and one photograph.

Two pictures serve every method that runs on images. One that gives up tokens shows their fates
after a few blocks. One that changes the attention shows which patches one patch listens to, before
and after: the length of the derivative of that patch's attention output by every patch's input,
which needs no attention matrix and so works for operators that have none. A room without such a
method that has a lens of `transom look` shows what is seen through it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import transom
from transom import hosts, registry
from transom.errors import TransomError
from transom.gallery.anatomy import anatomy, quietly
from transom.lens.capture import capture
from transom.lens.drawing import Pixels, overlay
from transom.lens.fates import draw_fates
from transom.lens.look import look
from transom.lens.seen import OF_ROOM, Lens

logger = logging.getLogger(__name__)

_SIZE = 336  # pixels of a picture on a page
_WIDE = 1000  # pixels of a picture that takes the whole width
_PROBES = 8  # random directions that the length of a derivative is estimated with
_DECADES = 2.5  # of influence that are shown below the largest


@dataclass(frozen=True)
class Picture:
    """One picture of a page.

    Attributes:
        file: its name in the folder of drawings.
        caption: what it shows.
        size: (width, height) in pixels.
    """

    file: str
    caption: str
    size: tuple[int, int] = (_SIZE, _SIZE)


@dataclass(frozen=True)
class Subject:
    """The model and the photograph that everything is drawn with.

    Attributes:
        model: a host with known weights.
        name: of the model, in words.
        image: (1, 3, H, W) as the model wants it.
        display: the same to draw on, uint8 (H, W, 3).
    """

    model: nn.Module
    name: str
    image: Tensor
    display: Pixels


def subject() -> Subject:
    """The saliency ViT and a photograph where the demo's packages are, else a small ViT of ours."""
    try:
        from transom.demo.photos import load_photos
        from transom.demo.saliency import load_saliency_model

        photos = load_photos()
        photo = photos[min(1, len(photos) - 1)]
        model: nn.Module = load_saliency_model().backbone
        return Subject(model.eval(), "DINOv2 ViT-S/14", photo.tensor[None], photo.display)
    except (TransomError, ImportError) as error:
        logger.info("drawings are made with the small model: %s", error)
    from transom.measure.models import create
    from transom.measure.preprocessing import preprocessing_of

    small = create("transom/cifar10-vit")
    picture = Image.fromarray(_landscape()).resize((32, 32), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    return Subject(
        small, "transom/cifar10-vit", preprocessing_of(small).normalise(tensor),
        np.asarray(picture.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC)),
    )  # fmt: skip


def draw_all(
    folder: Path,
    slugs: Iterable[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[Picture]]:
    """Draw every method that can be drawn, into one folder.

    Args:
        folder: made if it is not there; pictures that are there are drawn again.
        slugs: which rooms; all of them by default.
        progress: called with how many are done and how many there are.

    Returns:
        The pictures by slug; a method that cannot be drawn is left out with a line in the log.
    """
    wanted = [s for s in (registry.rooms() if slugs is None else slugs) if _drawable(s)]
    if not wanted:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    seen = subject()
    found = {}
    for done, slug in enumerate(wanted):
        if progress is not None:
            progress(done, len(wanted))
        try:
            pictures = draw(slug, seen, folder)
        except (TransomError, RuntimeError, ValueError) as error:
            logger.info("%s is not drawn: %s", slug, error)
            continue
        if pictures:
            found[slug] = pictures
    return found


def _drawable(slug: str) -> bool:
    return _works_on_images(slug) or lens_of(slug) is not None


def _works_on_images(slug: str) -> bool:
    """Whether the room has a method whose fates or influence can be drawn."""
    room = registry.rooms().get(slug)
    method = room.method if room else None
    if method is None or method.takes != "encoder":
        return False
    found = anatomy(slug)
    return found is not None and bool({"tokens", "attention"} & {*found.slots})


def lens_of(slug: str) -> Lens | None:
    """The lens that shows a room which has no method to draw; None for all others."""
    if slug not in registry.rooms() or _works_on_images(slug):
        return None
    return next((lens for lens, room in OF_ROOM.items() if room == slug), None)


def draw(slug: str, seen: Subject, folder: Path) -> list[Picture]:
    """The pictures of one room; none where there is nothing to see before training."""
    lens = lens_of(slug)
    with torch.random.fork_rng(), quietly():
        torch.manual_seed(0)
        drawn = _fitted(slug, seen) if lens is None else _seen_through(lens, seen)
    pictures = []
    for i, (pixels, caption) in enumerate(drawn):
        picture = Image.fromarray(pixels)
        width = _SIZE if picture.width == picture.height else min(picture.width, _WIDE)
        size = width, round(picture.height * width / picture.width)
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        pictures.append(Picture(f"{slug}-{i}.webp", caption, size))
        picture.save(folder / pictures[-1].file, "WEBP", quality=82, method=5)
    told = [[picture.file, picture.caption, picture.size] for picture in pictures]
    (folder / f"{slug}.json").write_text(json.dumps(told), encoding="utf-8")
    return pictures


def _fitted(slug: str, seen: Subject) -> list[tuple[Pixels, str]]:
    host = hosts.find(seen.model)
    patches = host.grid[0] * host.grid[1] if host.grid else 0
    budgets = registry.methods()[slug].grid(host.depth, patches)
    found = anatomy(slug)
    assert found is not None
    show = _fates if "tokens" in found.slots else _influence
    return show(slug, budgets[len(budgets) // 2], seen)


def _seen_through(lens: Lens, seen: Subject) -> list[tuple[Pixels, str]]:
    """The first picture of each panel."""
    found = look(seen.model, {"The photograph": seen.display}, lens)
    return [(panel.frames[0][1], f"{panel.title}: {panel.frames[0][0]}") for panel in found.panels]


def read_captions(folder: Path, slug: str) -> list[Picture]:
    """The pictures of one method that are in a folder; none while it is not drawn."""
    path = folder / f"{slug}.json"
    if not path.is_file():
        return []
    told = json.loads(path.read_text(encoding="utf-8"))
    return [Picture(file, caption, tuple(size)) for file, caption, size in told]


def draw_missing(folder: Path) -> None:
    """Draw what the folder does not have yet; what cannot be drawn is tried once a call."""
    missing = [slug for slug in registry.rooms() if not (folder / f"{slug}.json").is_file()]
    draw_all(folder, missing)


def _fates(slug: str, settings: dict[str, Any], seen: Subject) -> list[tuple[Pixels, str]]:
    large = np.asarray(
        Image.fromarray(seen.display).resize((_SIZE, _SIZE), Image.Resampling.LANCZOS)
    )
    transom.apply(seen.model, slug, check=False, **settings)
    try:
        with torch.no_grad(), transom.trace(seen.model) as trace:
            seen.model(seen.image)
    finally:
        transom.remove(seen.model)
    records, lengths = trace.tokens, trace.lengths
    changed = [i for i in range(len(lengths)) if i == 0 or lengths[i] != lengths[i - 1]]
    shown = sorted({changed[round(j * (len(changed) - 1) / 3)] for j in range(4)})
    told = ", ".join(f"{k}={_short(v)}" for k, v in settings.items())
    pictures: list[tuple[Pixels, str]] = [
        (large, f"The photograph, {records[0].layout.count} tokens")
    ]
    for i in shown:
        index = records[i].index
        if index is None:
            return []
        drawn = draw_fates(large, index[0], records[i].layout)
        pictures.append((drawn, f"After block {i + 1}: {lengths[i]} tokens ({told})"))
    return pictures


def _short(value: Any) -> str:
    """A setting in few characters."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) < 24 else f"{text[:18]}…"


def _influence(slug: str, settings: dict[str, Any], seen: Subject) -> list[tuple[Pixels, str]]:
    host = hosts.find(seen.model)
    if host.grid is None:
        return []
    (h, w), block = host.grid, host.depth // 2
    asking = (h // 2, w // 2)
    plain = _listens(seen, block, host.prefix, asking, host.grid)
    transom.apply(seen.model, slug, check=False, **settings)
    try:
        fitted = _listens(seen, block, host.prefix, asking, host.grid)
    finally:
        transom.remove(seen.model)
    if plain is None or fitted is None:
        return []
    marked = _marked(seen.display, asking, host.grid)
    return [
        (marked, f"One patch of the photograph, in block {block + 1}"),
        (_marked(_map(seen.display, plain), asking, host.grid), "What it listens to, plain"),
        (_marked(_map(seen.display, fitted), asking, host.grid), "The same with the method"),
    ]


def _listens(
    seen: Subject, block: int, prefix: int, asking: tuple[int, int], grid: tuple[int, int]
) -> np.ndarray | None:
    """How far the attention output of one patch depends on each patch, (h, w); None for nothing."""
    names = [f"blocks.{block}.residual.pre", f"blocks.{block}.attention.output"]
    image = seen.image.clone().requires_grad_(True)
    with capture(seen.model, *names, detach=False, check=False) as kept:
        seen.model(image)
    before, after = kept[names[0]], kept[names[1]]
    if before.shape[1] != prefix + grid[0] * grid[1]:
        return None
    row = after[0, prefix + asking[0] * grid[1] + asking[1]]
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(before.shape[1])
    for _ in range(_PROBES):
        probe = torch.randn(row.shape, generator=generator)
        (slope,) = torch.autograd.grad((row * probe).sum(), before, retain_graph=True)
        total += slope[0].square().sum(-1)
    found: np.ndarray = total[prefix:].sqrt().reshape(grid).numpy()
    return found if np.isfinite(found).all() and found.max() > 0 else None


def _map(display: Pixels, values: np.ndarray) -> Pixels:
    """Influence on a logarithmic scale, over the photograph without its colours."""
    floor = values.max() * 10**-_DECADES
    grey = np.repeat(display.mean(-1, keepdims=True), 3, -1).astype(np.uint8)
    return overlay(grey, np.log10(np.maximum(values, floor)), strength=0.72)


def _marked(display: Pixels, place: tuple[int, int], grid: tuple[int, int]) -> Pixels:
    """The picture with a frame around one patch."""
    drawn = display.copy()
    step = display.shape[0] / grid[0], display.shape[1] / grid[1]
    top, left = round(place[0] * step[0]), round(place[1] * step[1])
    bottom, right = round(top + step[0]), round(left + step[1])
    for colour, grow in (((16, 20, 24), 2), ((255, 255, 255), 1)):
        area = slice(max(0, top - grow), bottom + grow), slice(max(0, left - grow), right + grow)
        inside = display[top:bottom, left:right]
        drawn[area] = colour
        drawn[top:bottom, left:right] = inside
    return drawn


def _landscape() -> Pixels:
    """A picture for machines without photographs: sky, sun, hills."""
    y, x = np.mgrid[0:128, 0:128] / 127.0
    sky = np.stack([0.45 + 0.4 * y, 0.62 + 0.2 * y, 0.9 - 0.2 * y], -1)
    sun = np.exp(-(((x - 0.7) / 0.11) ** 2 + ((y - 0.3) / 0.11) ** 2))[..., None]
    sky = sky * (1 - sun) + sun * np.array([1.0, 0.85, 0.4])
    hills = y > 0.62 + 0.1 * np.sin(6 * x) + 0.03 * np.sin(23 * x)
    ground = np.stack([0.18 + 0.2 * x, 0.42 - 0.1 * y, 0.2 + 0.05 * x], -1)
    return (255 * np.where(hills[..., None], ground, sky).clip(0, 1)).astype(np.uint8)
