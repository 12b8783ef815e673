"""Evolution of network definitions under a budget of multiply-adds."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from transom.errors import SettingsError
from transom.papers.compression.vit_resnas.definition import BlockDef, Definition, ReduceDef
from transom.papers.compression.vit_resnas.model import ViTResNAS
from transom.papers.compression.vit_resnas.supernet import Options, Space, SuperNet

TRIES = 10_000
"""Draws after which a budget is called out of reach."""
NARROW = 100
"""Shrinking steps on heads and hidden units alone, before widths and blocks may go as well."""
REPEATS = 100
"""Crossovers in a row that bring nothing new, after which one is taken again."""


@functools.lru_cache(maxsize=4096)
def measured_macs(definition: Definition, size: int = 224, patch: int = 14) -> int:
    """Multiply-adds of one image, counted by torch while the network runs on the meta device.

    Args:
        definition: the network.
        size: height and width of the image, pixels.
        patch: height and width of a patch, pixels.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net = ViTResNAS(definition, size, patch).eval()
        net(torch.empty(1, 3, size, size))
    return int(counter.get_total_flops()) // 2


class Gene(NamedTuple):
    """What can change in one entry of a definition; zeros where there is nothing."""

    dim: int = 0
    heads: int = 0
    hidden: int = 0
    exists: bool = True


def genes_of(definition: Definition) -> list[Gene]:
    """One gene for the patch embedding and one for each layer; heads as channels."""
    genes = [Gene(definition.embed.dim)]
    for layer in definition.layers:
        if isinstance(layer, ReduceDef):
            genes.append(Gene(layer.out))
        else:
            inner = layer.heads * layer.head_dim
            genes.append(Gene(0, inner, layer.hidden, layer.exists))
    return genes


@dataclass(frozen=True)
class Found:
    """One network and how good it is."""

    definition: Definition
    score: float
    macs: int


def inherited_accuracy(
    supernet: SuperNet, images: Tensor, labels: Tensor, batch: int = 256
) -> Callable[[Definition], float]:
    """Scores a definition by the accuracy of the super-network masked down to it.

    Args:
        supernet: trained.
        images: (N, C, H, W) that it was not trained on.
        labels: (N,) int64.
        batch: images at a time.

    Returns:
        What :class:`Evolution` evaluates with; it leaves the mode of the super-network alone.
    """

    @torch.no_grad()
    def accuracy(definition: Definition) -> float:
        training = supernet.training
        supernet.eval()
        right = 0
        for some, wanted in zip(images.split(batch), labels.split(batch), strict=True):
            logits = supernet(some, supernet.kept(definition, len(some)))
            right += int((logits.argmax(-1) == wanted).sum())
        supernet.train(training)
        return right / len(labels)

    return accuracy


