"""What is different on PostgreSQL; the other tests of storage, search and mail run there as well.

`TRANSOM_TEST_POSTGRES=postgresql://USER@HOST/NAME pytest tests/gallery` gives a server.
"""

from __future__ import annotations

import pytest

pytest.importorskip("sqlalchemy", reason="the extra 'gallery' is not installed")

from sqlalchemy import text

from tests.gallery.conftest import POSTGRES
from transom.gallery.feed import Entry
from transom.gallery.store import open_store

pytestmark = pytest.mark.skipif(not POSTGRES, reason="no server is given by TRANSOM_TEST_POSTGRES")


@pytest.fixture
def only_postgres(store):
    if store.is_sqlite:
        pytest.skip("this is the same test on SQLite")
    return store


def test_it_is_postgresql_and_searches_by_its_index(only_postgres):
    only_postgres.add([Entry(f"Paper {i}", abstract="attention") for i in range(300)])
    with only_postgres.reads() as connection:
        assert connection.execute(text("SHOW server_version")).scalar_one()
        connection.execute(text("SET enable_seqscan = off"))
        plan = connection.execute(
            text("EXPLAIN SELECT id FROM entries WHERE document @@ to_tsquery('english', 'paper')")
        ).scalars()
        assert "ix_entries_document" in "\n".join(plan)


def test_words_in_tags_addresses_and_other_letters_are_words(only_postgres):
    only_postgres.add(
        [
            Entry("<script>alert(1)</script>"),
            Entry("An N:M pattern", abstract="see https://example.org/gizzard"),
            Entry("Ünïcödé 東京"),
        ]
    )
    for line, title in (
        ("script", "<script>alert(1)</script>"),
        ("gizzard", "An N:M pattern"),
        ("n:m pattern", "An N:M pattern"),
        ("ünïcödé", "Ünïcödé 東京"),
        ("東京", "Ünïcödé 東京"),
    ):
        assert [hit.stored.title for hit in only_postgres.search(line)] == [title], line


def test_readers_see_nothing_of_a_writer_that_is_not_done(only_postgres, url):
    only_postgres.add([Entry("Gizzard")])
    with open_store(url) as other, only_postgres.writes() as connection:
        connection.execute(text("UPDATE entries SET votes = 7"))
        assert other.page()[0].votes == 0
    assert only_postgres.page()[0].votes == 7


def test_a_plain_address_of_postgresql_is_enough(only_postgres):
    assert only_postgres.engine.dialect.driver == "psycopg"
