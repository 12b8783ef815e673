"""Look into a model with some pictures, through one of several lenses.

seen = transom.look(model, ["cat.jpg"], lens="attention")
seen.arrays["attention"]          # (L, B, H, h, w)
seen.figures["cat.jpg"]           # of matplotlib
seen.save("look")                 # PNGs and one self-contained page
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from transom.errors import DataError, SettingsError
from transom.lens import attending
from transom.lens.concepts import concepts as concepts_of
from transom.lens.drawing import Pixels
from transom.lens.fates import fates
from transom.lens.heads import heads
from transom.lens.maps import Maps, maps_of
from transom.lens.seen import LENSES, Given, Lens, Look, Panel
from transom.lens.tree import tree

if TYPE_CHECKING:
    from transom.measure.preprocessing import Preprocessing

__all__ = ["LENSES", "Lens", "Look", "Panel", "look"]

Images = Tensor | Sequence[Any] | Mapping[str, Any]

_ON_ATTENTION: dict[Lens, Callable[[Maps, list[str], list[Pixels]], Look]] = {
    "attention": attending.attention,
    "rollout": attending.rollout,
    "sinks": attending.sinks,
}


def look(
    model: nn.Module,
    images: Images,
    lens: Lens = "attention",
    *,
    labels: Tensor | None = None,
    concepts: int = 8,
    layer: int = -2,
    basis: Images | None = None,
    preprocessing: Preprocessing | None = None,
    seed: int = 0,
) -> Look:
    """Look into a model; it is left as it was.

    Args:
        model: an image host, with or without fitted methods. Where these merge or drop tokens,
            attention, rollout, sinks, concepts and tree are spread over the patches that became
            the tokens; heads need all tokens in every layer; fates need a method that moves
            tokens.
        images: paths, PIL images or uint8 arrays (H, W, 3), or these by name; a tensor
            (B, 3, H, W) as the model wants it; or "demo", the photographs of the demo.
        lens: one of "attention", "rollout", "fates", "heads", "sinks", "concepts", "tree".
        labels: (B,) true classes, for heads.
        concepts: number of them, for concepts.
        layer: whose patch embeddings they explain.
        basis: what concepts are fitted to, as in `images`; None for the images themselves.
        preprocessing: what the model wants to see, where it does not say so itself.
        seed: of the map of patterns, for heads, and of concepts.

    Returns:
        See :class:`Look`.

    Raises:
        SettingsError: there is no such lens, or a setting of it is out of range.
        DataError: there is no image, or one cannot be read.
        HostError, TokensError: the model cannot be seen through this lens.
        FitError: fates without a fitted method.
    """
    if lens not in LENSES:
        raise SettingsError(f"there is no lens {lens!r}; lenses are {list(LENSES)}")
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            given = _read(model, images, preprocessing)
            if lens == "heads":
                return heads(model, given.x, labels, seed)
            if lens == "fates":
                return fates(given)
            if lens == "tree":
                return tree(given)
            if lens == "concepts":
                fitted_to = None if basis is None else _read(model, basis, preprocessing)
                return concepts_of(given, concepts, layer, fitted_to, seed)
            maps = maps_of(model, given.x, residual=lens == "sinks", spread=True)
            return _ON_ATTENTION[lens](maps, given.names, given.pixels)
    finally:
        model.train(training)


def _read(model: nn.Module, images: Images, preprocessing: Preprocessing | None) -> Given:
    """Names, pictures as the model sees them, and its input, on the model's device."""
    device = next(model.parameters()).device
    if isinstance(images, (str, Path)):
        images = _demo() if images == "demo" else [images]
    if len(images) == 0:
        raise DataError("got no image; expected at least one")
    if isinstance(images, Tensor):
        if images.dim() != 4:
            raise DataError(f"got a tensor {tuple(images.shape)}; expected (B, 3, H, W)")
        low, high = images.amin((1, 2, 3), True), images.amax((1, 2, 3), True)
        shown = (255 * (images - low) / (high - low).clamp_min(1e-12)).byte().cpu()
        names = [f"image {i}" for i in range(len(images))]
        return Given(model, images.to(device), names, _pixels(shown))
    from transom.measure.data import UNREADABLE, open_picture
    from transom.measure.preprocessing import preprocessing_of

    wanted = preprocessing or preprocessing_of(model)
    cut = wanted.pixels()
    named = images if isinstance(images, Mapping) else _named(images)
    cuts = []
    for name, image in named.items():
        try:
            cuts.append(cut(open_picture(image)))
        except UNREADABLE as error:
            raise DataError(f"{name} cannot be read as a picture: {error}") from None
    stacked = torch.stack(cuts)
    x = wanted.normalise(stacked).to(device)
    return Given(model, x, list(named), _pixels(stacked))


def _named(images: Sequence[Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for i, image in enumerate(images):
        name = Path(image).name if isinstance(image, (str, Path)) else f"image {i}"
        named[name if name not in named else f"{i} {name}"] = image
    return named


def _demo() -> dict[str, Any]:
    from transom.demo.photos import load_photos

    return {photo.name: photo.image for photo in load_photos()}


def _pixels(x: Tensor) -> list[Pixels]:
    return list(x.permute(0, 2, 3, 1).contiguous().numpy())
