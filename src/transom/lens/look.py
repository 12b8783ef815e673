"""Look into a model with some pictures: attention, rollout, fates of tokens, heads, sinks.

seen = transom.look(model, ["cat.jpg"], lens="attention")
seen.arrays["attention"]          # (L, B, H, h, w)
seen.figures["cat.jpg"]           # of matplotlib
seen.save("look")                 # PNGs and one self-contained page
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from transom import api, registry
from transom.errors import DataError, FitError, SettingsError
from transom.lens.drawing import Pixels, montage, overlay, plot_heads, sheet
from transom.lens.fates import draw_fates
from transom.lens.maps import Maps, maps_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from transom.measure.preprocessing import Preprocessing

Lens = Literal["attention", "rollout", "fates", "heads", "sinks"]
Array = NDArray[Any]
LENSES: tuple[Lens, ...] = get_args(Lens)

EXPLAINED: dict[Lens, str] = {
    "attention": "Where each head looks: attention of the class token on the patches, or what "
    "patches get from all patches where there is no class token. First tile: mean of the heads.",
    "rollout": "Attention through all layers up to each one, half of it going straight on "
    "(Abnar and Zuidema, 2020).",
    "fates": "Patches that became one token share their mean colour and an outline; dropped "
    "patches are dark.",
    "heads": "Every head: what pruning it costs, how far it looks, which pattern it makes.",
    "sinks": "Attention that each patch gets. A sink is a patch that gets more than "
    "5 times the mean of the patches.",
}
SINK = 5.0  # times the mean attention that makes a sink
_WIDTHS = (128, 64, 32)  # of the autoencoder; smaller than the default, whose first layer is slow


@dataclass
class Panel:
    """Pictures of one image, one a layer, that a slider goes through."""

    title: str
    frames: list[tuple[str, Pixels]]


@dataclass
class Look:
    """What was seen.

    Attributes:
        lens: through which.
        arrays: the numbers behind the pictures; L layers, B images, H heads, (h, w) grid.
            attention (L, B, H, h, w); rollout (L, B, h, w); index (L, B, N0); received
            (L, B, N) and norm (L, B, N); for heads the table, each (L, H), and mass (L, H, R).
        figures: of matplotlib, by the name of the image; for heads one, "heads".
        panels: the same as frames.
        summary: the essentials, in words.
        details: what a lens returned as a whole (for heads, its overview).
    """

    lens: Lens
    arrays: dict[str, Array]
    figures: dict[str, Figure] = field(default_factory=dict)
    panels: list[Panel] = field(default_factory=list)
    summary: list[str] = field(default_factory=list)
    details: Any = None

    def save(self, folder: str | Path, title: str = "") -> Path:
        """Write a PNG for each figure and the page.

        Args:
            folder: made if it is not there.
            title: of the page.

        Returns:
            The page, LENS.html.
        """
        import jinja2

        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        for i, (name, figure) in enumerate(self.figures.items()):
            stem = self.lens if name == self.lens else f"{self.lens}-{i}-{Path(name).stem}"
            figure.savefig(out / f"{stem}.png", dpi=110)
        panels = [
            {"title": p.title, "frames": [(name, _encoded(x)) for name, x in p.frames]}
            for p in self.panels
        ]
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("transom.lens"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        page = environment.get_template("look.html.j2").render(
            title=title or self.lens,
            explained=EXPLAINED[self.lens],
            summary=self.summary,
            panels=panels,
        )
        path = out / f"{self.lens}.html"
        path.write_text(page, encoding="utf-8")
        return path


def look(
    model: nn.Module,
    images: Tensor | Sequence[Any],
    lens: Lens = "attention",
    *,
    labels: Tensor | None = None,
    preprocessing: Preprocessing | None = None,
    seed: int = 0,
) -> Look:
    """Look into a model; it is left as it was.

    Args:
        model: an image host, with or without fitted methods. Heads and rollout need all tokens in
            every layer; fates need a method that moves tokens.
        images: paths, PIL images or uint8 arrays (H, W, 3); or a tensor (B, 3, H, W) as the
            model wants it.
        lens: one of "attention", "rollout", "fates", "heads", "sinks".
        labels: (B,) true classes, for heads.
        preprocessing: what the model wants to see, where it does not say so itself.
        seed: of the map of patterns, for heads.

    Returns:
        See :class:`Look`.

    Raises:
        SettingsError: there is no such lens.
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
            names, pixels, x = _read(model, images, preprocessing)
            x = x.to(next(model.parameters()).device)
            if lens == "heads":
                return _heads(model, x, labels, seed)
            if lens == "fates":
                return _fates(model, x, names, pixels)
            draw: dict[str, Callable[[Maps, list[str], list[Pixels]], Look]] = {
                "attention": _attention,
                "rollout": _rollout,
                "sinks": _sinks,
            }
            return draw[lens](maps_of(model, x, residual=lens == "sinks"), names, pixels)
    finally:
        model.train(training)


