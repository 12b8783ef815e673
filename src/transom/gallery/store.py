"""The gallery's database: entries of feeds, kept on the user's machine.

SQLite by default (a file in the user's data folder, WAL, FTS5), PostgreSQL when `TRANSOM_DB_URL`
says so. A store may be used from several threads and processes: every call has a connection of its
own, and what writes takes turns.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Row,
    and_,
    create_engine,
    event,
    func,
    or_,
    select,
    text,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, InterfaceError, NoSuchModuleError

from transom.cards import FAMILIES, KINDS, Card, load_cards
from transom.errors import SettingsError, StoreError
from transom.gallery.feed import Entry, cards_by_key, merge, recognised, same
from transom.gallery.meaning import Meaning, fuse
from transom.gallery.schema import entries as table
from transom.gallery.schema import rooms, vectors
from transom.gallery.search import Ranked, find, similar

if TYPE_CHECKING:
    from alembic.config import Config

log = logging.getLogger(__name__)

STATUS = ("works", "coming", "unknown")
"""Works: has a room here. Coming: has a card. Unknown: is a paper of the feed only."""
_CHUNK = 500
_LOCK = 0x7472616E736F6D  # of PostgreSQL, for all that writes entries


@dataclass(frozen=True)
class Stored(Entry):
    """An entry that is in the store.

    Attributes:
        id: of the row.
        first_seen: when it was imported first, in UTC.
    """

    id: int = 0
    first_seen: datetime.datetime = datetime.datetime.min

    @property
    def day(self) -> datetime.date:
        """The day it is shown under: of publication, else of the import."""
        return self.date or self.first_seen.date()


@dataclass(frozen=True)
class Added:
    """What an import did; the three add up to the entries given.

    Attributes:
        new: papers that were not there.
        merged: entries of papers that were there, which told something more.
        unchanged: entries which told nothing more.
    """

    new: int
    merged: int
    unchanged: int


@dataclass(frozen=True)
class Hit:
    """An entry that a search found; only scores of one search compare."""

    stored: Stored
    score: float


def default_url() -> str:
    """`TRANSOM_DB_URL`, else a file in the user's data folder."""
    given = os.environ.get("TRANSOM_DB_URL")
    if given:
        return given
    from platformdirs import user_data_path

    return f"sqlite:///{user_data_path('transom', appauthor=False) / 'gallery.sqlite'}"


def open_store(url: str | None = None) -> Store:
    """Open a database, make it where it is not there yet, and bring its tables up to date.

    Args:
        url: of SQLAlchemy, such as `sqlite:///feed.sqlite` or
            `postgresql+psycopg://user@host/name`; :func:`default_url` by default.

    Raises:
        StoreError: it is no database, cannot be reached, or was made by a newer transom.
    """
    given = url or default_url()
    try:
        parsed = make_url(given)
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        engine = _engine(parsed)
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise StoreError(
            f"{_hidden(given)} is no database transom can open ({error}); expected "
            "sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"
        ) from None
    store = Store(engine)
    try:
        _migrate(store)
    except (DatabaseError, InterfaceError, OSError) as error:
        engine.dispose()
        reason = str(getattr(error, "orig", error)).strip().splitlines()[0]
        raise StoreError(
            f"the database {_hidden(given)} cannot be opened: {reason}; set TRANSOM_DB_URL or "
            "give another file"
        ) from error
    return store


def _hidden(url: str) -> str:
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return repr(url)


