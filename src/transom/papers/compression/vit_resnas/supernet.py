"""The super-network: every sub-network inside one set of weights, many trained at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transom.errors import SettingsError
from transom.papers.compression.vit_resnas.definition import BlockDef, Definition, ReduceDef
from transom.papers.compression.vit_resnas.layers import Block, Kept
from transom.papers.compression.vit_resnas.masks import sliced_state, sorted_block
from transom.papers.compression.vit_resnas.model import ViTResNAS

Widths = tuple[int, ...]


@dataclass(frozen=True)
class Options:
    """What may be kept in one layer, each from large to small; empty where there is no choice.

    Attributes:
        dim: widths behind a patch embedding or a reduction.
        heads: channels of the merged heads, multiples of the head's width.
        hidden: units of the ffn.
        layer: for a block that may be left out, its width or 0, each as often as it shall be
            drawn.
    """

    dim: Widths = ()
    heads: Widths = ()
    hidden: Widths = ()
    layer: Widths = ()

    @classmethod
    def parse(cls, given: Any) -> Options:
        """From the official form: widths, a dict of `attn`, `mlp` and `layer`, or None."""
        if isinstance(given, Options):
            return given
        if given is None:
            return cls()
        if isinstance(given, dict):
            return cls((), _widths(given["attn"]), _widths(given["mlp"]), _widths(given["layer"]))
        return cls(_widths(given))


def _widths(given: Sequence[int] | None) -> Widths:
    return () if given is None else tuple(sorted((int(n) for n in given), reverse=True))


@dataclass(frozen=True)
class Space:
    """The networks that are searched.

    Attributes:
        largest: the definition that contains all others.
        options: one per entry of the official definition: patch embedding, layers, head.
    """

    largest: Definition
    options: tuple[Options, ...]

    def __post_init__(self) -> None:
        count = len(self.largest.layers) + 2
        if len(self.options) != count:
            raise SettingsError(
                f"options has {len(self.options)} entries, but the definition has {count}"
            )
        for i, (kept, full) in enumerate(zip(self.options, self._full(), strict=True)):
            for name in ("dim", "heads", "hidden", "layer"):
                widths, most = getattr(kept, name), getattr(full, name)
                if widths and widths[0] != most[0]:
                    raise SettingsError(
                        f"options[{i}] offers {widths} for {name}; the largest has to be what the "
                        f"definition has, {most[0] if most else 'nothing'}"
                    )
        for layer, kept in zip(self.largest.layers, self.options[1:], strict=False):
            if isinstance(layer, BlockDef) and any(n % layer.head_dim for n in kept.heads):
                raise SettingsError(
                    f"{kept.heads} are not all multiples of the head's width, {layer.head_dim}"
                )

    def _full(self) -> list[Options]:
        """What each entry of the largest network has, in the form of options."""
        full = [Options((self.largest.embed.dim,))]
        for layer in self.largest.layers:
            if isinstance(layer, ReduceDef):
                full.append(Options((layer.out,)))
            else:
                inner = layer.heads * layer.head_dim
                full.append(Options((), (inner,), (layer.hidden,), (layer.dim,)))
        return [*full, Options()]

    @classmethod
    def parse(cls, largest: Definition | Sequence[Any], options: Sequence[Any]) -> Space:
        """From the official forms.

        Raises:
            SettingsError: definition and options do not fit each other.
        """
        return cls(Definition.parse(largest), tuple(map(Options.parse, options)))


class SuperNet(ViTResNAS):
    """The network of a space's largest definition, masked down to sub-networks.

    Training draws `batch / example_per_arch` sub-networks for each call, image b served by number
    b mod that count; at every masking point the options are dealt out evenly, in an order of its
    own. Evaluation runs the whole network, or what `kept` says.

    Args:
        space: which sub-networks there are.
        example_per_arch: images of one batch that train the same sub-network.
        single_arch: one sub-network for the whole batch instead.
        warmup_epochs: epochs until all options are open; the largest come first.
        settings: of :class:`ViTResNAS`.
    """

    def __init__(
        self,
        space: Space,
        example_per_arch: int = 64,
        single_arch: bool = False,
        warmup_epochs: int = 15,
        **settings: Any,
    ) -> None:
        if example_per_arch < 1 or warmup_epochs < 0:
            raise SettingsError(
                f"example_per_arch is {example_per_arch} and warmup_epochs {warmup_epochs}; "
                "expected at least 1 and at least 0"
            )
        super().__init__(space.largest, **settings)
        self.space = space
        self.example_per_arch = example_per_arch
        self.single_arch = single_arch
        self.warmup_epochs = warmup_epochs
        self.epoch = 0

    def forward(self, x: Tensor, kept: Sequence[Kept] | None = None) -> Any:
        """Image (B, C, H, W) -> logits; `kept` from :meth:`draw` or :meth:`kept`."""
        if kept is None and self.training:
            kept = self.draw(x.shape[0])
        return self.forward_head(self.forward_features(x, kept))

    def set_epoch(self, epoch: int) -> None:
        """Open the options of this epoch; sort heads and units while the warm-up lasts.

        Args:
            epoch: counted from 0.
        """
        self.epoch = epoch
        if epoch <= self.warmup_epochs:
            self.sort()

    @torch.no_grad()
    def sort(self) -> None:
        """Heads and hidden units of every block by importance; the function stays the same."""
        for layer in self.blocks:
            if isinstance(layer, Block):
                layer.load_state_dict(
                    sorted_block(layer.state_dict(), layer.attn.heads), strict=False
                )

    def open(self, count: int) -> int:
        """How many of `count` options can be drawn in this epoch."""
        if not self.warmup_epochs:
            return count
        return max(1, min(1 + self.epoch * (count - 1) // self.warmup_epochs, count))

    def draw(self, batch: int, generator: torch.Generator | None = None) -> list[Kept]:
        """Sub-networks for one batch.

        Args:
            batch: images.
            generator: of the permutations; torch's own when None.

        Returns:
            What each image keeps in each layer.

        Raises:
            SettingsError: the batch cannot be divided among the sub-networks.
        """
        each = batch if self.single_arch else self.example_per_arch
        if batch % each:
            raise SettingsError(
                f"a batch of {batch} images cannot be divided into sub-networks of {each} images; "
                "choose a batch that is a multiple of example_per_arch, and drop the last one"
            )
        archs = batch // each

        def deal(widths: Widths) -> Tensor | None:
            if not widths:
                return None
            shown = widths[: self.open(len(widths))]
            cycles = -(-archs // len(shown))
            hand = torch.tensor(shown).repeat(cycles)
            hand = hand[torch.randperm(len(hand), generator=generator)[:archs]]
            return hand.repeat(each).to(self.tokens.device)

        return chained(
            [Kept(deal(o.dim), deal(o.heads), deal(o.hidden), deal(o.layer)) for o in self._options]
        )

    def kept(self, definition: Definition | Sequence[Any], batch: int = 1) -> list[Kept]:
        """What one sub-network keeps, for the images of a batch.

        Args:
            definition: with the blocks of the largest; those left out do not exist.
            batch: images.

        Raises:
            SettingsError: it is no sub-network of this one.
        """
        wanted = self._inside(definition)
        device = self.tokens.device

        def full(n: int) -> Tensor:
            return torch.full((batch,), n, device=device)

        found = [Kept(full(wanted.embed.dim))]
        for layer in wanted.layers:
            if isinstance(layer, ReduceDef):
                found.append(Kept(full(layer.out)))
            else:
                inner, stays = layer.heads * layer.head_dim, full(int(layer.exists)) > 0
                found.append(Kept(None, full(inner), full(layer.hidden), stays))
        return found

    def subnetwork(self, definition: Definition | Sequence[Any]) -> ViTResNAS:
        """A sub-network on its own, with the leading part of every weight.

        Args:
            definition: with the blocks of the largest; those left out do not exist.

        Returns:
            A network without those blocks, whose layers are numbered anew.

        Raises:
            SettingsError: it is no sub-network of this one.
        """
        wanted = self._inside(definition)
        size = (self.grid[0] * self.patch_size, self.grid[1] * self.patch_size)
        made = ViTResNAS(
            wanted.present(),
            size,
            self.patch_size,
            self.in_chans,
            self.num_classes,
            self.global_pool,
            distilled=self.dst_head is not None,
            patch_output=self.patch_head is not None,
        )
        layers = enumerate(wanted.layers)
        home = [i for i, layer in layers if isinstance(layer, ReduceDef) or layer.exists]
        names = {name: _renumbered(name, home) for name in made.state_dict()}
        own = self.state_dict()
        source = {name: own[names[name]] for name in names}
        shapes = {name: tuple(value.shape) for name, value in made.state_dict().items()}
        made.load_state_dict(sliced_state(source, shapes))
        return made.to(self.tokens).train(self.training)

    @property
    def _options(self) -> tuple[Options, ...]:
        return self.space.options[:-1]

    def _inside(self, definition: Definition | Sequence[Any]) -> Definition:
        wanted, largest = Definition.parse(definition), self.definition
        fits = len(wanted.layers) == len(largest.layers) and wanted.embed.mid == largest.embed.mid
        pairs = [(wanted.embed, largest.embed), *zip(wanted.layers, largest.layers, strict=False)]
        for small, big in pairs:
            fits = fits and type(small) is type(big)
            fits = fits and all((a or 0) <= (b or 0) for a, b in zip(small, big, strict=True))
            if fits and isinstance(small, BlockDef) and isinstance(big, BlockDef):
                fits = small.head_dim == big.head_dim
        if not fits:
            raise SettingsError(
                f"{wanted.tuples()} is no sub-network of {largest.tuples()}; expected the same "
                "layers and heads of the same width, none larger (a block that is left out stays "
                "in the definition with a 0 at its end)"
            )
        return wanted


def chained(kept: list[Kept]) -> list[Kept]:
    """A block that is left out takes the removable blocks right behind it along.

    `stays` arrives as widths drawn (0 to leave the block out) and becomes bool.
    """
    gone: Tensor | None = None
    for i, now in enumerate(kept):
        if now.stays is None:
            gone = None
            continue
        out = now.stays == 0
        gone = out if gone is None else out | gone
        kept[i] = now._replace(stays=~gone)
    return kept


def _renumbered(name: str, home: list[int]) -> str:
    """The name in the super-network of a parameter of a sub-network."""
    if not name.startswith("blocks."):
        return name
    _, number, rest = name.split(".", 2)
    return f"blocks.{home[int(number)]}.{rest}"
