"""DyVTE: a small router behind each decoder layer decides when all image tokens leave.

In a decoder that sees, image tokens stop to matter at some depth that differs from prompt to
prompt. Behind layer l, with h (B, N, D) as the layer leaves it:

    f = [mean of h over the text behind the image without the last token, h of the last token]
    g = W2 GELU(W1 f)                       W1: 2 D -> width, W2: width -> 2, no biases
    exit behind l  if  g_1 > g_0

From the next layer on the image tokens are gone: (B, N, D) becomes (B, N - n, D). Positions stay
what they were; layers up to l keep the image in their cache, later ones do not. Routers only look
while the prompt is read. A fixed `exit_layer` is the form without training.

Training (`exit_objective`): the base is frozen; one random layer a step; the same batch runs with
the image and with the image hidden behind that layer; the router learns to exit where both agree.

Source: Wu et al., Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and
the Empirical Findings, 2024; official code DoubtedSteam/DyVTE@b4a3396 (no licence; this file is
written from the mathematics). Checked against it: prefill and cached decoding with an exit, the
doubled training pass, the routers' loss. Not checked: whole LLaVA models, no router was published.

Differences, all deliberate: any number of images at any place instead of 576 tokens behind 35;
every prompt of a batch decides for itself (where some stay, the image of the others is hidden from
later layers, and leaves when the last one does); a prompt without an image or without text behind
it never exits, where the official code compares NaN; label 0 counts as a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import transom
from transom.errors import SettingsError, TokensError
from transom.hosts.base import Host
from transom.hosts.hf_decoder import PICTURES
from transom.registry import Method, Offer, Takes
from transom.slots import Ask, Fill
from transom.tokens import Record, Tokens
from transom.watching import Trace


class Router(nn.Module):
    """Scores for staying and for leaving, from what the text holds.

    Args:
        dim: channels D of the decoder.
        width: of the hidden layer.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(2 * dim, width, bias=False)
        self.w2 = nn.Linear(width, 2, bias=False)
        for layer in (self.w1, self.w2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, f: Tensor) -> Tensor:
        """Logits (B, 2) of (stay, leave) from f (B, 2 D)."""
        return self.w2(F.gelu(self.w1(f)))


def text_state(h: Tensor, visual: Tensor, last: Tensor | None = None) -> Tensor:
    """What a router looks at.

    Args:
        h: (B, N, D) behind a layer.
        visual: (B, N) bool.
        last: (B,) position of the last token of each prompt; the last of the sequence when None.

    Returns:
        (B, 2 D): mean over the text behind the image without the last token, and the last token;
        the mean is NaN where there is no such text.
    """
    batch, count = visual.shape
    places = torch.arange(count, device=h.device)
    end = last if last is not None else h.new_full((batch,), count - 1, dtype=torch.long)
    begin = torch.where(visual, places, -1).amax(1)  # the last token of an image
    behind = (places > begin[:, None]) & (places < end[:, None])
    weight = behind.to(h.dtype) / behind.sum(1, keepdim=True)
    mean = (weight[:, None] @ h)[:, 0]
    return torch.cat([mean, h[torch.arange(batch, device=h.device), end]], -1)


class Exit(nn.Module):
    """Token step behind a layer: the image leaves if the router says so, or always.

    Attributes:
        router: decides; None exits always.
        hides: whether images are hidden from later layers and stay in the sequence.
    """

    def __init__(self, router: Router | None, hides: bool = False) -> None:
        super().__init__()
        self.router = router
        self.hides = hides

    def forward(self, tokens: Tokens, attended: Ask) -> Tokens:
        visual = tokens.record.visual
        if visual is None or not visual.any():
            return tokens
        seen = visual if tokens.record.valid is None else visual & tokens.record.valid
        leaves = seen.any(1)  # those that have not left before
        if self.router is not None:
            logits = self.router(text_state(tokens.x, visual))
            if attended.memory is not None:
                attended.memory["gate"] = logits
            leaves = leaves & (logits[:, 1] > logits[:, 0])
        if not leaves.any():
            return tokens
        gone = visual & (leaves | ~seen.any(1))[:, None]
        return self._without(tokens, gone)

    def _without(self, tokens: Tokens, gone: Tensor) -> Tokens:
        record = tokens.record
        stays = (~gone).sum(1)
        assert record.visual is not None
        all_left = torch.equal(gone, record.visual) and bool((stays == stays[0]).all())
        if all_left and not self.hides:
            order = gone.long().argsort(dim=1, stable=True)
            return _shown(tokens, record).keep(order[:, : int(stays[0])])
        valid = ~gone if record.valid is None else record.valid & ~gone
        return Tokens(tokens.x, replace(record, valid=valid))


