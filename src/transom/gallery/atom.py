"""The feed as Atom (RFC 4287), for readers of feeds."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Iterable
from xml.etree import ElementTree

from transom.gallery.feed import Entry
from transom.gallery.store import Stored

NAMESPACE = "http://www.w3.org/2005/Atom"
_NAMES = uuid.UUID("6f8a1c1e-3d2b-5a55-9c57-5d1f0e1c89aa")


def atom(entries: Iterable[Entry], *, base_url: str, updated: datetime.datetime) -> str:
    """An Atom feed of entries.

    Args:
        entries: newest first.
        base_url: where the gallery stands; pages of papers are `papers/SLUG` below it.
        updated: when the feed changed last.

    Returns:
        XML; everything from an entry is text in it.
    """
    base = base_url.rstrip("/")
    root = ElementTree.Element("feed", xmlns=NAMESPACE)
    _add(root, "id", f"{base}/")
    _add(root, "title", "transom: papers on attention and tokens")
    _add(root, "updated", _moment(updated))
    ElementTree.SubElement(root, "link", rel="alternate", href=f"{base}/", type="text/html")
    ElementTree.SubElement(
        root, "link", rel="self", href=f"{base}/feed.atom", type="application/atom+xml"
    )
    for entry in entries:
        one = ElementTree.SubElement(root, "entry")
        _add(one, "id", f"urn:uuid:{uuid.uuid5(_NAMES, entry.arxiv_id or entry.key)}")
        _add(one, "title", entry.title)
        published = _midnight(entry.date) if entry.date else None
        seen = entry.first_seen if isinstance(entry, Stored) else None
        _add(one, "updated", _moment(seen or published or updated))
        if published is not None:
            _add(one, "published", _moment(published))
        ElementTree.SubElement(one, "link", rel="alternate", href=link(entry, base))
        for name in entry.authors or (entry.organisation or _unnamed(entry),):
            _add(ElementTree.SubElement(one, "author"), "name", name)
        if entry.abstract:
            _add(one, "summary", entry.abstract)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def link(entry: Entry, base_url: str) -> str:
    """Where to read on: our page of the paper, else arXiv, its project, its code, the gallery."""
    base = base_url.rstrip("/")
    if entry.slug is not None:
        return f"{base}/papers/{entry.slug}"
    if entry.arxiv_id is not None:
        return f"https://arxiv.org/abs/{entry.arxiv_id}"
    return entry.project or entry.repo or f"{base}/"


def _unnamed(entry: Entry) -> str:
    count = entry.author_count
    return "authors not named" if count is None else f"{count} author{'s' * (count != 1)}"


def _add(parent: ElementTree.Element, tag: str, content: str) -> None:
    ElementTree.SubElement(parent, tag).text = content


def _midnight(day: datetime.date) -> datetime.datetime:
    return datetime.datetime.combine(day, datetime.time(), datetime.timezone.utc)


def _moment(moment: datetime.datetime) -> str:
    return moment.astimezone(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
