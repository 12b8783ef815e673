"""Adaptive polyphase anchoring: the map itself decides where a grid of stride p begins."""

from __future__ import annotations

import torch
from torch import Tensor

from transom.errors import TokensError
from transom.ops import rows

Stride = int | tuple[int, int]


def pair(stride: Stride) -> tuple[int, int]:
    """Stride in rows and in columns."""
    return (stride, stride) if isinstance(stride, int) else (stride[0], stride[1])


def _polyphases(energy: Tensor, stride: tuple[int, int]) -> Tensor:
    """(B, H, W) -> (B, p·q, H/p·W/q): the polyphases of offsets (0,0), (0,1) … (p-1, q-1)."""
    p, q = stride
    height, width = energy.shape[-2:]
    if height % p or width % q:
        raise TokensError(
            f"a map of {height} x {width} cannot be anchored at stride {p} x {q}: the shifts of a "
            "grid form a circle only if the stride divides the map; resize or pad the image"
        )
    cells = energy.unflatten(-1, (width // q, q)).unflatten(-3, (height // p, p))
    return cells.permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2)


def _energy(x: Tensor, dim: int) -> Tensor:
    """Squares summed over channels, in double and without gradient.

    Shifted copies add up in another order; in double they agree wherever a choice can depend on it.
    """
    return torch.linalg.vector_norm(x.detach(), dim=dim, dtype=torch.float64).square()


def norms(x: Tensor, stride: Stride) -> Tensor:
    """L2 norm of every polyphase of a map.

    Args:
        x: (B, C, H, W).
        stride: p, or (p, q) in rows and columns.

    Returns:
        (B, p·q) in the dtype of x, offset (a, b) at a·q + b.

    Raises:
        TokensError: the stride does not divide the map.
    """
    return _polyphases(_energy(x, 1), pair(stride)).sum(-1).sqrt().to(x.dtype)


def sources(energy: Tensor, stride: Stride, invariant: bool = False) -> Tensor:
    """Where each place of the anchored map comes from.

    Args:
        energy: (B, H, W), squares summed over channels.
        stride: p or (p, q).
        invariant: bring the strongest place of the strongest polyphase to the corner.

    Returns:
        (B, H·W) places row by row.
    """
    p, q = pair(stride)
    height, width = energy.shape[-2:]
    phases = _polyphases(energy, (p, q))
    best = phases.sum(-1).argmax(-1)
    down, across = best // q, best % q
    if invariant:
        inside = phases.gather(1, best[:, None, None].expand(-1, -1, phases.shape[-1]))
        peak = inside[:, 0].argmax(-1)
        # counted on the map as anchored so far, which may have wrapped around the border: the
        # cell of a polyphase keeps its row and column there
        down = down + p * (peak // (width // q))
        across = across + q * (peak % (width // q))
    y = (torch.arange(height, device=energy.device) + down[:, None]) % height
    x = (torch.arange(width, device=energy.device) + across[:, None]) % width
    return (y[:, :, None] * width + x[:, None]).flatten(1)


def anchor(x: Tensor, stride: Stride, invariant: bool = False) -> Tensor:
    """Shift each map in a circle so that its strongest polyphase comes to offset (0, 0).

    y[i, j] = x[(i + a) mod H, (j + b) mod W] with (a, b) the offset of the largest norm, the first
    of equal ones. A shifted x gives the same y, shifted by a multiple of the stride. The gradient
    takes the way back; the choice has none.

    Args:
        x: (B, C, H, W).
        stride: p or (p, q); 1 leaves a direction alone.
        invariant: shift by the same rule within the polyphase as well, so that every shifted x
            gives one y.

    Returns:
        As x.

    Raises:
        TokensError: the stride does not divide the map.
    """
    index = sources(_energy(x, 1), stride, invariant)
    flat = x.flatten(2).gather(2, index[:, None].expand(-1, x.shape[1], -1))
    return flat.unflatten(2, x.shape[2:])


def anchor_tokens(x: Tensor, grid: tuple[int, int], stride: Stride) -> Tensor:
    """The same for a grid of tokens (B, h·w, C), row by row."""
    energy = _energy(x, -1).unflatten(1, grid)
    return rows.take(x, sources(energy, stride))


def reference(x: Tensor, stride: Stride, invariant: bool = False) -> Tensor:
    """Twin of :func:`anchor`: image by image, offset by offset, with torch.roll."""
    p, q = pair(stride)
    out = []
    for image in x:
        offsets = [(a, b) for a in range(p) for b in range(q)]
        strength = [float(image[:, a::p, b::q].detach().double().norm()) for a, b in offsets]
        a, b = offsets[strength.index(max(strength))]
        image = image.roll((-a, -b), (1, 2))
        if invariant:
            grid = image[:, ::p, ::q].detach().double().norm(dim=0)
            place = int(grid.argmax())
            down, across = divmod(place, grid.shape[1])
            image = image.roll((-p * down, -q * across), (1, 2))
        out.append(image)
    return torch.stack(out)
