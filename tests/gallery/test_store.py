"""What goes into the store comes out of it, once, whoever else uses it at the same time."""

from __future__ import annotations

import datetime
import itertools
import multiprocessing
import sqlite3
import threading
from dataclasses import replace

import pytest

pytest.importorskip("sqlalchemy", reason="the extra 'gallery' is not installed")

from sqlalchemy import text

from tests.gallery.pages import JSON, SAMPLES, TEXT, needs_samples
from transom import cards
from transom.errors import FeedError, SettingsError, StoreError
from transom.gallery import store as stores
from transom.gallery.feed import Entry, read
from transom.gallery.store import Added, Stored, open_store

UTC = datetime.timezone.utc
NOON = datetime.datetime(2025, 11, 20, 12, tzinfo=UTC)


def _day(days):
    return NOON.date() - datetime.timedelta(days=days)


@needs_samples
def test_the_sample_pages_are_taken_in_once(store):
    found = [entry for page in SAMPLES for entry in read(page, year=2025)]
    assert store.add(found) == Added(new=89, merged=0, unchanged=1)
    before = store.page(limit=200)
    assert store.add(found) == Added(new=0, merged=0, unchanged=90)
    assert store.count() == 89
    assert store.page(limit=200) == before
    assert len({entry.slug for entry in before} - {None}) == 89
    assert all(entry.date for entry in before)


def test_what_was_given_comes_back(store):
    given = read(JSON.encode())
    store.add(given, now=NOON)
    one, other = store.page()
    assert one == Stored(**vars(given[1]), id=one.id, first_seen=NOON)
    assert other == Stored(**vars(given[0]), id=other.id, first_seen=NOON)
    assert store.get(other.id) == other
    assert store.many([other.id, 999, one.id]) == [other, one]


def test_entries_of_one_paper_from_several_forms_become_one(store):
    store.add(read(TEXT.encode(), year=2025), now=NOON)
    later = NOON + datetime.timedelta(days=2)
    assert store.add(read(JSON.encode()), now=later) == Added(new=0, merged=2, unchanged=0)
    assert store.count() == 4
    merged = next(e for e in store.page() if e.title.startswith("Gizzard"))
    assert merged.authors == ("Ada Owl", "Ben Jay") and merged.author_count == 8
    assert merged.arxiv_id == "2304.01234" and merged.votes == 41 and merged.comments == 3
    assert merged.abstract.startswith("We attend to birds. Code")
    assert merged.first_seen == NOON
    assert store.add(read(TEXT.encode(), year=2025)) == Added(0, 0, 4)


def test_the_arxiv_number_decides_before_the_title(store):
    store.add(
        [Entry("Attention", arxiv_id="2401.00001"), Entry("Attention", arxiv_id="2401.00002")]
    )
    assert store.count() == 2
    renamed = Entry("Attention, Once More", arxiv_id="2401.00002", votes=3)
    assert store.add([renamed]) == Added(0, 1, 0)
    assert {e.title for e in store.page()} == {"Attention"}


def test_a_title_that_gets_two_numbers_becomes_two_papers(store):
    numbers = ("2401.00001", "2401.00002", "2401.00001")
    entries = [Entry("Attention"), *(Entry("Attention", arxiv_id=number) for number in numbers)]
    assert store.add(entries) == Added(new=2, merged=1, unchanged=1)
    assert {e.arxiv_id for e in store.page()} == {"2401.00001", "2401.00002"}


def test_chunks_know_of_each_other(store, monkeypatch):
    monkeypatch.setattr(stores, "_CHUNK", 2)
    entries = [Entry(f"Paper {i % 5}", votes=i) for i in range(11)]
    assert store.add(entries) == Added(new=5, merged=6, unchanged=0)
    assert sorted(e.votes for e in store.page()) == [6, 7, 8, 9, 10]


def test_nothing_is_half_imported(store):
    def broken():
        yield from (Entry(f"Paper {i}") for i in range(1200))
        raise FeedError("the second page is broken")

    with pytest.raises(FeedError):
        store.add(broken())
    assert store.count() == 0
    assert store.search("paper") == []