def _read(
    model: nn.Module, images: Tensor | Sequence[Any], preprocessing: Preprocessing | None
) -> tuple[list[str], list[Pixels], Tensor]:
    """Names, pictures as the model sees them, and its input."""
    if isinstance(images, (str, Path)):
        images = [images]
    if len(images) == 0:
        raise DataError("got no image; expected at least one")
    if isinstance(images, Tensor):
        if images.dim() != 4:
            raise DataError(f"got a tensor {tuple(images.shape)}; expected (B, 3, H, W)")
        low, high = images.amin((1, 2, 3), True), images.amax((1, 2, 3), True)
        shown = (255 * (images - low) / (high - low).clamp_min(1e-12)).byte().cpu()
        return [f"image {i}" for i in range(len(images))], _pixels(shown), images
    from transom.measure.data import UNREADABLE, open_picture
    from transom.measure.preprocessing import preprocessing_of

    wanted = preprocessing or preprocessing_of(model)
    cut = wanted.pixels()
    names, cuts = [], []
    for i, image in enumerate(images):
        name = Path(image).name if isinstance(image, (str, Path)) else f"image {i}"
        try:
            cuts.append(cut(open_picture(image)))
        except UNREADABLE as error:
            raise DataError(f"{name} cannot be read as a picture: {error}") from None
        names.append(name if name not in names else f"{i} {name}")
    stacked = torch.stack(cuts)
    return names, _pixels(stacked), wanted.normalise(stacked)


def _pixels(x: Tensor) -> list[Pixels]:
    return list(x.permute(0, 2, 3, 1).contiguous().numpy())


def _with_panels(look: Look, names: list[str], frames: list[list[tuple[str, Pixels]]]) -> Look:
    for name, own in zip(names, frames, strict=True):
        look.panels.append(Panel(name, own))
        look.figures[name] = sheet(name, own)
    return look


