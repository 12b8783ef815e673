"""What a method takes the place of, and what a backbone is made of: read off running models.

Nothing here is written down by hand. A method is fitted to a small host with twelve blocks and its
fills are looked at; a backbone is built and run once, and the shapes between its parts are noted.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from markupsafe import Markup, escape
from torch import Tensor, nn

import transom
from transom import hosts, registry
from transom.errors import TransomError
from transom.hosts import Host
from transom.registry import Backbone, Method
from transom.slots import Fill

logger = logging.getLogger(__name__)

FRONT = ("tokenizer", "position")
INSIDE = ("norm", "attention", "tokens", "ffn")
SLOTS = (*FRONT, *INSIDE)
DEPTH = 12

# The seed is everybody's, and so are the libraries that load a part of themselves when it is asked
# for; threads of a server take turns.
_ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True)
class Anatomy:
    """Which slots a method fills in a host of twelve blocks.

    Attributes:
        front: slots in front of the blocks.
        blocks: slots of each block.
        lengths: tokens behind each block; empty where their number stays or is not known.
        start: tokens in front of the first block.
        settings: under which this was seen; empty for the defaults.
        host: which one, in words.
    """

    front: tuple[str, ...]
    blocks: tuple[tuple[str, ...], ...]
    lengths: tuple[int, ...]
    start: int
    settings: dict[str, Any]
    host: str

    @property
    def slots(self) -> tuple[str, ...]:
        """Every slot that is filled somewhere, from front to back."""
        taken = {*self.front, *(slot for block in self.blocks for slot in block)}
        return tuple(slot for slot in SLOTS if slot in taken)


@dataclass(frozen=True)
class Stage:
    """Consecutive parts of a backbone whose outputs have one shape.

    Attributes:
        part: name that most of the modules share.
        count: how many modules.
        places: (h, w) of the map, or (N,) of a sequence.
        width: channels.
    """

    part: str
    count: int
    places: tuple[int, ...]
    width: int


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings that `apply` gives to someone who means to use the model."""
    log = logging.getLogger("transom")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


@functools.cache
def anatomy(slug: str) -> Anatomy | None:
    """What the method of a room fills; None for a room without one, or where it fits neither host.

    Args:
        slug: of a room.
    """
    method = registry.rooms()[slug].method
    if method is None:
        return None
    with _ONE_AT_A_TIME, torch.random.fork_rng(), torch.no_grad(), quietly():
        torch.manual_seed(0)
        build = _decoder if method.takes == "decoder" else _encoder
        model, host, name = build()
        patches = (host.grid[0] * host.grid[1]) if host.grid else 196
        choices: list[dict[str, Any]] = [{}, *method.grid(host.depth, patches)]
        for settings in choices:
            found = _seen(model, host, method, settings, name)
            if found is not None and found.slots:
                return found
    logger.info("%s fills nothing in %s", slug, name)
    return None


def _seen(
    model: nn.Module, host: Host, method: type[Method], settings: dict[str, Any], name: str
) -> Anatomy | None:
    try:
        chosen = method(**settings)
        fills: list[Fill] = chosen.fit(host)
        front = chosen.front(host).slots()
        blocks = tuple(tuple(s for s in INSIDE if s in fill.slots()) for fill in fills)
        lengths: tuple[int, ...] = ()
        if any("tokens" in block for block in blocks) and method.takes == "encoder":
            lengths = _lengths(model, chosen)
    except TransomError as error:
        logger.info("%s with %s: %s", method.slug, settings, error)
        return None
    start = host.prefix + (host.grid[0] * host.grid[1] if host.grid else 0)
    ordered = tuple(s for s in FRONT if s in front)
    return Anatomy(ordered, blocks, lengths, start, settings, name)


def _lengths(model: nn.Module, method: Method) -> tuple[int, ...]:
    transom.apply(model, method, check=False)
    try:
        with transom.trace(model) as trace:
            model(torch.randn(1, 3, 224, 224))
        return tuple(trace.lengths)
    finally:
        transom.remove(model)


def _encoder() -> tuple[nn.Module, Host, str]:
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=48, num_heads=3, depth=DEPTH, num_classes=0
    ).eval()
    return model, hosts.find(model), "a ViT of 12 blocks with 14×14 patches"


