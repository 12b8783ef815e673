"""What each template is given, for files on a disk and for answers of a server alike."""

from __future__ import annotations

import dataclasses
import datetime
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from transom import registry
from transom.cards import FAMILIES, load_cards
from transom.gallery import index, pages
from transom.gallery.charts import draw
from transom.gallery.drawings import Picture
from transom.gallery.pages import Item
from transom.gallery.rendering import Urls, document, spoken
from transom.gallery.results import charts, results

if TYPE_CHECKING:
    from transom.gallery.store import Store

NEW_DAYS = 7  # an entry that came in so lately is new ...
_SHOWN_OFF = 8  # drawings at the top of the feed
FRESH_DAYS = 60  # ... unless it had been out for longer than this when it came in


def search_index(items: Iterable[Item]) -> index.Index:
    """Everything with a card, to be found from any page."""
    urls = Urls()
    known = [item for item in items if item.slug]
    return index.build(document(item, urls, pages.words_of(item.slug or "")) for item in known)


def linked(item: Item, urls: Urls) -> Item:
    """The item with the address of its page, where it has one."""
    if item.slug is None:
        return item
    return dataclasses.replace(item, href=urls.paper(item.slug))


def merged(items: Sequence[Item], store: Store, limit: int, today: datetime.date) -> list[Item]:
    """Entries of the store with what the cards know; cards without an entry stay as they are."""
    known = {item.slug: item for item in newly_running(items, store)}
    stored = store.page(limit=limit)
    found = [from_store(entry, known.get(entry.slug), today) for entry in stored]
    seen = {entry.slug for entry in stored}
    return found + [item for slug, item in known.items() if slug not in seen]


def newly_running(items: Iterable[Item], store: Store) -> list[Item]:
    """The same, new if they began to run here within the last days."""
    now = datetime.datetime.now(datetime.timezone.utc)
    began = {*store.began(now - datetime.timedelta(days=NEW_DAYS))}
    return [dataclasses.replace(i, is_new=i.is_new or i.slug in began) for i in items]


def from_store(entry: Any, known: Item | None, today: datetime.date) -> Item:
    """One entry as an item of the feed; its abstract is not part of it."""
    first = entry.first_seen.date() if hasattr(entry.first_seen, "date") else entry.first_seen
    lately = (today - first).days <= NEW_DAYS
    # a saved page may not tell the year, a card does
    date = (known.date if known else None) or entry.date
    fresh = date is None or (first - date).days <= FRESH_DAYS
    address = f"https://arxiv.org/abs/{entry.arxiv_id}" if entry.arxiv_id else ""
    year = date.year if date else None
    base = known or Item(entry.title, date, year, None, href=address)
    return dataclasses.replace(
        base,
        date=date,
        authors=_authors(entry),
        votes=entry.votes or 0,
        comments=entry.comments or 0,
        is_new=(lately and fresh) or base.is_new,
    )


def _authors(entry: Any) -> str:
    """Three names at most, or how many there are."""
    count = entry.author_count or len(entry.authors)
    if not entry.authors:
        return f"{count} {'author' if count == 1 else 'authors'}" if count else ""
    named = ", ".join(entry.authors[:3])
    return f"{named} and {count - 3} more" if count > 3 else named


def feed(items: Sequence[Item], chosen: dict[str, str] | None = None) -> dict[str, Any]:
    """What the feed's template needs."""
    cards = [pages.item_of(card) for card in load_cards().values()]
    by_library = groupby(pages.host_families(), key=lambda f: f.library)
    return {
        "days": pages.days(items),
        "shown": len(items),
        "chosen": chosen or {},
        "more": "",
        "shown_off": _shown_off(items) if not chosen else [],
        "filters": _filters(cards),
        "hosts": [(library, [f for f in own if f.fits]) for library, own in by_library],
        "stats": {
            "papers": len(cards),
            "runs": sum("runs" in i.status for i in cards),
            "parity": sum("parity" in i.status for i in cards),
            "hosts": len(pages.host_families()),
        },
    }


def _shown_off(items: Sequence[Item]) -> list[tuple[str, str, str]]:
    """Name, address and drawing of the newest papers that are drawn; none of a few."""
    drawn = [i for i in items if i.thumbnail and i.slug in load_cards()]
    drawn.sort(key=lambda i: i.date or datetime.date(i.year or 1, 1, 1), reverse=True)
    if len(drawn) < _SHOWN_OFF:
        return []
    return [(load_cards()[i.slug or ""].name, i.href, i.thumbnail) for i in drawn[:_SHOWN_OFF]]


def _filters(items: Sequence[Item]) -> list[tuple[str, str, list[tuple[str, str, int]]]]:
    """Name and title of each group of choices; value, label and count of each choice."""
    status = Counter(s for item in items for s in item.status)
    families = Counter(item.family for item in items)
    kinds = Counter(kind for item in items for kind in item.kinds)
    return [
        ("status", "status", [(s, label, status[s]) for s, label in pages.STATUS.items()]),
        ("family", "family", [(f, spoken(f), families[f]) for f in FAMILIES]),
        ("kind", "kind", [(k, k, kinds[k]) for k in pages.KINDS]),
    ]


def paper(slug: str, pictures: Sequence[Picture], urls: Urls) -> dict[str, Any]:
    """What the template of a paper needs."""
    found = pages.paper(slug, pictures)
    room = registry.rooms().get(slug)
    method = room.method if room else None
    needs = []
    if method is not None:
        needs += ["a class token"] * method.needs_class_token + ["a grid"] * method.needs_grid
    related = [linked(item, urls) for item in found.related]
    return {
        "paper": dataclasses.replace(found, related=related),
        "slugs": load_cards(),
        "needs": needs,
        "needs_training": bool(method and method().needs_training),
        "try_it": bool(method and method.takes == "encoder"),
    }


def overview() -> dict[str, Any]:
    """What the template of all results needs."""
    drawn = [(result, charts(result)) for result in results().values()]
    # first what weighs a gain against its cost, then other charts, then tables alone
    drawn.sort(key=lambda pair: (not any(c.front or c.diagonal for c in pair[1]), not pair[1]))
    return {
        "overview": [(result, [draw(chart) for chart in own[:2]]) for result, own in drawn],
        "slugs": load_cards(),
    }


def result(name: str) -> dict[str, Any]:
    """What the template of one result needs."""
    found = results()[name]
    return {
        "result": found,
        "drawn": [draw(chart) for chart in charts(found)],
        "slugs": load_cards(),
    }


def hosts() -> dict[str, Any]:
    """What the template of the hosts needs."""
    families = pages.host_families()
    return {
        "families": families,
        "slots": pages.host_slots(),
        "fitting": sum(bool(f.fits) for f in families),
    }
