"""The Atom feed holds what the store holds, as text."""

from __future__ import annotations

import datetime
from dataclasses import replace

import pytest

pytest.importorskip("sqlalchemy", reason="the extra 'gallery' is not installed")

from defusedxml.ElementTree import fromstring

from tests.gallery.pages import JSON
from transom.cards import card
from transom.gallery.atom import atom
from transom.gallery.feed import Entry, read
from transom.gallery.store import Stored

NOON = datetime.datetime(2025, 11, 20, 12, tzinfo=datetime.timezone.utc)
NS = {"a": "http://www.w3.org/2005/Atom"}


def _parsed(entries):
    return fromstring(atom(entries, base_url="https://gallery.example/", updated=NOON))


def test_what_goes_in_can_be_read_back():
    entries = read(JSON.encode())
    text = atom(entries, base_url="https://gallery.example", updated=NOON)
    found = read(text.encode())
    assert [(e.title, e.abstract, e.date) for e in found] == [
        (e.title, e.abstract, e.date) for e in entries
    ]


def test_every_required_element_is_there():
    root = _parsed([Stored(**vars(Entry("A")), id=3, first_seen=NOON), Entry("B")])
    for place in (root, *root.findall("a:entry", NS)):
        for name in ("id", "title", "updated"):
            assert place.findtext(f"a:{name}", None, NS)
    assert root.findtext("a:updated", "", NS) == "2025-11-20T12:00:00Z"
    assert all(entry.find("a:author", NS) is not None for entry in root.findall("a:entry", NS))
    links = {link.get("rel"): link.get("href") for link in root.findall("a:link", NS)}
    assert links["self"] == "https://gallery.example/feed.atom"


def test_links_lead_to_our_page_then_to_arxiv_then_to_what_there_is():
    entries = [
        Entry(card("evit").title, slug="evit", arxiv_id="2202.07800"),
        Entry("B", arxiv_id="2401.00001"),
        Entry("C", project="https://c.example/"),
        Entry("D"),
    ]
    links = [e.find("a:link", NS).get("href") for e in _parsed(entries).findall("a:entry", NS)]
    assert links == [
        "https://gallery.example/papers/evit",
        "https://arxiv.org/abs/2401.00001",
        "https://c.example/",
        "https://gallery.example/",
    ]


def test_hostile_text_stays_text():
    title = "</title><script>alert(1)</script> & ]]>"
    entry = Entry(title, abstract="<b>x</b>", authors=("<i>Ada</i>",))
    one = _parsed([entry]).find("a:entry", NS)
    assert one.findtext("a:title", "", NS) == title
    assert one.findtext("a:summary", "", NS) == "<b>x</b>"
    assert "<script>" not in atom([entry], base_url="https://x", updated=NOON)


def test_an_entry_keeps_its_identity_when_it_changes():
    before = Entry("A", arxiv_id="2401.00001")
    ids = [e.findtext("a:id", "", NS) for e in _parsed([before, replace(before, votes=9)])[4:]]
    ids = [each for each in ids if each]
    assert len(ids) == 2 and ids[0] == ids[1]