def _decoder() -> tuple[nn.Module, Host, str]:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=DEPTH,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    return model, hosts.find(model, decodes=True), "a Llama of 12 layers"


def stages(backbone: Backbone) -> list[Stage]:
    """The shapes a backbone runs through, from pixels to features.

    Args:
        backbone: registered with timm.
    """
    import timm

    with _ONE_AT_A_TIME, torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = timm.create_model(backbone.name).eval()
        seen: list[tuple[str, tuple[int, ...]]] = []
        hooks = [
            part.register_forward_hook(lambda _m, _i, out, name=name: _note(seen, name, out))
            for name, part in _blocks(model)
        ]
        try:
            model(torch.zeros(1, 3, backbone.size, backbone.size))
        finally:
            for hook in hooks:
                hook.remove()
    found = []
    for shape, own in itertools.groupby(seen, key=lambda note: note[1]):
        names = [name for name, _ in own]
        stems = Counter(re.sub(r"[.\d]+$", "", name.partition(".")[0]) for name in names)
        found.append(Stage(stems.most_common(1)[0][0], len(names), shape[:-1], shape[-1]))
    return found


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Parts whose outputs are features: children, and what lists of children hold."""
    for name, child in model.named_children():
        inner = list(child.named_children())
        listing = isinstance(child, (nn.ModuleList, nn.Sequential)) and len(inner) > 1
        if not listing:
            yield name, child
            continue
        for number, grandchild in inner:
            blocks = getattr(grandchild, "blocks", None)
            if isinstance(blocks, (nn.ModuleList, nn.Sequential)) and len(blocks) > 1:
                yield from ((f"{name}.{number}", block) for block in blocks)
            else:
                yield f"{name}.{number}", grandchild


def _note(seen: list[tuple[str, tuple[int, ...]]], name: str, out: Any) -> None:
    if isinstance(out, tuple) and out and isinstance(out[0], Tensor):
        out = out[0]
    if not isinstance(out, Tensor) or out.dim() not in (3, 4):
        return
    shape = tuple(out.shape[1:])
    if len(shape) == 3 and shape[1] == shape[2]:
        shape = (shape[1], shape[2], shape[0])  # channels first
    seen.append((name, shape))


def slot_map(found: Anatomy) -> Markup:
    """The slots of every block as a picture, filled ones lit, and the tokens behind each block."""
    left, top, cell, gap, row = 92, 26, 38, 5, 30
    front_width = 70 if found.front else 0
    across = left + front_width + len(found.blocks) * (cell + gap)
    bars = 74 if found.lengths else 0
    height = top + len(INSIDE) * (row + gap) + bars + 8
    parts = []
    for i, slot in enumerate(INSIDE):
        y = top + i * (row + gap)
        parts.append(f'<text x="{left - 10}" y="{y + 20}" text-anchor="end">{slot}</text>')
        for b, block in enumerate(found.blocks):
            x = left + front_width + b * (cell + gap)
            lit = " lit" if slot in block else ""
            says = f"block {b + 1}: {slot} {'is filled' if lit else 'stays the host’s own'}"
            parts.append(
                f'<rect class="pane{lit}" x="{x}" y="{y}" width="{cell}" height="{row}" rx="4">'
                f"<title>{says}</title></rect>"
            )
    for b in range(len(found.blocks)):
        x = left + front_width + b * (cell + gap) + cell // 2
        parts.append(
            f'<text class="small" x="{x}" y="{top - 9}" text-anchor="middle">{b + 1}</text>'
        )
    tall = len(INSIDE) * (row + gap) - gap
    for i, slot in enumerate(found.front):
        x = left + i * 32
        parts.append(
            f'<rect class="pane lit" x="{x}" y="{top}" width="27" height="{tall}" rx="4"/>'
            f'<text class="onlit" transform="translate({x + 18} {top + tall / 2}) rotate(-90)" '
            f'text-anchor="middle">{slot}</text>'
        )
    if found.lengths:
        parts += _bars(found, left + front_width, top + tall + 14, cell, gap, bars - 16)
        y = top + tall + bars
        parts.append(f'<text x="{left - 10}" y="{y - 16}" text-anchor="end">tokens left</text>')
    said = escape(
        f"Fills {', '.join(found.slots)} in "
        f"{sum(bool(b) for b in found.blocks)} of {len(found.blocks)} blocks"
    )
    return Markup(
        f'<svg class="slots" viewBox="0 0 {across} {height}" role="img" aria-label="{said}">'
        f"{''.join(parts)}</svg>"
    )


def _bars(found: Anatomy, left: int, top: int, cell: int, gap: int, height: int) -> Iterator[str]:
    most = max(found.start, *found.lengths)
    for b, length in enumerate(found.lengths):
        x, tall = left + b * (cell + gap), max(2.0, (height - 14) * length / most)
        y = top + height - 14 - tall
        yield f'<rect class="bar" x="{x}" y="{y:.1f}" width="{cell}" height="{tall:.1f}" rx="3"/>'
        yield (
            f'<text class="small" x="{x + cell / 2}" y="{top + height}" text-anchor="middle">'
            f"{length}</text>"
        )


def pyramid(found: list[Stage]) -> Markup:
    """Stages of a backbone as slabs: as tall as their map, as deep as their channels."""
    slot = min(118, max(74, 760 // max(1, len(found))))
    across, floor = slot * len(found), 168
    most = max(_places(stage) for stage in found)
    widest = max(stage.width for stage in found)
    parts = []
    for i, stage in enumerate(found):
        tall = max(10.0, 128 * (_places(stage) / most) ** 0.5)
        deep = max(5.0, (slot - 22) * (stage.width / widest) ** 0.7)
        x, y = i * slot + (slot - deep) / 2, floor - tall
        shape = "×".join(map(str, stage.places))
        for copy in range(min(stage.count, 4) - 1, -1, -1):
            parts.append(
                f'<rect class="slab{"" if copy else " front"}" x="{x + 3 * copy:.1f}" '
                f'y="{y - 3 * copy:.1f}" width="{deep:.1f}" height="{tall:.1f}" rx="3"/>'
            )
        middle = i * slot + slot / 2
        times = f" · {stage.count}×" if stage.count > 1 else ""
        for text, down, kind in (
            (stage.part, 18, "small"),
            (f"{shape}{times}", 34, ""),
            (f"{stage.width} channels", 50, "small"),
        ):
            parts.append(
                f'<text class="{kind}" x="{middle}" y="{floor + down}" text-anchor="middle">'
                f"{escape(text)}</text>"
            )
    said = "Stages: " + ", ".join(
        f"{'×'.join(map(str, s.places))} places of {s.width} channels" for s in found
    )
    return Markup(
        f'<svg class="slots pyramid" viewBox="0 0 {across} {floor + 60}" role="img" '
        f'aria-label="{escape(said)}">{"".join(parts)}</svg>'
    )


def _places(stage: Stage) -> int:
    total = 1
    for side in stage.places:
        total *= side
    return total


def fanlight(slots: tuple[str, ...], whole: bool = False) -> Markup:
    """The sign of a paper: a fanlight with one pane a slot, lit where the slot is filled.

    Args:
        slots: that are filled.
        whole: whether it is a whole architecture, so that every pane is lit.
    """
    middle, outer, inner = (30.0, 31.0), 28.0, 9.0
    panes = []
    for i, slot in enumerate(SLOTS):
        a0 = math.pi * (1 - i / len(SLOTS)) - 0.035
        a1 = math.pi * (1 - (i + 1) / len(SLOTS)) + 0.035
        corners = [
            (middle[0] + r * math.cos(a), middle[1] - r * math.sin(a))
            for r, a in ((outer, a0), (outer, a1), (inner, a1), (inner, a0))
        ]
        (ax, ay), (bx, by), (cx, cy), (dx, dy) = corners
        lit = " lit" if whole or slot in slots else ""
        panes.append(
            f'<path class="pane{lit}" d="M{ax:.1f} {ay:.1f}A{outer} {outer} 0 0 1 {bx:.1f} {by:.1f}'
            f'L{cx:.1f} {cy:.1f}A{inner} {inner} 0 0 0 {dx:.1f} {dy:.1f}Z"/>'
        )
    said = "a whole architecture" if whole else (", ".join(slots) or "no slot of a host")
    return Markup(
        f'<svg class="fan" viewBox="0 0 60 34" role="img" aria-label="fills: {said}">'
        f"{''.join(panes)}</svg>"
    )