def _shown(tokens: Tokens, record: Record) -> Tokens:
    """The tokens without a note of what is hidden: what was hidden leaves now."""
    return Tokens(tokens.x, replace(record, valid=None))


@dataclass(frozen=True)
class DyVTE(Method):
    """Dynamic visual-token exit.

    Attributes:
        exit_layer: layer behind which images leave always, counted from 0; None lets the routers
            decide, which have to be trained.
        width: hidden channels of a router.
        hide: hide images from later layers instead of taking them out of the sequence.
    """

    exit_layer: int | None = None
    width: int = 2048
    hide: bool = False
    takes: ClassVar[Takes] = "decoder"

    def __post_init__(self) -> None:
        if self.exit_layer is not None and self.exit_layer < 0:
            raise SettingsError(
                f"exit_layer is {self.exit_layer!r}; expected the number of a layer, from 0, or "
                "None to let routers decide"
            )
        if self.width < 1:
            raise SettingsError(f"width is {self.width!r}; expected at least one hidden channel")

    @property
    def needs_training(self) -> bool:
        """Whether routers are there to be trained."""
        return self.exit_layer is None

    def fit(self, host: Host) -> list[Fill]:
        if self.exit_layer is None:
            steps: list[Exit | None] = [
                Exit(Router(host.width, self.width), self.hide) for _ in range(host.depth - 1)
            ]
            return [Fill(after=step, asks=False, drops=True) for step in [*steps, None]]
        if self.exit_layer >= host.depth - 1:
            raise SettingsError(
                f"exit_layer is {self.exit_layer}, but this decoder has {host.depth} layers and "
                f"nothing is saved behind the last one; expected 0 to {host.depth - 2}"
            )
        step = Exit(None, self.hide)
        return [
            Fill(after=step if i == self.exit_layer else None, asks=False, drops=True)
            for i in range(host.depth)
        ]

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        return [{"exit_layer": max(0, round(depth * part) - 1)} for part in (0.75, 0.5, 0.25)]


def exit_layers(trace: Trace, images: Tensor) -> list[int | None]:
    """Behind which layer the image of each prompt left, in a traced call.

    Args:
        trace: of :func:`transom.trace`.
        images: (B, N0) bool, the positions of images in the prompts.

    Returns:
        A layer or None for each prompt.
    """
    found: list[int | None] = [None] * len(images)
    for i, record in enumerate(trace.tokens):
        if record.index is None:
            raise TokensError("the trace holds no provenance; use transom.trace(model)")
        for b, image in enumerate(images):
            here = record.index[b, image]
            alive = here >= 0
            if record.valid is not None:
                alive = alive & record.valid[b, here.clamp(min=0)]
            if found[b] is None and image.any() and not alive.any():
                found[b] = i
    return found


class Exits(NamedTuple):
    """Where images left, over many prompts.

    layers: behind which layer the image of each prompt left; None where it stayed.
    depth: layers of the decoder.
    """

    layers: tuple[int | None, ...]
    depth: int

    @property
    def counts(self) -> dict[int | None, int]:
        """Prompts by layer, from early to late; None stands last, for those that kept theirs."""
        return {i: self.layers.count(i) for i in (*range(self.depth), None) if i in self.layers}

    @property
    def mean(self) -> float:
        """Layers that an image went through on average."""
        passed = [self.depth if layer is None else layer + 1 for layer in self.layers]
        return sum(passed) / len(passed)


