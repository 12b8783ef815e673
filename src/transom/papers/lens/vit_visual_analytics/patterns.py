"""Attention patterns: an autoencoder of maps, clusters of its codes, and what they look like."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.papers.lens.vit_visual_analytics.strength import Grid, rings

Scale = Literal["sqrt", "log"]
_FLOOR = 1e-6  # smallest attention that the log scale tells from none


class MapAutoencoder(nn.Module):
    """n² -> 512 -> 128 -> 32 with ReLU, and back.

    Args:
        size: entries of a map, n².
        widths: of the layers; the last one is the code.
    """

    def __init__(self, size: int, widths: Sequence[int] = (512, 128, 32)) -> None:
        super().__init__()
        sizes = [size, *widths]
        self.encoder = _layers(sizes)
        self.decoder = _layers(sizes[::-1])

    def forward(self, x: Tensor) -> Tensor:
        """Maps (M, n²) as they are rebuilt."""
        rebuilt: Tensor = self.decoder(self.encoder(x))
        return rebuilt


def _layers(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inner, outer in itertools.pairwise(sizes):
        layers += [nn.Linear(inner, outer), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def scaled(maps: Tensor, scale: Scale) -> Tensor:
    """Attention (..., n, n) as the autoencoder sees it: flat, between 0 and 1."""
    flat = maps.flatten(-2)
    if scale == "sqrt":
        return flat.sqrt()
    floor = torch.tensor(_FLOOR, dtype=flat.dtype, device=flat.device)
    return 1 - flat.clamp_min(_FLOOR).log() / floor.log()


def unscaled(flat: Tensor, scale: Scale) -> Tensor:
    """The inverse of :func:`scaled`, still flat."""
    if scale == "sqrt":
        return flat.clamp_min(0).square()
    floor = torch.tensor(_FLOOR, dtype=flat.dtype, device=flat.device)
    return ((1 - flat) * floor.log()).exp()


@dataclass(frozen=True)
class Span:
    """The directions in which some flat maps differ: M numbers say all about each of M maps.

    Attributes:
        mean: (n²,) of the maps.
        axes: (m, n²) orthonormal.
        unit: size of a coordinate.
    """

    mean: Tensor
    axes: Tensor
    unit: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Span:
        """Of maps (M, n²)."""
        mean = x.mean(0)
        axes = torch.linalg.svd(x - mean, full_matrices=False).Vh
        unit = ((x - mean) @ axes.T).square().mean().sqrt().clamp_min(1e-12)
        return cls(mean, axes, unit)

    def into(self, x: Tensor) -> Tensor:
        """Coordinates (M, m) of maps (M, n²)."""
        return (x - self.mean) @ self.axes.T / self.unit

    def back(self, y: Tensor) -> Tensor:
        """Maps (M, n²) at coordinates (M, m)."""
        return y * self.unit @ self.axes + self.mean


@dataclass(frozen=True)
class Patterns:
    """A map of attention patterns.

    Attributes:
        codes: (M, c) of the maps.
        plane: (M, 2) the codes along their two main axes, for drawing.
        cluster: (M,) int64.
        prototypes: (k, n, n) decoded centres.
        silhouette: mean silhouette by number of clusters tried.
        losses: mean squared error after each epoch.
        autoencoder: that was trained.
        span: whose coordinates it was trained on; None where these are the maps themselves.
    """

    codes: Tensor
    plane: Tensor
    cluster: Tensor
    prototypes: Tensor
    silhouette: dict[int, float]
    losses: list[float]
    autoencoder: MapAutoencoder
    span: Span | None = None


def find_patterns(
    maps: Tensor,
    *,
    clusters: Sequence[int] = range(4, 13),
    scale: Scale = "sqrt",
    widths: Sequence[int] = (512, 128, 32),
    epochs: int = 200,
    batch: int = 64,
    lr: float = 1e-3,
    compact: bool = False,
    seed: int = 0,
) -> Patterns:
    """Embed attention maps and group them.

    Args:
        maps: (M, n, n) attention among patches, of images or means over images.
        clusters: numbers of clusters to try; the best silhouette wins.
        scale: of the maps.
        widths: see :class:`MapAutoencoder`.
        epochs, batch, lr: of Adam.
        compact: whether the autoencoder sees coordinates in the span of the maps instead of all
            n² entries. Nothing is lost, since what the best decoder makes lies in that span, and
            its first layer is M wide instead of n²: seconds instead of minutes for large grids.
        seed: of everything random; the global generator is left alone.

    Returns:
        See :class:`Patterns`.

    Raises:
        SettingsError: there are too few maps for so many clusters, or the scale is unknown.
    """
    tries = [k for k in clusters if 2 <= k < len(maps)]
    if not tries:
        raise SettingsError(
            f"clusters is {list(clusters)} for {len(maps)} maps; expected numbers from 2 to "
            f"{len(maps) - 1}"
        )
    if scale not in ("sqrt", "log"):
        raise SettingsError(f"scale is {scale!r}; expected 'sqrt' or 'log'")
    x = scaled(maps.detach().float(), scale)
    span = Span.of(x) if compact else None
    x = x if span is None else span.into(x)
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MapAutoencoder(x.shape[-1], widths).to(x.device)
    losses = _train(model, x, epochs, batch, lr, draw)
    with torch.no_grad():
        codes = model.encoder(x)
        scores, labels = {}, {}
        for k in tries:
            labels[k] = kmeans(codes, k, draw)
            scores[k] = silhouette(codes, labels[k])
        best = max(tries, key=lambda k: scores[k])
        cluster = labels[best]
        centres = torch.stack([codes[cluster == c].mean(0) for c in range(int(cluster.max()) + 1)])
        side = maps.shape[-2:]
        decoded = model.decoder(centres)
        decoded = decoded if span is None else span.back(decoded)
        prototypes = unscaled(decoded, scale).unflatten(-1, side)
        off = codes - codes.mean(0)
        axes = torch.linalg.svd(off, full_matrices=False).Vh[:2]
    return Patterns(codes, off @ axes.T, cluster, prototypes, scores, losses, model, span)


def _train(
    model: MapAutoencoder, x: Tensor, epochs: int, batch: int, lr: float, draw: torch.Generator
) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses = []
    with torch.enable_grad():
        for _ in range(epochs):
            total = 0.0
            for rows in torch.randperm(len(x), generator=draw).split(batch):
                part = x[rows.to(x.device)]
                loss = (model(part) - part).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += float(loss.detach()) * len(rows)
            losses.append(total / len(x))
    return losses


def kmeans(x: Tensor, k: int, draw: torch.Generator, restarts: int = 5) -> Tensor:
    """Labels (M,) of the best of some runs from seeds that lie far apart; none is left empty."""
    best, lowest = torch.zeros(len(x), dtype=torch.long), float("inf")
    for _ in range(restarts):
        centres = x[torch.randint(len(x), (1,), generator=draw).to(x.device)]
        while len(centres) < k:
            far = torch.cdist(x, centres).amin(1).square().cpu() + 1e-12
            centres = torch.cat(
                [centres, x[torch.multinomial(far, 1, generator=draw).to(x.device)]]
            )
        label = torch.full((len(x),), -1, device=x.device)
        for _ in range(100):
            now = torch.cdist(x, centres).argmin(1)
            if torch.equal(now, label):
                break
            label = now
            centres = torch.stack(
                [x[label == c].mean(0) if (label == c).any() else centres[c] for c in range(k)]
            )
        cost = float((x - centres[label]).square().sum())
        if cost < lowest:
            best, lowest = label, cost
    return best.unique(return_inverse=True)[1]


def silhouette(x: Tensor, label: Tensor) -> float:
    """Mean silhouette of points (M, d) with labels (M,); points alone in a cluster count 0."""
    far = torch.cdist(x, x)
    member = torch.nn.functional.one_hot(label).to(far.dtype)
    sizes = member.sum(0)
    if len(sizes) < 2:
        return -1.0
    sums = far @ member
    own = sums.gather(1, label[:, None])[:, 0] / (sizes[label] - 1).clamp_min(1)
    others = (sums / sizes).masked_fill(member.bool(), torch.inf).amin(1)
    value = (others - own) / torch.maximum(others, own).clamp_min(1e-12)
    return float(torch.where(sizes[label] > 1, value, 0).mean())


def describe(attention: Tensor, grid: Grid) -> dict[str, Tensor]:
    """Simple descriptors of heads.

    Args:
        attention: (B, H, n, n) among patches.
        grid: (h, w).

    Returns:
        Each (H,): `diagonal` mass; `row` and `column`, mass on other patches of the same row or
        column; `anisotropy`, their difference by their sum; `concentration`, share of the
        attention on the top 5 % of keys; `content`, variance over images by total variance.
    """
    h, w = grid
    n = h * w
    row = torch.arange(n, device=attention.device) // w
    column = torch.arange(n, device=attention.device) % w
    self_ = rings(grid, attention.device) == 0

    def mass(mask: Tensor) -> Tensor:
        return (attention * mask).sum(-1).mean((0, 2))

    across = mass((row[:, None] == row) & ~self_)
    along = mass((column[:, None] == column) & ~self_)
    keys = attention.sum(2)  # (B, H, n) what every key gets
    top = keys.topk(max(1, round(0.05 * n)), -1).values.sum(-1) / keys.sum(-1).clamp_min(1e-12)
    changes = attention.var(0, correction=0).mean((1, 2))
    total = attention.transpose(0, 1).flatten(1).var(1, correction=0)
    return {
        "diagonal": mass(self_),
        "row": across,
        "column": along,
        "anisotropy": (across - along) / (across + along).clamp_min(1e-12),
        "concentration": top.mean(0),
        "content": changes / total.clamp_min(1e-30),
    }
