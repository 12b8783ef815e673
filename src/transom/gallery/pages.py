"""What the pages show, gathered from cards, rooms, the parity record and the measured results.

Nothing here knows a paper by name, and nothing here is HTML but what `prose` and the drawings made.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from markupsafe import Markup

from transom import docs, registry
from transom.cards import Card, load_cards
from transom.gallery import prose
from transom.gallery.anatomy import Anatomy, anatomy, fanlight, pyramid, slot_map, stages
from transom.gallery.charts import Drawn
from transom.gallery.charts import draw as draw_chart
from transom.gallery.drawings import Picture, lens_of
from transom.gallery.results import Result, charts, headline, results
from transom.lens.seen import EXPLAINED
from transom.parity import Parity, parity
from transom.registry import Room

logger = logging.getLogger(__name__)

KINDS = ("method", "backbone", "operator", "objective", "lens", "pipeline")
STATUS = {"runs": "runs here", "parity": "parity proven", "coming": "not here yet"}
_EMPTY = Markup("")
DECODER = "decoders"  # the host family that the table of encoders does not have
_MOST_CHARTS = 4  # of one table on the page of a paper


@dataclass(frozen=True)
class HostFamily:
    """One row of the table of hosts.

    Attributes:
        key: for addresses and filters, such as "timm-vit".
        library, family, model: as in the table.
        fits: slots that can be filled.
        refused: the reason for every other slot.
    """

    key: str
    library: str
    family: str
    model: str
    fits: tuple[str, ...]
    refused: Mapping[str, str]


@dataclass(frozen=True)
class Item:
    """One entry of the feed.

    Attributes:
        title: of the paper; text from outside, never HTML.
        date: of publication; None where it is not known, then `year` counts.
        year: of publication, if known.
        slug: of its card; None for a paper that transom has no card of.
        href: where the title leads; "" for nowhere.
        says: one sentence of ours; "" where there is none.
        family, kinds, status, slots, decodes: for the filters.
        authors, votes, comments: from an imported page, where there is one.
        is_new: whether it came in lately.
        golden: outcome of the golden cases.
        measured: the best measured speed-up, in words.
        hosts: number of host families it fits.
        sign: its fanlight.
        thumbnail: file of a drawing, or "".
    """

    title: str
    date: datetime.date | None
    year: int | None
    slug: str | None
    href: str = ""
    says: str = ""
    family: str = ""
    kinds: tuple[str, ...] = ()
    status: tuple[str, ...] = ("coming",)
    slots: tuple[str, ...] = ()
    decodes: bool = False
    authors: str = ""
    votes: int = 0
    comments: int = 0
    is_new: bool = False
    golden: Parity | None = None
    measured: str = ""
    hosts: int = 0
    sign: Markup = _EMPTY
    thumbnail: str = ""


@dataclass(frozen=True)
class Day:
    """What came out on one day, or in one year where the day is not known."""

    label: str
    date: datetime.date | None
    items: list[Item]


@dataclass(frozen=True)
class Measured:
    """What one table says about one paper."""

    result: Result
    charts: list[Drawn]
    rows: list[dict[str, str]]
    columns: list[str]


@dataclass(frozen=True)
class Paper:
    """The page of one paper."""

    card: Card
    item: Item
    about: Markup
    path: str
    anatomy: Anatomy | None
    slot_map: Markup
    pyramid: Markup
    backbone: str
    pictures: list[Picture]
    look: str
    shows: str
    settings: Sequence[Sequence[str]]
    offers: list[tuple[str, str, str]]
    backbones: Sequence[registry.Backbone]
    golden: Parity | None
    measured: list[Measured]
    fits: list[HostFamily]
    refuses: list[HostFamily]
    snippet: str
    links: list[tuple[str, str]]
    related: list[Item]


@functools.cache
def host_families() -> tuple[HostFamily, ...]:
    """The table of hosts, in its order."""
    text = resources.files("transom").joinpath("data/hosts.json").read_text(encoding="utf-8")
    found = []
    for row in json.loads(text)["families"]:
        slots = {n: v for n, v in row.items() if n not in ("library", "family", "model")}
        key = f"{row['library']}-{row['family']}".lower()
        found.append(
            HostFamily(
                "".join(c if c.isalnum() else "-" for c in key),
                row["library"],
                row["family"],
                row["model"],
                tuple(slot for slot, says in slots.items() if says == "fits"),
                {slot: says for slot, says in slots.items() if says != "fits"},
            )
        )
    return tuple(found)


@functools.cache
def host_slots() -> tuple[str, ...]:
    """Slots that the table of hosts tells about."""
    return tuple(dict.fromkeys(s for f in host_families() for s in (*f.fits, *f.refused)))


def fitting_hosts(item: Item) -> list[HostFamily]:
    """Families in which every slot the method fills is open.

    The tokenizer and the position are not in the table; a method that fills only these is counted
    nowhere.
    """
    wanted = {slot for slot in item.slots if slot in host_slots()}
    if not wanted or item.decodes:
        return []
    return [family for family in host_families() if wanted <= {*family.fits}]


def item_of(card: Card, thumbnail: str = "") -> Item:
    """The entry of a card, with everything that is known here."""
    base = _base(card.slug)
    return dataclasses.replace(base, thumbnail=thumbnail) if thumbnail else base


@functools.cache
def _base(slug: str) -> Item:
    card = load_cards()[slug]
    room = registry.rooms().get(slug)
    golden = parity().get(slug)
    kinds = tuple(k for k in KINDS if room and k in room.kinds) or (card.kind,)
    status = ["runs"] if room else ["coming"]
    if golden and not golden.failed:
        status.append("parity")
    found = anatomy(slug) if room else None
    slots = found.slots if found else ()
    item = Item(
        card.title,
        card.published,
        card.year,
        slug,
        says=prose.lead(room.module.__doc__) if room else _sentence(", ".join(card.keywords)),
        family=card.family,
        kinds=kinds,
        status=tuple(status),
        slots=slots,
        decodes=bool(room and room.method and room.method.takes == "decoder"),
        golden=golden,
        measured=headline(slug) if room else "",
        sign=fanlight(slots, whole=room is not None and "backbone" in kinds and not slots),
    )
    return dataclasses.replace(item, hosts=len(fitting_hosts(item)))


def days(items: Sequence[Item]) -> list[Day]:
    """Items grouped by day, newest first; a year without a day comes behind its days."""
    groups: dict[tuple[int, int, int], list[Item]] = {}
    for item in items:
        when = item.date
        key = (when.year, when.month, when.day) if when else (item.year or 0, 0, 0)
        groups.setdefault(key, []).append(item)
    found = []
    for (year, month, day), own in sorted(groups.items(), reverse=True):
        date = datetime.date(year, month, day) if month else None
        label = f"{date:%A}, {day} {date:%B} {year}" if date else (str(year) if year else "Undated")
        found.append(Day(label, date, own))
    return found


def paper(slug: str, pictures: Sequence[Picture] = ()) -> Paper:
    """Everything the page of a paper shows.

    Args:
        slug: of a card.
        pictures: that were drawn of it.
    """
    card = load_cards()[slug]
    room = registry.rooms().get(slug)
    item = item_of(card, pictures[-1].file if pictures else "")
    found = anatomy(slug) if room else None
    smallest = _smallest(room)
    fits = fitting_hosts(item)
    method = room.method if room else None
    return Paper(
        card=card,
        item=item,
        about=prose.body(room.module.__doc__) if room else Markup(""),
        path=_path(room),
        anatomy=found,
        slot_map=slot_map(found) if found else Markup(""),
        pyramid=_pyramid(smallest.name) if smallest else Markup(""),
        backbone=smallest.name if smallest else "",
        pictures=list(pictures),
        look=_look(slug, found) if pictures else "",
        shows=EXPLAINED[lens] if (lens := lens_of(slug)) else "",
        settings=docs.settings_of(method) if method else [],
        offers=_offers(room),
        backbones=room.backbones if room else (),
        golden=item.golden,
        measured=measured(slug) if room else [],
        fits=fits,
        refuses=[f for f in host_families() if fits and f not in fits],
        snippet=snippet(room, found) if room else "",
        links=_links(card),
        related=_related(card),
    )


def measured(slug: str) -> list[Measured]:
    """Charts and rows of every table that has this paper; its own marks stand out."""
    found = []
    for result in results().values():
        rows = result.about(slug)
        if not rows:
            continue
        drawn = [draw_chart(chart, slug) for chart in charts(result, slug)[:_MOST_CHARTS]]
        filled = [c for c in result.columns if len({r[c] for r in result.rows}) > 1 or c == "model"]
        shown = [c for c in filled if any(r[c] for r in rows) and not c.endswith(("_q1", "_q3"))]
        found.append(Measured(result, drawn, rows, shown))
    return found


def snippet(room: Room, found: Anatomy | None) -> str:
    """A few lines that run as they stand, with random weights."""
    if room.method is not None:
        given = "".join(f", {k}={v!r}" for k, v in (found.settings if found else {}).items())
        fit = f'transom.apply(model, "{room.slug}"{given})'
        if room.method.takes == "decoder":
            return (
                "import torch\nimport transformers\nimport transom\n\n"
                "config = transformers.LlamaConfig(\n    vocab_size=64, hidden_size=48, "
                "intermediate_size=64, num_hidden_layers=12,\n    num_attention_heads=4, "
                "num_key_value_heads=4,\n)\n"
                "model = transformers.LlamaForCausalLM(config).eval()  # or your own\n"
                f"{fit}\nwith torch.inference_mode():\n"
                "    logits = model(input_ids=torch.arange(16)[None]).logits\n"
                "transom.remove(model)  # bit for bit what it was"
            )
        return (
            "import timm\nimport torch\nimport transom\n\n"
            'model = timm.create_model("vit_tiny_patch16_224").eval()  # or your own\n'
            f"{fit}\nwith torch.inference_mode():\n"
            "    logits = model(torch.randn(1, 3, 224, 224))\n"
            "transom.remove(model)  # bit for bit what it was"
        )
    smallest = _smallest(room)
    if smallest is not None:
        return (
            "import timm\nimport torch\nimport transom  # registers the backbones\n\n"
            f'model = timm.create_model("{smallest.name}").eval()\n'
            "with torch.inference_mode():\n"
            f"    logits = model(torch.randn(1, 3, {smallest.size}, {smallest.size}))"
        )
    first = room.offers[0].build
    name = getattr(first, "__qualname__", type(first).__name__)
    return f"from {first.__module__} import {name.partition('.')[0]}\n\nhelp({name})"


def words_of(slug: str) -> dict[str, str]:
    """What a search looks through, most telling part first."""
    card = load_cards()[slug]
    room = registry.rooms().get(slug)
    item = _base(slug)
    return {
        "name": " ".join((slug, *card.names)),
        "title": card.title,
        "keywords": " ".join((*card.keywords, card.family.replace("_", " "), *item.kinds)),
        "lead": item.says,
        "facts": " ".join((str(card.year), card.venue or "", *item.slots)),
        "body": inspect.cleandoc(room.module.__doc__ or "") if room else "",
    }


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _smallest(room: Room | None) -> registry.Backbone | None:
    if room is None or not room.backbones:
        return None
    return min(room.backbones, key=lambda b: b.params or b.gmacs or 1e9)


@functools.cache
def _pyramid(name: str) -> Markup:
    all_of_them = (b for own in registry.backbones().values() for b in own)
    try:
        found = stages(next(b for b in all_of_them if b.name == name))
    except Exception:
        # one backbone that does not run must not take the whole gallery with it
        logger.warning("the stages of %s are not drawn", name, exc_info=True)
        return _EMPTY
    return pyramid(found) if found else _EMPTY


def _path(room: Room | None) -> str:
    if room is None:
        return ""
    module = room.module
    path = "src/" + module.__name__.replace(".", "/")
    return f"{path}/" if hasattr(module, "__path__") else f"{path}.py"


def _look(slug: str, found: Anatomy | None) -> str:
    """The command that looks at the same on all photographs of the demo, if there is one."""
    lens = lens_of(slug)
    if lens is not None:
        return f"transom look demo --model demo --lens {lens}"
    if found is None or "tokens" not in found.slots:
        return ""
    return f"transom look demo --model demo --lens fates --method {slug}"


def _offers(room: Room | None) -> list[tuple[str, str, str]]:
    if room is None:
        return []
    return [
        (o.name, o.kind, f"{o.build.__module__}.{getattr(o.build, '__qualname__', o.name)}")
        for o in room.offers
    ]


def _links(card: Card) -> list[tuple[str, str]]:
    found = []
    if card.code is not None:
        found.append((f"Authors’ code: {card.code.repository}", card.code.url))
    found += [(link.removeprefix("https://"), link) for link in card.links]
    found += [(f"Related code: {c.repository}", c.url) for c in card.related_code]
    seen: dict[str, str] = {}
    for label, address in found:
        if address.startswith(("https://", "http://")):
            seen.setdefault(address, label)
    return [(label, address) for address, label in seen.items()]


def _related(card: Card) -> list[Item]:
    """Papers that share most with this one: keywords, slots, family; those that run first."""
    own = _base(card.slug)

    def likeness(other: Item) -> float:
        their = load_cards()[other.slug or ""]
        shared = len({*card.keywords} & {*their.keywords})
        slots = len({*own.slots} & {*other.slots}) / (len({*own.slots, *other.slots}) or 1)
        family = card.family == their.family
        return (
            2.0 * shared
            + slots
            + family
            + 0.5 * ("runs" in other.status)
            + 0.2 * (own.decodes == other.decodes)
        )

    others = [_base(slug) for slug in load_cards() if slug != card.slug]
    best = sorted(others, key=likeness, reverse=True)[:4]
    return [other for other in best if likeness(other) > 0.8]
