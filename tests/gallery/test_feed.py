"""Feeds are read whole or not at all, in each of their forms, whatever is in them."""

from __future__ import annotations

import datetime
import http.server
import json
import threading

import pytest

pytest.importorskip("bs4", reason="the extra 'gallery' is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gallery.pages import ARTICLES, ATOM, HEAD, ITEMS, JSON, SAMPLES, TEXT, needs_samples
from transom import cards
from transom.errors import FeedError
from transom.gallery import feed
from transom.gallery.feed import Entry, read


@needs_samples
def test_the_four_sample_pages_hold_90_entries_of_89_papers_all_known_here():
    found = [entry for page in SAMPLES for entry in read(page, year=2025)]
    assert len(found) == 90
    assert len({entry.key for entry in found}) == 89
    listed = {card.slug for card in cards.load_cards().values() if not card.anchor}
    assert {entry.slug for entry in found} == listed
    assert len(listed) == 89
    twice = [e for e in found if [other.key for other in found].count(e.key) > 1]
    assert {entry.slug for entry in twice} == {"illama"} and len(twice) == 2
    by_slug = {entry.slug: entry for entry in found}
    assert by_slug["moh"].comments == 2 and by_slug["git"].comments == 11
    assert by_slug["autoneural"].organisation == "Nexa AI"
    assert by_slug["pixel-sail"].organisation == "ByteDance"
    assert by_slug["promoe"].author_count is None
    assert all(len(entry.abstract) > 300 for entry in found)
    assert sum(entry.author_count is not None for entry in found) == 87
    # The cards know the same days.
    known = cards.load_cards()
    assert all(entry.date == known[entry.slug].published for entry in found)


def test_every_paper_of_the_list_has_a_day_in_its_year():
    for card in cards.load_cards().values():
        if not card.anchor:
            assert card.published is not None and card.published.year == card.year, card.slug


def test_a_page_saved_as_text():
    first, second, third, fourth = read(TEXT.encode(), year=2025)
    assert first == Entry(
        title="Gizzard: Attention for Birds",
        abstract="We attend to birds. Code: https://github.com/owl/gizzard.git",
        author_count=8,
        date=datetime.date(2023, 4, 6),
        repo="https://github.com/owl/gizzard",
    )
    assert second.organisation == "Owl Labs" and second.author_count is None
    assert second.date == datetime.date(2025, 3, 26) and second.comments == 12
    assert third.date is None and third.abstract.startswith("This entry stands")
    assert fourth.author_count == 1 and fourth.date == datetime.date(2024, 2, 29)


def test_a_date_without_a_year_is_of_this_year_unless_one_is_given():
    assert read(TEXT.encode())[1].date.year == datetime.date.today().year
    assert read(TEXT.encode(), year=2019)[1].date.year == 2019


def test_windows_line_ends_and_a_byte_order_mark_change_nothing():
    saved = b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode()
    assert read(saved, year=2025) == read(TEXT.encode(), year=2025)


def test_the_public_json_form():
    first, second = read(JSON.encode())
    assert first == Entry(
        title="Gizzard: Attention for Birds",
        abstract="We attend to birds.",
        authors=("Ada Owl", "Ben Jay"),
        author_count=2,
        organisation="Owl Labs",
        date=datetime.date(2023, 4, 6),
        comments=3,
        votes=41,
        arxiv_id="2304.01234",
        repo="https://github.com/owl/gizzard",
        project="https://owl.example/gizzard",
    )
    assert second.author_count is None and second.votes == 0


def test_a_page_saved_as_html_by_its_articles():
    first, second = read(ARTICLES.encode(), year=2025)
    assert first.title == "Gizzard: Attention for Birds"
    assert first.abstract == "We attend to birds & bees."
    assert (first.votes, first.comments, first.author_count) == (41, 3, 2)
    assert first.authors == ("Ada Owl", "Ben Jay")
    assert first.arxiv_id == "2304.01234" and first.date == datetime.date(2023, 4, 6)
    assert second.date == datetime.date(2025, 3, 26)


def test_a_page_saved_as_html_by_the_data_it_was_drawn_from():
    props = json.dumps({"dailyPapers": ITEMS}).replace("&", "&amp;").replace('"', "&quot;")
    page = f'<html><body><div data-target="X" data-props="{props}"></div></body></html>'
    assert read(page.encode()) == read(JSON.encode())


def test_an_atom_feed_of_arxiv():
    (entry,) = read(ATOM.encode())
    assert entry == Entry(
        title="Gizzard: Attention for Birds",
        abstract="We attend to birds.",
        authors=("Ada Owl", "Ben Jay"),
        author_count=2,
        date=datetime.date(2023, 4, 6),
        arxiv_id="2304.01234",
        repo="https://github.com/owl/gizzard",
    )


def test_a_feed_is_read_from_a_server():
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/papers" else 404)
            self.end_headers()
            self.wfile.write(JSON.encode())

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        assert read(f"{address}/papers") == read(JSON.encode())
        with pytest.raises(FeedError, match=r"/gone: cannot be read: Not Found"):
            read(f"{address}/gone")
    finally:
        server.shutdown()
        server.server_close()


def test_what_identifies_a_paper_survives_case_accents_and_punctuation():
    assert feed.title_key("Ünïted: N:M Sparsity  of $O(n^2)$") == feed.title_key(
        "united N-M sparsity of O(n2)"
    )
    assert feed.title_key("???") == "???"


def test_merging_takes_the_best_of_both_in_either_order():
    old = Entry("A", abstract="long text", date=datetime.date(2025, 3, 1), votes=2, comments=5)
    new = Entry(
        "A", abstract="text", date=datetime.date(2024, 3, 1), votes=9, arxiv_id="2403.00001"
    )
    assert feed.merge(old, new) == feed.merge(new, old)
    assert feed.merge(old, new) == Entry(
        "A",
        abstract="long text",
        date=datetime.date(2024, 3, 1),
        votes=9,
        comments=5,
        arxiv_id="2403.00001",
    )


def _items(**changes):
    item = {**ITEMS[0], **changes}
    return json.dumps([ITEMS[1], item]).encode()


def _paper(**changes):
    return _items(paper={**ITEMS[0]["paper"], **changes})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n ", "is empty"),
        (b"\xff\xfe\x00a", "byte 0 is not UTF-8 text"),
        (b"%PDF-1.4 nothing", "no line 'Daily Papers'"),
        (b"Daily Papers\n\nSomething else\n", "no day below 'Daily Papers'"),
        (HEAD.encode(), "holds no entry"),
        (f"{HEAD}Alone\n".encode(), r"line 13: 'Alone' is followed neither by an abstract nor"),
        (f"{HEAD}  • 2 authors\n·\nMay 1\n".encode(), "line 13: authors and date without a title"),
        (f"{HEAD}A\n\nB\n\n  • 2 authors\n·\n".encode(), "line 17: .* is not authors, a line"),
        (f"{HEAD}A\n\nB\n\n  • 2 authors\n·\nsoon\n".encode(), "line 19: 'soon' is no date"),
        (f"{HEAD}A\n\nB\n\n  • 2 authors\n·\nFoo 3\n".encode(), "line 19: 'Foo 3' is no date"),
        (f"{HEAD}A\n\nB\n\n  • 2 authors\n·\nFeb 29\n".encode(), "no day 'Feb 29' in 2025; give"),
        (f"{HEAD}A\n\nB\n\nX\n·\nFeb 30, 2024\n".encode(), "no day 'Feb 30, 2024'"),
        (f"\n\n{HEAD}Alone\n".encode(), "line 15: 'Alone' is followed"),
        (b"[]", "holds no entry"),
        (b"[1, 2", "broken JSON"),
        (b"[" * 100_000, "nested too deeply|broken JSON"),
        (b'{"papers": 3}', "unknown JSON form; expected a list of items with 'title'"),
        (b"[3]", "unknown JSON form: item 1 has no 'paper'"),
        (b'[{"title": "A"}]', "unknown JSON form: item 1 has no 'paper'"),
        (_items(title=None, paper={}), "item 2 has no 'title'"),
        (_items(title=["A"]), "item 2 has no 'title'"),
        (_items(title=" \x00 "), "item 2: has an empty title"),
        (_items(title="A" * 1001), "item 2: a title of 1001 characters; expected at most 1000"),
        (_items(publishedAt="yesterday"), "item 2: 'yesterday' is no date such as"),
        (_items(numComments="3"), "item 2: '3' is no number of comments"),
        (_paper(upvotes=2**31), "item 2: '2147483648' is no number of votes"),
        (_paper(upvotes=-1), "item 2: '-1' is no number of votes"),
        (_paper(summary={}), None),
        (_paper(summary=["x"]), "item 2: the abstract is a list; expected text"),
        (_paper(authors="Ada"), "item 2: 'authors' is a str; expected a list"),
        (_paper(authors=[{"id": 3}]), "item 2: an author has no 'name'"),
        (b"<html><body><p>Sign in</p></body></html>", "no papers in this HTML"),
        (ATOM.replace("</entry>", "").encode(), "broken XML"),
        (ATOM.replace("2023-04-06", "2023-13-06").encode(), "entry 1: '2023-13-06.* is no date"),
        (
            b'<!DOCTYPE feed [<!ENTITY a "aaaa">]><feed xmlns="http://www.w3.org/2005/Atom">&a;'
            b"</feed>",
            "XML with entities of its own is not read",
        ),
        (
            ATOM.replace("http://arxiv.org/abs/2304.01234v2", "http://arxiv.org/api/errors#x")
            .replace("We attend to birds.", "incorrect id format")
            .encode(),
            "arXiv answered with an error: incorrect id format",
        ),
    ],
)
def test_what_cannot_be_read_is_named(content, message, tmp_path):
    path = tmp_path / "saved.page"
    path.write_bytes(content)
    if message is None:  # an empty value is as good as none
        assert read(path)[1].abstract == ""
        return
    with pytest.raises(FeedError, match=message) as caught:
        read(path, year=2025)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/page.txt", "nowhere/page.txt: cannot be read: No such file"),
        ("ftp://example.org/x", "'ftp' addresses are not read; expected http or https"),
        ("file:///etc/passwd", "'file' addresses are not read"),
        ("http://127.0.0.1:9/", "http://127.0.0.1:9/: cannot be read"),
    ],
)
def test_a_source_that_is_not_there_is_named(source, message):
    with pytest.raises(FeedError, match=message):
        read(source)


