"""A network of ViT-ResNAS as data: the official tuple of tuples, checked, and its multiply-adds.

(0, D)                                     patch embedding, one linear map
(4, D) or (5, D, mid)                      patch embedding, convolutions (mid is 24 in the first)
(1, (D, heads, head_dim), (D, hidden), e)  transformer block; e is 0 where it is left out
(3, D_in, D_out)                           residual spatial reduction
(2, D, classes)                            head
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from transom.errors import SettingsError

MID = 24
"""Channels between the convolutions of the patch embedding (4, D)."""


class EmbedDef(NamedTuple):
    """Patch embedding.

    Attributes:
        dim: width D.
        mid: channels of its convolutions; None for one linear map.
    """

    dim: int
    mid: int | None


class BlockDef(NamedTuple):
    """Transformer block; heads · head_dim may differ from dim."""

    dim: int
    heads: int
    head_dim: int
    hidden: int
    exists: bool = True


class ReduceDef(NamedTuple):
    """Residual spatial reduction."""

    dim: int
    out: int


@dataclass(frozen=True)
class Definition:
    """One network.

    Attributes:
        embed: patch embedding.
        layers: blocks and reductions in their order, numbered together.
        classes: outputs of the head.
    """

    embed: EmbedDef
    layers: tuple[BlockDef | ReduceDef, ...]
    classes: int

    def __post_init__(self) -> None:
        sizes = [n for layer in (self.embed, *self.layers) for n in layer if n is not None]
        if min(sizes) < 0 or self.embed.dim < 1 or self.classes < 0:
            raise SettingsError(f"{self} holds a negative size; expected positive integers")
        dim = self.embed.dim
        for i, layer in enumerate(self.layers):
            if layer.dim != dim:
                raise SettingsError(
                    f"layer {i} of a network definition, {layer}, has width {layer.dim}, but "
                    f"width {dim} arrives there; make the two equal"
                )
            if isinstance(layer, ReduceDef):
                if layer.out < dim:
                    raise SettingsError(
                        f"layer {i} of a network definition reduces the width from {dim} to "
                        f"{layer.out}; the residual path only adds channels, so out >= {dim}"
                    )
                dim = layer.out
            elif min(layer.heads, layer.head_dim, layer.hidden) < 1:
                raise SettingsError(
                    f"layer {i} of a network definition, {layer}, has an empty part"
                )

    @classmethod
    def parse(cls, given: Definition | Sequence[Any]) -> Definition:
        """From the official tuple of tuples (or lists).

        Raises:
            SettingsError: it is not made like that, or widths do not fit each other.
        """
        if isinstance(given, Definition):
            return given
        try:
            first, *middle, last = given
            embed = _embed(first)
            layers = tuple(_layer(entry) for entry in middle)
            code, dim, classes = last
        except (TypeError, ValueError, KeyError) as error:
            raise SettingsError(
                f"a network definition cannot be read ({error}): expected ((4, D), (1, (D, heads, "
                "head_dim), (D, hidden), 1), (3, D_in, D_out), ..., (2, D, classes))"
            ) from error
        made = cls(embed, layers, int(classes))
        if code != 2 or dim != made.width:
            raise SettingsError(
                f"a network definition ends in {tuple(last)}; expected (2, {made.width}, classes)"
            )
        return made

    @property
    def width(self) -> int:
        """Channels of the last layer."""
        outs = [layer.out for layer in self.layers if isinstance(layer, ReduceDef)]
        return outs[-1] if outs else self.embed.dim

    def tuples(self) -> tuple[Any, ...]:
        """The official form."""
        embed = self.embed
        first: tuple[int, ...] = (0, embed.dim)
        if embed.mid is not None:
            first = (4, embed.dim) if embed.mid == MID else (5, embed.dim, embed.mid)
        return (first, *map(_entry, self.layers), (2, self.width, self.classes))

    def present(self) -> Definition:
        """Without the blocks that are left out: the network that a search found."""
        stay = (layer for layer in self.layers if isinstance(layer, ReduceDef) or layer.exists)
        return replace(self, layers=tuple(stay))

    def rewidened(self) -> Definition:
        """With the width of every layer set to what arrives there."""
        dim, layers = self.embed.dim, []
        for layer in self.layers:
            layers.append(layer._replace(dim=dim))
            dim = layer.out if isinstance(layer, ReduceDef) else dim
        return replace(self, layers=tuple(layers))

    def macs(self, size: int = 224, patch: int = 14, *, distilled: bool = False) -> int:
        """Multiply-adds of one image as the paper counts them.

        Linear layers, convolutions and the two products of attention count; norms, biases and
        softmax do not. The convolutions before the patches are counted at 112 x 112, whatever
        `size` is: that is the paper's count, and right at 224 only. :func:`measured_macs` in
        `search.py` counts what runs.

        Args:
            size: height and width of the image, pixels.
            patch: height and width of a patch, pixels.
            distilled: whether there is a distillation token with a head.

        Raises:
            SettingsError: a grid on the way does not divide.
        """
        prefix = 2 if distilled else 1
        grid, rest = divmod(size, patch)
        if rest:
            raise SettingsError(f"size {size} is no multiple of the patch {patch}")
        total, tokens = _embed_macs(self.embed, grid, patch), prefix + grid**2
        for layer in self.layers:
            if isinstance(layer, ReduceDef):
                if grid % 2:
                    raise SettingsError(f"a grid of {grid} x {grid} patches cannot be halved")
                grid //= 2
                tokens = prefix + grid**2
                total += layer.dim * layer.out * (9 * grid**2 + prefix)
            elif layer.exists:
                total += _block_macs(layer, tokens)
        return total + prefix * self.width * self.classes


def _embed_macs(embed: EmbedDef, grid: int, patch: int) -> int:
    if embed.mid is None:
        return 3 * embed.dim * patch**2 * grid**2
    before = 112**2 * 9 * (3 * embed.mid + 2 * embed.mid**2)
    return before + embed.mid * embed.dim * (patch // 2) ** 2 * grid**2


def _block_macs(block: BlockDef, tokens: int) -> int:
    inner = block.heads * block.head_dim
    linear = block.dim * (4 * inner + 2 * block.hidden)
    return tokens * linear + 2 * tokens**2 * inner


def _embed(entry: Sequence[int]) -> EmbedDef:
    code, dim, *mid = entry
    known = {0: None, 4: MID, 5: mid[0] if mid else None}
    if (code == 5) != (len(mid) == 1) or len(mid) > 1:
        raise ValueError(f"{tuple(entry)} is no patch embedding")
    channels = known[code]
    return EmbedDef(int(dim), None if channels is None else int(channels))


def _layer(entry: Sequence[Any]) -> BlockDef | ReduceDef:
    if entry[0] == 3:
        _, dim, out = entry
        return ReduceDef(int(dim), int(out))
    code, (dim, heads, head_dim), (again, hidden), exists = entry
    if code != 1 or dim != again:
        raise ValueError(f"{entry} is no transformer block")
    return BlockDef(int(dim), int(heads), int(head_dim), int(hidden), bool(exists))


def _entry(layer: BlockDef | ReduceDef) -> tuple[Any, ...]:
    if isinstance(layer, ReduceDef):
        return (3, layer.dim, layer.out)
    dim, heads, head_dim, hidden, exists = layer
    return (1, (dim, heads, head_dim), (dim, hidden), int(exists))