@dataclass
class Evolution:
    """Evolutionary search (sec. 4.4).

    First `population` random networks, then `iterations` times `mutations` and `crossovers` of
    the `parents` best; every network seen counts, and none is scored twice.

    Args:
        space: which networks there are.
        evaluate: score of a definition, higher is better; see :func:`inherited_accuracy`.
        budget: most multiply-adds a network may have.
        low: part of the budget that it has to use.
        population: random networks at first.
        iterations: generations after that.
        parents: how many of the best are parents.
        mutations, crossovers: children of one generation.
        probability: of each item to mutate.
        seed: of all choices.
        cost: multiply-adds of a definition.

    Raises:
        SettingsError: a number is out of range, or the budget is out of reach.
    """

    space: Space
    evaluate: Callable[[Definition], float]
    budget: float
    low: float = 0.975
    population: int = 500
    iterations: int = 20
    parents: int = 75
    mutations: int = 75
    crossovers: int = 75
    probability: float = 0.3
    seed: int = 0
    cost: Callable[[Definition], int] = measured_macs
    seen: dict[Definition, Found] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.budget <= 0 or not 0 <= self.low <= 1 or not 0 < self.probability <= 1:
            raise SettingsError(
                f"budget is {self.budget}, low {self.low}, probability {self.probability}; "
                "expected a positive budget, a part of it, and a probability above 0"
            )
        if not 2 <= self.parents <= self.population:
            raise SettingsError(
                f"parents is {self.parents} and population {self.population}; expected at least 2 "
                "parents, and no more than the population"
            )
        self.random = random.Random(self.seed)
        least, most = self.cost(self._smallest()), self.cost(self.space.largest)
        if least > self.budget or most < self.low * self.budget:
            raise SettingsError(
                f"the budget of {self.budget:.4g} multiply-adds, of which {self.low:.1%} have to "
                f"be used, is out of reach: networks of the space have {least:.4g} to {most:.4g}"
            )

    def run(self) -> Found:
        """Search; returns the best network. `seen` holds all of them, by definition."""
        self._score([self._new(self._sampled) for _ in range(self.population)])
        for _ in range(self.iterations):
            best = self.best(self.parents)
            children = [self._new(partial(self._mutated, best)) for _ in range(self.mutations)]
            children += [self._new(partial(self._crossed, best)) for _ in range(self.crossovers)]
            self._score(children)
        return self.best(1)[0]

    def best(self, count: int) -> list[Found]:
        """The best networks seen so far; of equals the one seen first."""
        return sorted(self.seen.values(), key=lambda found: -found.score)[:count]

    def _score(self, definitions: list[Definition]) -> None:
        for one in definitions:
            if one not in self.seen:
                self.seen[one] = Found(one, self.evaluate(one), self.cost(one))

    def _new(self, make: Callable[[], Definition | None]) -> Definition:
        """A network within the budget, unless many tries bring none that was not seen before."""
        known: Definition | None = None
        repeats = 0
        for _ in range(TRIES):
            made = make()
            if made is None or not self.low * self.budget <= self.cost(made) <= self.budget:
                continue
            if made not in self.seen:
                return made
            known, repeats = made, repeats + 1
            if repeats > REPEATS:
                break
        if known is None:
            raise SettingsError(
                f"no network of the space has between {self.low * self.budget:.4g} and "
                f"{self.budget:.4g} multiply-adds in {TRIES} tries: choose another budget or a "
                "smaller `low`"
            )
        return known

    def _sampled(self) -> Definition | None:
        """Random widths and blocks, then one random item smaller at a time until it fits."""
        genes = [
            gene._replace(
                dim=self._any(kept.dim, gene.dim),
                exists=not kept.layer or self.random.choice(kept.layer) > 0,
            )
            for gene, kept in zip(genes_of(self.space.largest), self._options, strict=True)
        ]
        made, step = self._grown(genes), 0
        while made is None or self.cost(made) > self.budget:
            genes = self._shrunk(genes, everything=step >= NARROW or made is None)
            made, step = self._grown(genes), step + 1
        return made

    def _shrunk(self, genes: list[Gene], *, everything: bool) -> list[Gene]:
        """One item of one entry takes its next smaller option."""
        blocks = [i for i, kept in enumerate(self._options) if everything or kept.heads]
        i = self.random.choice(blocks or range(len(genes)))
        gene, kept = genes[i], self._options[i]
        items = [name for name in ("dim", "heads", "hidden") if getattr(kept, name)]
        items += ["exists"] if everything and kept.layer else []
        if not items:
            return genes
        item = self.random.choice(items)
        if item == "exists":
            gene = gene._replace(exists=gene.exists and self.random.choice(kept.layer) > 0)
        else:
            now = getattr(gene, item)
            gene = gene._replace(**{item: next((n for n in getattr(kept, item) if n < now), now)})
        return [*genes[:i], gene, *genes[i + 1 :]]

    def _mutated(self, best: list[Found]) -> Definition | None:
        """A parent of which each item is drawn anew with some probability."""
        genes = genes_of(self.random.choice(best).definition)
        for i, kept in enumerate(self._options):
            for item in ("dim", "heads", "hidden"):
                if getattr(kept, item) and self.random.random() <= self.probability:
                    genes[i] = genes[i]._replace(**{item: self.random.choice(getattr(kept, item))})
            if kept.layer and self.random.random() <= self.probability:
                genes[i] = genes[i]._replace(exists=not genes[i].exists)
        return self._grown(genes)

    def _crossed(self, best: list[Found]) -> Definition | None:
        """Each item from one of two parents."""
        one, other = (genes_of(parent.definition) for parent in self.random.sample(best, 2))
        coin = self.random.choice
        mixed = [
            Gene(
                coin((a.dim, b.dim)),
                coin((a.heads, b.heads)),
                coin((a.hidden, b.hidden)),
                coin((a.exists, b.exists)),
            )
            for a, b in zip(one, other, strict=True)
        ]
        return self._grown(mixed)

    def _smallest(self) -> Definition:
        genes = [
            Gene(
                min(kept.dim or (gene.dim,)),
                min(kept.heads or (gene.heads,)),
                min(kept.hidden or (gene.hidden,)),
                not kept.layer,
            )
            for gene, kept in zip(genes_of(self.space.largest), self._options, strict=True)
        ]
        return self._grown(genes) or self.space.largest

    def _any(self, options: tuple[int, ...], otherwise: int) -> int:
        return self.random.choice(options) if options else otherwise

    @property
    def _options(self) -> tuple[Options, ...]:
        return self.space.options[:-1]

    def _grown(self, genes: list[Gene]) -> Definition | None:
        """The definition of these genes; None where a reduction would narrow the network."""
        dim, gone = genes[0].dim, False
        layers: list[BlockDef | ReduceDef] = []
        for layer, gene, kept in zip(
            self.space.largest.layers, genes[1:], self._options[1:], strict=True
        ):
            if isinstance(layer, ReduceDef):
                if gene.dim < dim:
                    return None
                layers.append(ReduceDef(dim, gene.dim))
                dim, gone = gene.dim, False
                continue
            # as in the super-network: one that is left out takes the removable ones behind along
            gone = bool(kept.layer) and (gone or not gene.exists)
            heads = gene.heads // layer.head_dim
            layers.append(BlockDef(dim, heads, layer.head_dim, gene.hidden, not gone))
        largest = self.space.largest
        return Definition(largest.embed._replace(dim=genes[0].dim), tuple(layers), largest.classes)