def test_a_source_that_does_not_end_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(feed, "LARGEST", 2**20)
    (tmp_path / "large").write_bytes(b"x" * (2**20 + 1))
    with pytest.raises(FeedError, match="has more than 1 MiB"):
        read(tmp_path / "large")


def test_addresses_that_are_none_and_numbers_that_are_none_stay_out():
    changed = _paper(
        id="../../etc/passwd", githubRepo="javascript:alert(1)", projectPage='https://a/"onload='
    )
    entry = read(changed)[1]
    assert (entry.arxiv_id, entry.repo, entry.project) == (None, None, None)


def test_text_keeps_its_markup_as_text_and_loses_control_characters():
    entry = read(_items(title="<script>alert(1)</script>\x00\u202e\ud800 B"))[1]
    assert entry.title == "<script>alert(1)</script> B"


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200).map(lambda t: (HEAD + t).encode("utf-8", "ignore")),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(
                        ["title", "paper", "publishedAt", "authors", "name", "summary"]
                    ),
                    inner,
                    max_size=4,
                )
            ),
            max_leaves=12,
        ).map(lambda value: json.dumps([value]).encode()),
        st.text(alphabet="<>/ah3rticle feed\"'=&;", max_size=80).map(lambda t: f"<{t}".encode()),
    )
)
def test_anything_is_read_or_refused_with_an_error_of_ours(content):
    try:
        found = read(content)
    except FeedError:
        return
    assert found and all(entry.title for entry in found)
