"""Entries, rooms, vectors, and the full-text index."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_INDEXED = "title, words, authors, organisation, abstract"


def upgrade() -> None:
    moment = sa.DateTime(timezone=True)
    op.create_table(
        "entries",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("title", sa.Text, nullable=False),
        sa.Column("title_key", sa.Text, nullable=False),
        sa.Column("abstract", sa.Text, nullable=False),
        sa.Column("authors", sa.Text, nullable=False),
        sa.Column("author_count", sa.Integer),
        sa.Column("organisation", sa.Text),
        sa.Column("date", sa.Date),
        sa.Column("day", sa.Date, nullable=False),
        sa.Column("comments", sa.Integer, nullable=False),
        sa.Column("votes", sa.Integer, nullable=False),
        sa.Column("arxiv_id", sa.String(40), unique=True),
        sa.Column("repo", sa.Text),
        sa.Column("project", sa.Text),
        sa.Column("slug", sa.String(80)),
        sa.Column("words", sa.Text, nullable=False),
        sa.Column("first_seen", moment, nullable=False),
    )
    op.create_index("ix_entries_title_key", "entries", ["title_key"])
    op.create_index("ix_entries_slug", "entries", ["slug"])
    op.create_index("ix_entries_first_seen", "entries", ["first_seen"])
    op.create_index("ix_entries_day_points", "entries", ["day", "id", "comments", "votes"])
    op.create_table(
        "rooms",
        sa.Column("slug", sa.String(80), primary_key=True),
        sa.Column("began", moment),
    )
    op.create_table(
        "vectors",
        sa.Column(
            "entry_id",
            sa.Integer,
            sa.ForeignKey("entries.id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("vector", sa.LargeBinary, nullable=False),
    )
    if op.get_bind().dialect.name == "sqlite":
        _fts5()
    else:
        _tsvector()


def _fts5() -> None:
    """The index keeps no second copy of the text; triggers keep it up to date."""
    op.execute(
        f"CREATE VIRTUAL TABLE entries_fts USING fts5({_INDEXED}, content='entries', "
        "content_rowid='id', prefix='3', tokenize='porter unicode61 remove_diacritics 2')"
    )
    columns = [name.strip() for name in _INDEXED.split(",")]
    new = ", ".join(f"new.{name}" for name in columns)
    old = ", ".join(f"old.{name}" for name in columns)
    insert = f"INSERT INTO entries_fts(rowid, {_INDEXED}) VALUES (new.id, {new});"
    remove = (
        f"INSERT INTO entries_fts(entries_fts, rowid, {_INDEXED}) VALUES ('delete', old.id, {old});"
    )
    op.execute(f"CREATE TRIGGER entries_in AFTER INSERT ON entries BEGIN {insert} END")
    op.execute(f"CREATE TRIGGER entries_out AFTER DELETE ON entries BEGIN {remove} END")
    op.execute(
        f"CREATE TRIGGER entries_new AFTER UPDATE OF {_INDEXED} ON entries "
        f"BEGIN {remove} {insert} END"
    )


def _tsvector() -> None:
    """Signs become blanks first: PostgreSQL takes what looks like a tag or a file for no words."""

    def words(column: str) -> str:
        return rf"regexp_replace({column}, '[\x21-\x2f\x3a-\x40\x5b-\x60\x7b-\x7e]+', ' ', 'g')"

    title, names, abstract = (
        words("title || ' ' || words"),
        words("authors || ' ' || coalesce(organisation, '')"),
        words("abstract"),
    )
    op.execute(
        "ALTER TABLE entries ADD COLUMN document tsvector GENERATED ALWAYS AS ("
        f"setweight(to_tsvector('english', {title}), 'A') || "
        f"setweight(to_tsvector('simple', {names}), 'B') || "
        f"setweight(to_tsvector('english', {abstract}), 'D')) STORED"
    )
    op.execute("CREATE INDEX ix_entries_document ON entries USING gin (document)")


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        op.execute("DROP TABLE entries_fts")
    for table in ("vectors", "rooms", "entries"):
        op.drop_table(table)