def _attention(maps: Maps, names: list[str], pixels: list[Pixels]) -> Look:
    seen = maps.looked_at().cpu().numpy()  # (L, B, H, h, w)
    lines = []
    share = seen.reshape(*seen.shape[:3], -1)
    total = share.sum(-1)
    top = max(1, round(share.shape[-1] * 0.05))
    few = np.sort(share, -1)[..., -top:].sum(-1) / total.clip(1e-12)
    for layer in sorted({0, len(seen) // 2, len(seen) - 1}):
        by_head = few[layer].mean(0)
        lines.append(
            f"layer {layer}: {100 * total[layer].mean():.0f} % of the attention is on patches, "
            f"{100 * by_head.mean():.0f} % of that on the top {top}; most focused head "
            f"{by_head.argmax()} ({100 * by_head.max():.0f} %)"
        )
    frames = [
        [
            (
                f"layer {layer}",
                montage(
                    [("mean", overlay(picture, heads.mean(0)))]
                    + [(f"head {h}", overlay(picture, m)) for h, m in enumerate(heads)]
                ),
            )
            for layer, heads in enumerate(seen[:, b])
        ]
        for b, picture in enumerate(pixels)
    ]
    return _with_panels(Look("attention", {"attention": seen}, summary=lines), names, frames)


def _rollout(maps: Maps, names: list[str], pixels: list[Pixels]) -> Look:
    flow, p = maps.rollout(), maps.prefix
    rows = flow[:, :, 0, p:] if maps.class_token else flow[:, :, p:, p:].mean(2)
    seen = rows.unflatten(-1, maps.grid).cpu().numpy()  # (L, B, h, w)
    lines = []
    for name, last in zip(names, seen[-1], strict=True):
        y, x = np.unravel_index(last.argmax(), last.shape)
        part = last.max() / last.sum()
        lines.append(
            f"{name}: most comes from the patch in row {y}, column {x} "
            f"({100 * part:.1f} %, {part * last.size:.1f} times the mean)"
        )
    frames = [
        [
            (f"up to layer {i}", montage([("", picture), ("rollout", overlay(picture, m))]))
            for i, m in enumerate(seen[:, b])
        ]
        for b, picture in enumerate(pixels)
    ]
    return _with_panels(Look("rollout", {"rollout": seen}, summary=lines), names, frames)


def _sinks(maps: Maps, names: list[str], pixels: list[Pixels]) -> Look:
    received = maps.received().cpu().numpy()  # (L, B, N)
    norm = torch.stack([x.float().norm(dim=-1) for x in maps.residual]).cpu().numpy()
    p = maps.prefix
    patches, sizes = received[..., p:], norm[..., p:]
    sink = patches > SINK * patches.mean(-1, keepdims=True)
    lines = []
    for layer in range(len(received)):
        part = (patches * sink)[layer].sum(-1).mean()
        line = (
            f"layer {layer}: {sink[layer].sum(-1).mean():.1f} sinks an image get "
            f"{100 * part:.0f} % of all attention, class and register tokens "
            f"{100 * received[layer, :, :p].sum(-1).mean():.0f} %"
        )
        if sink[layer].any():
            ratio = np.median(sizes[layer][sink[layer]]) / np.median(sizes[layer])
            line += f"; norm of sinks {ratio:.1f} times that of patches"
        lines.append(line)
    grid = maps.grid
    frames = [
        [
            (
                f"layer {i}",
                montage(
                    [
                        ("attention received", overlay(picture, patches[i, b].reshape(grid))),
                        ("norm", overlay(picture, sizes[i, b].reshape(grid))),
                        ("sinks", overlay(picture, sink[i, b].reshape(grid).astype(float))),
                    ]
                ),
            )
            for i in range(len(received))
        ]
        for b, picture in enumerate(pixels)
    ]
    arrays = {"received": received, "norm": norm, "sinks": sink}
    return _with_panels(Look("sinks", arrays, summary=lines), names, frames)


def _fates(model: nn.Module, x: Tensor, names: list[str], pixels: list[Pixels]) -> Look:
    if not api.fittings(model):
        raise FitError(
            "fates shows where a method sends the tokens, but nothing is fitted to this model; "
            "fit one first: transom.apply(model, 'tome'), or --method tome"
        )
    with api.trace(model) as trace:
        model(x)
    records = trace.tokens
    index = [record.index for record in records]
    if not index or any(i is None for i in index):
        raise FitError("no provenance was recorded; fit a method that moves tokens")
    places = torch.stack([i for i in index if i is not None]).cpu()  # (L, B, N0)
    layout = records[-1].layout
    lines = [f"tokens behind each layer: {' → '.join(map(str, trace.lengths))}"]
    for b, name in enumerate(names):
        last = places[-1, b, layout.prefix :]
        own = last[last >= 0].bincount()
        alone, merged = int((own == 1).sum()), int((own > 1).sum())
        lines.append(
            f"{name}: {alone} patches stayed alone, {int(own[own > 1].sum())} became {merged} "
            f"tokens, {int((last < 0).sum())} were dropped"
        )
    frames = [
        [
            (f"layer {i}", montage([("", pic), ("", draw_fates(pic, places[i, b], layout))]))
            for i in range(len(places))
        ]
        for b, pic in enumerate(pixels)
    ]
    return _with_panels(Look("fates", {"index": places.numpy()}, summary=lines), names, frames)


def _heads(model: nn.Module, x: Tensor, labels: Tensor | None, seed: int) -> Look:
    offers = {o.name: o.build for o in registry.rooms()["vit-visual-analytics"].offers}
    classifies = _classifies(model, x)
    found = offers["heads"](
        model, x, labels, importance=classifies, seed=seed, widths=_WIDTHS, epochs=100
    )
    table = {name: values.cpu().numpy() for name, values in found.table.items()}
    lines = []
    if classifies:
        order = found.importance.order()
        kept = min(3, len(order))
        told = [", ".join(f"{i}.{h}" for i, h in part) for part in (order[:kept], order[-kept:])]
        lines.append(f"most important heads (layer.head): {told[0]}; least: {told[1]}")
    else:
        lines.append("the model has no classifier, so pruning was not measured")
    reach = found.trend()["distance"].cpu().numpy()
    lines.append(
        f"mean distance of attention: {reach[0]:.2f} patches in the first layer, "
        f"{reach[-1]:.2f} in the last"
    )
    if found.patterns is not None:
        sizes = found.patterns.cluster.bincount().tolist()
        lines.append(f"{len(sizes)} patterns, of {', '.join(map(str, sizes))} heads")
    mass = np.stack([s.mass.cpu().numpy() for s in found.strength])
    figure = plot_heads(table, mass, found.patterns)
    result = Look("heads", {**table, "mass": mass}, {"heads": figure}, summary=lines, details=found)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    result.panels.append(Panel("all heads", [("all layers", _decoded(buffer))]))
    return result


def _classifies(model: nn.Module, x: Tensor) -> bool:
    out = model(x[:1])
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        return False
    get = getattr(model, "get_classifier", None)
    return not (callable(get) and isinstance(get(), nn.Identity))


def _decoded(buffer: io.BytesIO) -> Pixels:
    from PIL import Image

    return np.asarray(Image.open(buffer).convert("RGB"))


def _encoded(pixels: Pixels) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).quantize(128).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