def _engine(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True)
    if url.database in (None, "", ":memory:"):
        raise ArgumentError("a database in memory is gone with its connection")
    Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": 60})

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say so, below
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("PRAGMA cache_size=-65536")  # KiB

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        # A reader that turns into a writer may find that another was faster: begin as a writer.
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def migrations() -> Config:
    """What Alembic has to know; the connection goes into `attributes`."""
    from alembic.config import Config

    config = Config()
    folder = str(Path(__file__).parent / "migrations")
    config.set_main_option("script_location", folder.replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _migrate(store: Store) -> None:
    from alembic import command
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = migrations()
    scripts = ScriptDirectory.from_config(config)
    wanted = scripts.get_current_head()
    with store.reads() as connection:
        if MigrationContext.configure(connection).get_current_revision() == wanted:
            return
    with store.writes() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
        if current is not None and current not in {
            each.revision for each in scripts.walk_revisions()
        }:
            raise StoreError(
                f"the database has the form {current!r}, which this transom does not know; it was "
                "made by a newer one: update transom, or give another database"
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


class Store:
    """Entries in a database. Made by :func:`open_store`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._writer = engine.execution_options(writes=True)
        self._meaning = Meaning()

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_sqlite(self) -> bool:
        """Whether this is a file of SQLite."""
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def reads(self) -> Iterator[Connection]:
        """A connection that sees one state of the database."""
        with self.engine.connect() as connection:
            yield connection

    @contextmanager
    def writes(self) -> Iterator[Connection]:
        """A transaction; no other writer is in one, and an exception undoes it all."""
        with self._writer.begin() as connection:
            if not self.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            yield connection

    def add(self, entries: Iterable[Entry], *, now: datetime.datetime | None = None) -> Added:
        """Take entries in; all of them or, after an exception, none.

        Entries of one paper become one: by arXiv number, else by title.

        Args:
            entries: in any order, again and again if you like.
            now: when they were seen first; the present by default.
        """
        now = now or _now()
        counts = {"new": 0, "merged": 0, "unchanged": 0}
        remaining = iter(entries)
        with self.writes() as connection:
            while chunk := list(islice(remaining, _CHUNK)):
                for outcome in _take_in(connection, chunk, now):
                    counts[outcome] += 1
        return Added(**counts)

    def count(self) -> int:
        """Entries in the store."""
        with self.reads() as connection:
            return connection.execute(select(func.count()).select_from(table)).scalar_one()

    def get(self, id: int) -> Stored:
        """One entry.

        Raises:
            StoreError: there is none with this id.
        """
        with self.reads() as connection:
            row = connection.execute(select(table).where(table.c.id == id)).one_or_none()
        if row is None:
            raise StoreError(f"the store has no entry {id}")
        return _stored(row)

    def many(self, ids: Sequence[int]) -> list[Stored]:
        """Entries by id, in the order given; what is not there is left out."""
        with self.reads() as connection:
            rows = connection.execute(select(table).where(table.c.id.in_(ids)))
            found = {row.id: _stored(row) for row in rows}
        return [found[each] for each in ids if each in found]

    def page(
        self,
        *,
        before: int | None = None,
        limit: int = 50,
        family: str | None = None,
        kind: str | None = None,
        status: str | None = None,
        slugs: Collection[str] | None = None,
        since: datetime.datetime | None = None,
    ) -> list[Stored]:
        """Entries, newest first.

        Args:
            before: id of the last entry of the page before this one.
            limit: entries at most.
            family: only papers of this family of cards.
            kind: only papers whose card is of this kind.
            status: one of `STATUS`.
            slugs: only papers with these slugs, such as those that fit a host.
            since: only entries that were first seen at this moment or later.

        Raises:
            SettingsError: a family, kind or status is unknown.
            StoreError: `before` is no entry.
        """
        wanted = select(table).order_by(table.c.day.desc(), table.c.id.desc()).limit(limit)
        if before is not None:
            last = self.get(before)
            wanted = wanted.where(
                or_(table.c.day < last.day, and_(table.c.day == last.day, table.c.id < before))
            )
        for name, value, known in (("family", family, FAMILIES), ("kind", kind, KINDS)):
            if value is None:
                continue
            _known(name, value, known)
            of = [c.slug for c in load_cards().values() if getattr(c, name) == value]
            wanted = wanted.where(table.c.slug.in_(of))
        if status is not None:
            _known("status", status, STATUS)
            if status == "unknown":
                wanted = wanted.where(table.c.slug.is_(None))
            else:
                works = table.c.slug.in_(_working())
                wanted = wanted.where(works if status == "works" else ~works)
        if slugs is not None:
            wanted = wanted.where(table.c.slug.in_(list(slugs)))
        if since is not None:
            wanted = wanted.where(table.c.first_seen >= since)
        with self.reads() as connection:
            return [_stored(row) for row in connection.execute(wanted)]

    def search(self, text: str, limit: int = 20, *, meaning: bool = True) -> list[Hit]:
        """Entries for what a person typed, best first; none for a line without words.

        Args:
            text: words, in any order.
            limit: entries at most.
            meaning: whether entries that mean the same in other words are found too, where there
                is a model and `transom.gallery.meaning.index` has run.
        """
        with self.reads() as connection:
            found = find(connection, text, limit)
            if meaning:
                near = self._meaning.rank(connection, text, max(limit, 20))
                if near:
                    found = fuse(find(connection, text, max(limit, 20)), near, limit)
        return self._hits(found)

    def related(self, id: int, limit: int = 5) -> list[Hit]:
        """Entries whose title and abstract are most like those of this one.

        Raises:
            StoreError: there is no such entry.
        """
        entry = self.get(id)
        line = f"{entry.title} {entry.title} {entry.abstract}"
        with self.reads() as connection:
            found = similar(connection, id, line, limit)
        return self._hits(found)

    def _hits(self, ranked: Sequence[Ranked]) -> list[Hit]:
        scores = {each.id: each.score for each in ranked}
        return [Hit(stored, scores[stored.id]) for stored in self.many(list(scores))]

    def trending(self, limit: int = 20, now: datetime.datetime | None = None) -> list[Hit]:
        """What is talked about: points that fade with age.

        score = (votes + 2 comments) / (1 + age / 7 days)²; the age counts whole days since
        publication. Entries without votes and comments are left out.
        """
        today = (now or _now()).date()
        points = table.c.votes + 2 * table.c.comments
        age: ColumnElement[Any]
        if self.is_sqlite:
            age = func.max(0.0, func.julianday(today.isoformat()) - func.julianday(table.c.day))
        else:
            age = func.greatest(0, today - table.c.day)
        fade = 1.0 + age / 7.0
        score = (points / (fade * fade)).label("score")
        # Only what is in the index: the text of all entries would have to be read otherwise.
        wanted = (
            select(table.c.id, score)
            .where(points > 0)
            .order_by(score.desc(), table.c.day.desc(), table.c.id.desc())
            .limit(limit)
        )
        with self.reads() as connection:
            found = [Ranked(row.id, float(row.score)) for row in connection.execute(wanted)]
        return self._hits(found)

    def sync_rooms(
        self, working: Collection[str] | None = None, *, now: datetime.datetime | None = None
    ) -> list[str]:
        """Note which papers run here by now, and which entries are of papers with a card.

        What runs when the database is made has no date; what is added by a later version of
        transom began when it was first noted.

        Args:
            working: slugs with a room; those of the registry by default.
            now: the present by default.

        Returns:
            Slugs that are new since the last time.
        """
        working = _working() if working is None else working
        now = now or _now()
        keys = cards_by_key()
        with self.writes() as connection:
            known = set(connection.execute(select(rooms.c.slug)).scalars())
            began = sorted(set(working) - known)
            if began:
                stamp = now if known else None
                rows = [{"slug": slug, "began": stamp} for slug in began]
                connection.execute(rooms.insert(), rows)
            nameless = select(table.c.id, table.c.title_key).where(
                table.c.slug.is_(None), table.c.title_key.in_(keys)
            )
            for row in connection.execute(nameless).all():
                card = keys[row.title_key]
                connection.execute(
                    table.update()
                    .where(table.c.id == row.id)
                    .values(slug=card.slug, words=_words(card))
                )
        return began if known else []

    def began(self, since: datetime.datetime) -> list[str]:
        """Slugs of papers that began to run here at this moment or later."""
        wanted = select(rooms.c.slug).where(rooms.c.began >= since).order_by(rooms.c.slug)
        with self.reads() as connection:
            return list(connection.execute(wanted).scalars())


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def _known(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise SettingsError(f"{name} is {value!r}; expected one of {', '.join(known)}")


def _working() -> list[str]:
    from transom.registry import rooms as offered

    return list(offered())


def _words(card: Card) -> str:
    """By what a paper is found beside its own text."""
    return " ".join([*card.names, card.slug, *card.keywords, card.family.replace("_", " ")])


@dataclass
class _Paper:
    """A paper while a chunk is taken in."""

    entry: Entry
    id: int | None
    first_seen: datetime.datetime
    changed: bool = False


def _take_in(
    connection: Connection, chunk: Sequence[Entry], now: datetime.datetime
) -> Iterator[str]:
    """Merge a chunk into the table; says of each entry what became of it."""
    numbers = [entry.arxiv_id for entry in chunk if entry.arxiv_id]
    keys = [entry.key for entry in chunk]
    there = select(table).where(or_(table.c.title_key.in_(keys), table.c.arxiv_id.in_(numbers)))
    by_number: dict[str, _Paper] = {}
    by_key: dict[str, list[_Paper]] = defaultdict(list)
    papers: list[_Paper] = []

    def remember(paper: _Paper) -> None:
        papers.append(paper)
        by_key[paper.entry.key].append(paper)
        if paper.entry.arxiv_id:
            by_number[paper.entry.arxiv_id] = paper

    for row in connection.execute(there):
        stored = _stored(row)
        remember(_Paper(_plain(stored), stored.id, stored.first_seen))
    for given, key in zip(chunk, keys, strict=True):
        entry = recognised(given) if given.slug is None else given
        found = by_number.get(entry.arxiv_id) if entry.arxiv_id else None
        if found is None:
            found = next((each for each in by_key[key] if same(each.entry, entry)), None)
        if found is None:
            remember(_Paper(entry, None, now))
            yield "new"
            continue
        merged = merge(found.entry, entry)
        if merged == found.entry:
            yield "unchanged"
            continue
        found.entry, found.changed = merged, True
        if merged.arxiv_id:
            by_number[merged.arxiv_id] = found
        yield "merged"
    new = [_row(each) for each in papers if each.id is None]
    if new:
        connection.execute(table.insert(), new)
    for each in papers:
        if each.id is not None and each.changed:
            connection.execute(table.update().where(table.c.id == each.id).values(_row(each)))
            # The text may be another now: its vector is made anew.
            connection.execute(vectors.delete().where(vectors.c.entry_id == each.id))


def _row(paper: _Paper) -> Mapping[str, Any]:
    entry = paper.entry
    card = load_cards().get(entry.slug) if entry.slug else None
    return {
        "title": entry.title,
        "title_key": entry.key,
        "abstract": entry.abstract,
        "authors": json.dumps(entry.authors, ensure_ascii=False),
        "author_count": entry.author_count,
        "organisation": entry.organisation,
        "date": entry.date,
        "day": entry.date or paper.first_seen.date(),
        "comments": entry.comments,
        "votes": entry.votes,
        "arxiv_id": entry.arxiv_id,
        "repo": entry.repo,
        "project": entry.project,
        "slug": entry.slug,
        "words": _words(card) if card else "",
        "first_seen": paper.first_seen,
    }


_FIELDS = [field.name for field in dataclasses.fields(Entry)]


def _stored(row: Row[Any]) -> Stored:
    facts = {name: getattr(row, name) for name in _FIELDS}
    facts["authors"] = tuple(json.loads(facts["authors"]))
    return Stored(**facts, id=row.id, first_seen=row.first_seen)


def _plain(stored: Stored) -> Entry:
    return Entry(**{name: getattr(stored, name) for name in _FIELDS})
