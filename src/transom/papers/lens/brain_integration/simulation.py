"""Recordings in which it is known what each site does."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("image", "text", "both", "product", "noise")


class Recording(NamedTuple):
    """Features of simulated models by name, targets (n, E), and what each site does (E words)."""

    features: dict[str, Tensor]
    targets: Tensor
    kinds: list[str]


def simulate(
    events: int = 600, sites: int = 20, width: int = 6, noise: float = 1.0, seed: int = 0
) -> Recording:
    """Sites that follow an image, a text, their sum, their product, or nothing.

    Features: "image" and "text" are the two unimodal models, "concatenation" both side by side and
    "fusion" both with their products.

    Args:
        events: n.
        sites: of each of the five kinds.
        width: features of a unimodal model.
        noise: standard deviation added to signals of deviation 1.
        seed: of everything.

    Returns:
        The recording.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    image, text = draw(events, width), draw(events, width)
    products = (image[:, :, None] * text[:, None]).flatten(1)
    signals = {
        "image": image @ draw(width, sites),
        "text": text @ draw(width, sites),
        "both": torch.cat([image, text], 1) @ draw(2 * width, sites),
        "product": products @ draw(width**2, sites),
        "noise": torch.zeros(events, sites, dtype=torch.float64),
    }
    clean = torch.cat(list(signals.values()), 1)
    clean = clean / clean.std(0).masked_fill(clean.std(0) == 0, torch.inf)
    targets = clean + noise * draw(*clean.shape)
    features = {
        "image": image,
        "text": text,
        "concatenation": torch.cat([image, text], 1),
        "fusion": torch.cat([image, text, products], 1),
    }
    return Recording(features, targets, [kind for kind in signals for _ in range(sites)])