def test_newest_first_page_by_page(store):
    store.add([Entry(f"Paper {i}", date=_day(i // 3)) for i in range(20)], now=NOON)
    everything = store.page(limit=100)
    assert [e.day for e in everything] == sorted((e.day for e in everything), reverse=True)
    pages, last = [], None
    while page := store.page(before=last, limit=6):
        pages += page
        last = page[-1].id
    assert pages == everything and len(pages) == 20
    with pytest.raises(StoreError, match="the store has no entry 12345"):
        store.page(before=12345)


def test_an_entry_without_a_date_stands_under_the_day_of_its_import(store):
    store.add([Entry("Old", date=_day(30)), Entry("Dateless")], now=NOON)
    assert [e.title for e in store.page()] == ["Dateless", "Old"]
    assert store.page()[0].date is None and store.page()[0].day == NOON.date()


def test_filters_by_what_the_cards_say(store):
    known = [card for card in cards.load_cards().values() if not card.anchor]
    store.add([Entry(card.title) for card in known] + [Entry("Gizzard: Attention for Birds")])
    for family in cards.FAMILIES:
        wanted = {card.slug for card in known if card.family == family}
        assert {e.slug for e in store.page(family=family, limit=200)} == wanted
    kinds = {e.slug for e in store.page(kind="lens", limit=200)}
    assert kinds == {card.slug for card in known if card.kind == "lens"}
    works = {e.slug for e in store.page(status="works", limit=200)}
    coming = {e.slug for e in store.page(status="coming", limit=200)}
    assert works | coming == {card.slug for card in known} and not works & coming
    assert "evit" in works
    assert [e.title for e in store.page(status="unknown")] == ["Gizzard: Attention for Birds"]
    assert {e.slug for e in store.page(slugs=["evit", "pitome"])} == {"evit", "pitome"}
    both = store.page(family="tokens", status="works", slugs=["evit", "moh"])
    assert [e.slug for e in both] == ["evit"]


@pytest.mark.parametrize("name", ["family", "kind", "status"])
def test_an_unknown_filter_is_an_error(store, name):
    with pytest.raises(SettingsError, match=f"{name} is 'birds'; expected one of "):
        store.page(**{name: "birds"})


def test_points_fade_with_age(store):
    store.add(
        [
            Entry("Old and loved", date=_day(70), votes=300),
            Entry("New", date=_day(0), votes=10, comments=1),
            Entry("A week old", date=_day(7), votes=40),
            Entry("Silent", date=_day(0)),
            Entry("Of tomorrow", date=_day(-3), votes=1),
        ],
        now=NOON,
    )
    hits = store.trending(now=NOON)
    assert [(h.stored.title, round(h.score, 4)) for h in hits] == [
        ("New", 12.0),
        ("A week old", 10.0),
        ("Old and loved", round(300 / 121, 4)),
        ("Of tomorrow", 1.0),
    ]
    assert [h.stored.title for h in store.trending(1, now=NOON)] == ["New"]


def test_related_papers_speak_of_the_same_things(store):
    topics = ("pruning tokens in transformers", "audio spectrogram events", "robots grasping cups")
    store.add(
        [
            Entry(f"{word} {topic}", abstract=f"This is about {topic} and {word}.")
            for word, topic in itertools.product(("fast", "deep", "tiny", "calm"), topics)
        ]
    )
    entry = store.search("calm audio")[0].stored
    assert entry.title == "calm audio spectrogram events"
    hits = store.related(entry.id, 3)
    assert len(hits) == 3
    assert all("audio" in h.stored.title and h.stored.id != entry.id for h in hits)
    with pytest.raises(StoreError, match="no entry 999"):
        store.related(999)


def test_search_follows_changes(store):
    store.add([Entry("Gizzard", abstract="birds")])
    assert store.search("feathers") == []
    store.add([Entry("Gizzard", abstract="birds and many more feathers")])
    assert [h.stored.title for h in store.search("feather")] == ["Gizzard"]


@pytest.mark.parametrize(
    "line",
    ["", "  ", '"', "'; DROP TABLE entries; --", "a* OR b", "NEAR(", "title:x", "é", "%", "\x00",
     "( )", "&|!:*", "the", "x" * 5000, "word " * 500, "n:m", "東京"],
)  # fmt: skip
def test_any_line_may_be_searched_for(store, line):
    store.add([Entry("Gizzard of the Owl", abstract="birds")])
    store.search(line)
    assert store.count() == 1


def test_hostile_text_is_only_text(store):
    title = "<img src=x onerror=alert(1)>'); DROP TABLE entries;-- ../../etc"
    store.add([Entry(title, authors=("Robert'); --", '"x"'), organisation="</td>")])
    assert store.page()[0].title == title
    assert [h.stored.title for h in store.search("onerror")] == [title]


def test_what_begins_to_run_here_is_noted_once(store):
    day = datetime.timedelta(days=1)
    assert store.sync_rooms(["evit"], now=NOON) == []  # it ran before this database was
    assert store.began(NOON - day) == []
    assert store.sync_rooms(["evit", "pitome"], now=NOON + day) == ["pitome"]
    assert store.sync_rooms(["evit", "pitome"], now=NOON + 2 * day) == []
    assert store.began(NOON) == ["pitome"] and store.began(NOON + 2 * day) == []


def test_an_entry_is_recognised_when_its_card_arrives(store, monkeypatch):
    title = cards.card("evit").title
    entry = Entry(title, date=_day(1))
    monkeypatch.setattr(stores, "recognised", lambda entry: entry)
    store.add([entry])
    assert store.page()[0].slug is None
    store.sync_rooms([])
    assert store.page()[0].slug == "evit"
    assert [h.stored.slug for h in store.search("EViT")] == ["evit"]


def test_threads_share_a_store(store):
    failures = []

    def work(name):
        try:
            for i in range(10):
                store.add([Entry(f"Paper {i}", votes=i), Entry(f"{name} {i}")])
                store.search("paper")
                store.page(limit=3)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.count() == 10 + 3 * 10


def _import(url, barrier):
    barrier.wait()
    with open_store(url) as store:
        store.add([Entry(f"Paper {i}") for i in range(300)])


def test_processes_share_a_database_and_make_it_only_once(url):
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(3)
    others = [fork.Process(target=_import, args=(url, barrier)) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join(120)
    assert [other.exitcode for other in others] == [0, 0, 0]
    with open_store(url) as store:
        assert store.count() == 300


def test_a_store_is_opened_again_with_all_that_is_in_it(url):
    with open_store(url) as store:
        store.add([Entry("Gizzard")])
    with open_store(url) as store:
        assert [e.title for e in store.page()] == ["Gizzard"]
        assert store.add([Entry("gizzard!")]) == Added(0, 0, 1)


def test_a_database_of_a_newer_transom_is_refused(url):
    with open_store(url) as store, store.writes() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreError, match="form '9999', which this transom does not know"):
        open_store(url)


def test_migrations_make_the_tables_the_code_knows(store):
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    from transom.gallery.schema import metadata

    with store.reads() as connection:
        changes = compare_metadata(MigrationContext.configure(connection), metadata)
    own = [c for c in changes if "entries_fts" not in str(c) and "document" not in str(c)]
    assert own == []


def test_migrations_can_be_undone(store):
    from alembic import command

    with store.writes() as connection:
        config = stores.migrations()
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
        command.upgrade(config, "head")
    store.add([Entry("Gizzard")])
    assert len(store.search("gizzard")) == 1


def test_sqlite_keeps_a_write_ahead_log(tmp_path):
    url = f"sqlite:///{tmp_path / 'deep' / 'er' / 'feed.sqlite'}"
    with open_store(url) as store, store.reads() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"


def test_readers_do_not_wait_for_a_writer(tmp_path):
    with open_store(f"sqlite:///{tmp_path / 'feed.sqlite'}") as store:
        store.add([Entry("Gizzard")])
        with store.writes() as connection:
            connection.execute(text("UPDATE entries SET votes = 7"))
            assert store.page()[0].votes == 0
        assert store.page()[0].votes == 7


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "'nonsense' is no database transom can open"),
        ("oracle9://x/y", "oracle9://x/y is no database transom can open"),
        ("sqlite://", "a database in memory is gone with its connection"),
        ("postgresql://me:secret@127.0.0.1:9/x", r"postgresql://me:\*\*\*@127.0.0.1:9/x cannot be"),
    ],
)
def test_a_url_that_leads_nowhere_is_named(url, message):
    with pytest.raises(StoreError, match=message) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database_is_left_alone(tmp_path):
    path = tmp_path / "feed.sqlite"
    path.write_text("not a database, " * 100)
    with pytest.raises(StoreError, match=r"feed.sqlite cannot be opened: file is not a database"):
        open_store(f"sqlite:///{path}")
    assert path.read_text().startswith("not a database")


def test_the_environment_says_where_the_store_is(tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSOM_DB_URL", f"sqlite:///{tmp_path / 'mine.sqlite'}")
    open_store().close()
    assert (
        sqlite3.connect(tmp_path / "mine.sqlite").execute("SELECT 1 FROM entries").fetchall() == []
    )
    monkeypatch.delenv("TRANSOM_DB_URL")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert stores.default_url().startswith("sqlite:///")
    assert stores.default_url().endswith("gallery.sqlite")


def test_changes_of_an_entry_do_not_reach_the_store(store):
    store.add([Entry("Gizzard")])
    replace(store.page()[0], title="Other")
    assert store.page()[0].title == "Gizzard"
