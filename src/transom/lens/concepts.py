"""The lens on concepts: which patches of which pictures are explained by the same thing.

The explanation is that of the room `pace`; here it is fitted to pictures and drawn on them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transom import hosts, registry
from transom.errors import SettingsError
from transom.lens.drawing import Pixels, colours, mark, montage, sheet, tint
from transom.lens.heads import classifies
from transom.lens.seen import OF_ROOM, Array, Given, Look, Panel

_WIDTH = 25  # of the random projection of embeddings, as in the paper
_TYPICAL = 8  # patches shown of each concept
_AROUND = 1  # patches of context on each side of these


def concepts(given: Given, count: int, layer: int, basis: Given | None, seed: int) -> Look:
    """Fit concepts and explain pictures by them.

    Args:
        given: the pictures.
        count: of concepts.
        layer: of the embeddings; negative ones count from the end.
        basis: the pictures that concepts are fitted to; None for those that are given.
        seed: of the projection and of the patches that concepts begin at.

    Returns:
        arrays phi (B, h, w, K), theta (B, K), weights (B, h, w), mus (K, d), sigmas (K, d, d).

    Raises:
        HostError: the host has no class token.
        SettingsError: there is no such layer, or more concepts than patches.
    """
    room = {offer.name: offer.build for offer in registry.rooms()[OF_ROOM["concepts"]].offers}
    labelled = classifies(given.model, given.x)

    def patches_of(some: Given) -> Any:
        return room["patch-embeddings"](
            some.model, some.x, layer=layer, dim=_WIDTH, seed=seed, labelled=labelled
        )

    own = patches_of(given)
    seen = own if basis is None else patches_of(basis)
    if count < 2:
        raise SettingsError(f"concepts is {count}; expected at least 2")
    fitted = _by_size(room["concepts"](seen, count, seed=seed))
    found = fitted.explanation
    if basis is not None:
        found = room["explain-by-concepts"](own, fitted.concepts)
    host = hosts.find(given.model)
    grid = host.grid
    patches = own.embeds.shape[1]
    if grid is None or grid[0] * grid[1] != patches:
        grid = (round(patches**0.5), round(patches**0.5))
    arrays: dict[str, Array] = {
        "phi": found.phi.unflatten(1, grid).cpu().numpy(),
        "theta": found.theta.cpu().numpy(),
        "weights": own.weights.unflatten(1, grid).cpu().numpy(),
        "mus": fitted.concepts.mus.cpu().numpy(),
        "sigmas": fitted.concepts.sigmas.cpu().numpy(),
    }
    few = len(seen.embeds)
    what = f"the {few} picture{'s' * (few != 1)} given"
    if basis is not None:
        what = f"{few} other pictures ({', '.join(basis.names[:3])} …), not to those given"
    lines = [
        f"{count} concepts were fitted to {what}: {seen.embeds[..., 0].numel()} patches behind "
        f"layer {layer % host.depth} of {host.depth}, seen in {seen.embeds.shape[-1]} random "
        "directions",
        "the model's class probabilities took part"
        if labelled
        else "the model has no classifier, so no class took part",
    ]
    if few < 8:
        lines.append(
            "so few pictures show what is alike in them, not what the model knows of the world; "
            "fit to more (basis=, --basis) for that"
        )
    for name, theta in zip(given.names, arrays["theta"], strict=True):
        top = theta.argsort()[::-1][:3]
        lines.append(f"{name}: " + ", ".join(f"concept {k} {100 * theta[k]:.0f} %" for k in top))
    result = Look("concepts", arrays, summary=lines, details=fitted)
    typical = _typical(seen, fitted, basis or given, grid)
    result.panels.append(Panel("The most typical patches of each concept", [("all", typical)]))
    result.figures["concepts"] = sheet("typical patches of each concept", [("", typical)])
    hues = colours(count)
    for b, (name, picture) in enumerate(zip(given.names, given.pixels, strict=True)):
        _draw(
            result, name, picture, arrays["phi"][b], arrays["theta"][b], arrays["weights"][b], hues
        )
    return result


def _by_size(fitted: Any) -> Any:
    """The same with concepts in falling order of what they explain."""
    found, old = fitted.explanation, fitted.concepts
    order = found.theta.mean(0).argsort(descending=True)
    concepts_ = old._replace(mus=old.mus[order], sigmas=old.sigmas[order], eta=old.eta[:, order])
    explained = type(found)(*(values[..., order] for values in found))
    return fitted._replace(concepts=concepts_, explanation=explained)


def _draw(
    result: Look,
    name: str,
    picture: Pixels,
    phi: NDArray[Any],
    theta: NDArray[Any],
    weights: NDArray[Any],
    hues: NDArray[np.uint8],
) -> None:
    """Add the panel and the figure of one picture."""
    main = np.where(weights > 0, phi.argmax(-1), -1)  # dropped patches have no weight
    whole = [(name, picture), ("main concept", tint(picture, main, hues))]
    alone = [
        (f"concept {k}: {100 * theta[k]:.0f} %", mark(picture, phi[..., k], hues[k]))
        for k in range(len(theta))
    ]
    frames = [("all concepts", montage(whole, side=320))]
    for k, tile in enumerate(alone):
        chips = [None, hues[k]]
        frames.append((tile[0], montage([whole[1], tile], side=320, chips=chips)))
    result.panels.append(Panel(name, frames, "concept"))
    columns = -(-(len(alone) + 2) // 2)
    page = montage([*whole, *alone], side=200, columns=columns, chips=[None, None, *hues])
    result.figures[name] = sheet(name, [("", page)])


def _typical(seen: Any, fitted: Any, basis: Given, grid: tuple[int, int]) -> Pixels:
    """The patches that each concept's density is highest at, at most two of a picture."""
    means, spreads = fitted.concepts.mus, fitted.concepts.sigmas
    density = torch.distributions.MultivariateNormal(means, spreads).log_prob(
        seen.embeds[:, :, None]
    )
    best = fitted.explanation.phi.argmax(-1)
    there = seen.weights > 0
    tiles: list[tuple[str, Pixels]] = []
    chips: list[Any] = []
    hues = colours(len(means))
    share = fitted.explanation.theta.mean(0)
    for k in range(len(means)):
        score = density[..., k].masked_fill((best != k) | ~there, -torch.inf)
        picked = _spread_out(score)
        crops = [_crop(basis.pixels[b], grid, j) for b, j in picked]
        crops += [np.full((64, 64, 3), 255, dtype=np.uint8)] * (_TYPICAL - len(crops))
        tiles += [
            ("" if i else f"concept {k}: {100 * share[k]:.0f} %", c) for i, c in enumerate(crops)
        ]
        chips += [hues[k], *[None] * (_TYPICAL - 1)]
    return montage(tiles, side=84, columns=_TYPICAL, chips=chips)


