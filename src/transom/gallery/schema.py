"""The tables of the gallery's database, as SQLAlchemy knows them.

They are made and changed by the migrations beside this file. The full-text index (FTS5 on SQLite,
a tsvector on PostgreSQL) is theirs alone, since each database has a way of its own.
"""

from __future__ import annotations

import datetime

from sqlalchemy import (
    Column,
    Date,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
)
from sqlalchemy.engine import Dialect


class Moment(TypeDecorator[datetime.datetime]):
    """A moment in UTC; SQLite keeps no time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(
        self, value: datetime.datetime | None, dialect: Dialect
    ) -> datetime.datetime | None:
        return None if value is None else value.astimezone(datetime.timezone.utc)

    def process_result_value(
        self, value: datetime.datetime | None, dialect: Dialect
    ) -> datetime.datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            return value.replace(tzinfo=datetime.timezone.utc)
        return value.astimezone(datetime.timezone.utc)


metadata = MetaData()

entries = Table(
    "entries",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("title", Text, nullable=False),
    Column("title_key", Text, nullable=False, index=True),
    Column("abstract", Text, nullable=False),
    Column("authors", Text, nullable=False),  # JSON list of names
    Column("author_count", Integer),
    Column("organisation", Text),
    Column("date", Date),
    Column("day", Date, nullable=False),  # to sort by: date, else the day of import
    Column("comments", Integer, nullable=False),
    Column("votes", Integer, nullable=False),
    Column("arxiv_id", String(40), unique=True),
    Column("repo", Text),
    Column("project", Text),
    Column("slug", String(80), index=True),
    Column("words", Text, nullable=False),  # of the card: names, keywords, family
    Column("first_seen", Moment, nullable=False, index=True),
    Index("ix_entries_day_points", "day", "id", "comments", "votes"),  # pages, and what trends
)

rooms = Table(
    "rooms",
    metadata,
    Column("slug", String(80), primary_key=True),
    Column("began", Moment),  # when it began to run here; null: before this database was
)

vectors = Table(
    "vectors",
    metadata,
    Column("entry_id", Integer, ForeignKey("entries.id", ondelete="CASCADE"), primary_key=True),
    Column("model", Text, nullable=False),
    Column("vector", LargeBinary, nullable=False),  # float16, of unit length
)

subscribers = Table(
    "subscribers",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("address", String(254), nullable=False),
    Column("address_key", String(254), nullable=False, unique=True),
    Column("asks", Integer, nullable=False),  # how often something was asked for
    Column("asked", Moment),  # when a confirmation was asked for last
    Column("confirmed", Moment),
    Column("ended", Moment),
)


def _of_a_subscriber() -> Column[int]:
    there = ForeignKey("subscribers.id", ondelete="CASCADE")
    return Column("subscriber_id", Integer, there, nullable=False, index=True)


interests = Table(
    "interests",
    metadata,
    Column("id", Integer, primary_key=True),
    _of_a_subscriber(),
    Column("kind", String(20), nullable=False),
    Column("value", String(200), nullable=False),
    Column("ask", Integer, nullable=False),  # with which ask it came
    Column("confirmed", Moment),
)

letters = Table(
    "letters",
    metadata,
    Column("id", Integer, primary_key=True),
    _of_a_subscriber(),
    Column("kind", String(20), nullable=False),  # digest or confirmation
    Column("state", String(20), nullable=False, index=True),
    Column("content", LargeBinary, nullable=False),  # the message as it is sent
    Column("attempts", Integer, nullable=False),
    Column("error", Text),
    Column("created", Moment, nullable=False),
    Column("changed", Moment, nullable=False),
)

letter_entries = Table(
    "letter_entries",
    metadata,
    Column(
        "subscriber_id", Integer, ForeignKey("subscribers.id", ondelete="CASCADE"), primary_key=True
    ),
    Column("entry_id", Integer, ForeignKey("entries.id", ondelete="CASCADE"), primary_key=True),
    Column("letter_id", Integer, ForeignKey("letters.id", ondelete="CASCADE"), nullable=False),
)

letter_rooms = Table(
    "letter_rooms",
    metadata,
    Column(
        "subscriber_id", Integer, ForeignKey("subscribers.id", ondelete="CASCADE"), primary_key=True
    ),
    Column("slug", String(80), primary_key=True),
    Column("letter_id", Integer, ForeignKey("letters.id", ondelete="CASCADE"), nullable=False),
)