def exits(model: nn.Module, calls: Iterable[Mapping[str, Any]]) -> Exits:
    """Run prompts, and say where their images left.

    Args:
        model: that sees, with DyVTE fitted to its decoder.
        calls: arguments of the model with `input_ids`, a batch of prompts each.

    Raises:
        FitError: nothing is fitted.
        SettingsError: no prompt holds an image.
    """
    found: list[int | None] = []
    depth = 0
    for given in calls:
        with torch.no_grad(), transom.trace(model) as trace:
            model(**given)
        depth = len(trace.tokens)
        images = _images(model, given["input_ids"])
        left = exit_layers(trace, images)
        found += [layer for layer, image in zip(left, images, strict=True) if bool(image.any())]
    if not found:
        raise SettingsError("no prompt holds an image, so none can leave; give prompts with images")
    return Exits(tuple(found), depth)


def _images(model: nn.Module, words: Tensor) -> Tensor:
    """(B, N) bool, which words stand for pieces of images."""
    ids = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        ids |= {getattr(config, name, None) for name in PICTURES}
    known = [i for i in ids if isinstance(i, int)]
    return torch.isin(words, words.new_tensor(known))


def routers(model: nn.Module) -> list[Router]:
    """The routers that :class:`DyVTE` has put into a model, in the order of its layers."""
    return [module for module in model.modules() if isinstance(module, Router)]


class Agreement(NamedTuple):
    """What the routers learn from.

    full, without: (B,) mean cross-entropy of the answers with and without the image.
    labels: (B,) int64, 1 where leaving is right.
    loss: cross-entropy of the router.
    """

    full: Tensor
    without: Tensor
    labels: Tensor
    loss: Tensor


def router_loss(
    gate: Tensor,
    full: Tensor,
    without: Tensor,
    labels: Tensor,
    agree: float = 0.99,
    worse: float = 1.03,
    ignore: int | None = None,
) -> Agreement:
    """Labels from comparing answers with and without the image, and the loss of a router.

    Args:
        gate: (B, 2) logits of (stay, leave).
        full, without: (B, N, V) logits of the answers.
        labels: (B, N) words, -100 where none is asked for.
        agree: part of the words that both have to choose alike.
        worse: how much larger the loss without the image may be.
        ignore: another label that is not asked for; the official code leaves out word 0.

    Returns:
        See :class:`Agreement`.
    """
    target = labels[:, 1:]
    asked = target >= 0 if ignore is None else (target >= 0) & (target != ignore)
    number = asked.sum(1)
    losses, choices = [], []
    for logits in (full[:, :-1], without[:, :-1]):
        words = F.cross_entropy(logits.mT, target.clamp(min=0), reduction="none")
        losses.append((words * asked).sum(1) / number)
        choices.append(logits.argmax(-1))
    alike = ((choices[0] == choices[1]) & asked).sum(1) / number
    leave = ((alike > agree) & (losses[1] < worse * losses[0])).long()
    return Agreement(losses[0], losses[1], leave, F.cross_entropy(gate, leave))


@contextmanager
def hidden_behind(model: nn.Module, layer: int) -> Iterator[nn.Module]:
    """`model` with images hidden from all layers behind `layer`, inside this context."""
    transom.apply(model, DyVTE(exit_layer=layer, hide=True), check=False)
    try:
        yield model
    finally:
        transom.remove(model, DyVTE.slug)


def paired_forward(
    model: nn.Module, router: Router, layer: int, visual: Tensor, last: Tensor, **given: Any
) -> tuple[Any, Any, Tensor]:
    """One training pass: with the image, without it behind `layer`, and the router's opinion.

    Args:
        model: with a decoder; nothing fitted to that.
        router: of this layer.
        layer: where the router stands.
        visual: (B, N) bool.
        last: (B,) last token of each prompt, before the answer.
        **given: arguments of the model.

    Returns:
        Outputs with and without the image, and the logits (B, 2); no gradient of those reaches
        the model.
    """
    name = f"blocks.{layer}.residual.post"
    with transom.capture(model, name, decoder=True, check=False) as seen:
        full = model(**given)
    gate = router(text_state(seen[name], visual, last))
    with hidden_behind(model, layer):
        without = model(**given)
    return full, without, gate


OFFERS = (Offer("objective", "dyvte-router", router_loss),)