def _spread_out(score: Tensor) -> list[tuple[int, int]]:
    """Places (image, patch) of the highest scores (B, J), shared out among the images."""
    most = max(2, -(-_TYPICAL // len(score)))
    found: list[tuple[int, int]] = []
    counts = [0] * len(score)
    for place in score.flatten().argsort(descending=True).tolist():
        b, j = divmod(place, score.shape[1])
        if score[b, j] == -torch.inf or len(found) == _TYPICAL:
            break
        if counts[b] < most:
            counts[b] += 1
            found.append((b, j))
    return found


def _crop(picture: Pixels, grid: tuple[int, int], patch: int) -> Pixels:
    """A patch with some of what is around it, (64, 64, 3)."""
    from PIL import Image

    row, column = divmod(patch, grid[1])
    high, wide = picture.shape[0] / grid[0], picture.shape[1] / grid[1]
    top = min(max(row - _AROUND, 0), max(grid[0] - 1 - 2 * _AROUND, 0)) * high
    left = min(max(column - _AROUND, 0), max(grid[1] - 1 - 2 * _AROUND, 0)) * wide
    size = 1 + 2 * _AROUND
    box = (round(left), round(top), round(left + size * wide), round(top + size * high))
    cut = Image.fromarray(picture).crop(
        (box[0], box[1], min(box[2], picture.shape[1]), min(box[3], picture.shape[0]))
    )
    return np.asarray(cut.resize((64, 64), Image.Resampling.BICUBIC))
