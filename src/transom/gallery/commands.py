"""`transom papers`: the list of papers, and the feed in the user's own database."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from typer.core import TyperGroup

from transom.errors import TransomError
from transom.terminal import console

if TYPE_CHECKING:
    from transom.gallery.mail import MailSettings
    from transom.gallery.store import Hit, Store


class _ListsByDefault(TyperGroup):
    """A group that takes what is none of its commands as words to list papers by."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


papers = typer.Typer(cls=_ListsByDefault, context_settings={"help_option_names": ["-h", "--help"]})

Database = Annotated[
    str | None,
    typer.Option(
        "--db", help="sqlite:///FILE or postgresql://...; TRANSOM_DB_URL or your data folder."
    ),
]


@papers.callback()
def _papers() -> None:
    """List the papers transom knows, and keep a feed of papers.

    'transom papers' lists all, 'transom papers merging' those that match, 'transom papers show
    tome' tells all about one. The commands below keep a feed in a database of your own.
    """


@papers.command("list")
def list_(
    words: Annotated[
        list[str] | None,
        typer.Argument(help="Words to search for, or 'show SLUG' for one paper."),
    ] = None,
    ready: Annotated[bool, typer.Option("--ready", help="Only what works.")] = False,
) -> None:
    """List the papers transom knows, and which of them work; what 'transom papers' does."""
    from transom import cards, registry

    words = words or []
    rooms = registry.rooms()
    if words[:1] == ["show"] and len(words) == 2:
        _show(cards.card(words[1]), rooms.get(words[1]))
        return
    table = _table("slug", "family", "year", "works", "title")
    found = [c for c in cards.search(words) if not ready or c.slug in rooms]
    for card in found:
        kinds = ", ".join(rooms[card.slug].kinds) if card.slug in rooms else ""
        works = f"[green]{kinds}[/]" if kinds else "[dim]coming[/]"
        table.add_row(card.slug, card.family, str(card.year), works, card.title)
    if not found:
        raise TransomError(f"no paper matches {' '.join(words)!r}; try fewer or shorter words")
    console().print(table)
    console().print(f"{len(found)} papers, {sum(c.slug in rooms for c in found)} of them work")


@papers.command("import")
def import_(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files or addresses: daily-papers pages saved as text or HTML, their JSON form, "
            "Atom of arXiv."
        ),
    ],
    year: Annotated[
        int | None,
        typer.Option(min=1990, max=2100, help="Of the pages, for dates without one; this year."),
    ] = None,
    meaning: Annotated[
        bool, typer.Option(help="Prepare search by meaning, where a model is on this machine.")
    ] = True,
    db: Database = None,
) -> None:
    """Take feeds into the database: all of them or, after an error, none.

    Importing a page again changes nothing. Papers on several pages are kept once.
    """
    from transom.gallery import meaning as meanings
    from transom.gallery.feed import read

    store = _open(db)
    entries = [entry for source in sources for entry in read(source, year=year)]
    with store:
        added = store.add(entries)
        store.sync_rooms()
        if meaning and meanings.folder() is not None:
            with Progress(console=console(), transient=True) as bar:
                task = bar.add_task("search by meaning")
                meanings.index(
                    store, lambda done, total: bar.update(task, completed=done, total=total)
                )
    slugs = {entry.key: entry.slug for entry in entries}
    known = sum(slug is not None for slug in slugs.values())
    console().print(
        f"{len(entries)} entries, {len(slugs)} papers: {added.new} new, {added.merged} merged, "
        f"{added.unchanged} unchanged; {known} are known here",
        highlight=False,
    )


@papers.command()
def search(
    words: Annotated[list[str], typer.Argument(help="What to look for, in your words.")],
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Entries at most.")] = 10,
    meaning: Annotated[bool, typer.Option(help="Find what means the same, too.")] = True,
    db: Database = None,
) -> None:
    """Search titles, abstracts and authors of what was imported."""
    with _open(db) as store:
        hits = store.search(" ".join(words), limit, meaning=meaning)
        if not hits:
            raise TransomError(
                f"none of {store.count()} entries has a word of {' '.join(words)!r}; try other "
                "words, or import a feed: transom papers import FILE"
            )
    _print(hits)


@papers.command()
def trending(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Entries at most.")] = 10,
    db: Database = None,
) -> None:
    """Show what is talked about: (votes + 2 comments) / (1 + age / 7 days)²."""
    with _open(db) as store:
        hits = store.trending(limit)
        if not hits:
            raise TransomError(
                f"none of {store.count()} entries has votes or comments; import a feed that "
                "counts them: transom papers import FILE"
            )
    _print(hits)


@papers.command()
def atom(
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("feed.atom"),
    base_url: Annotated[
        str, typer.Option(help="Where your gallery stands; links lead there.")
    ] = "http://127.0.0.1:8080",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Entries at most.")] = 100,
    db: Database = None,
) -> None:
    """Write the newest entries as an Atom feed."""
    from transom.gallery.atom import atom as written

    with _open(db) as store:
        entries = store.page(limit=limit)
    if not entries:
        raise TransomError("the database is empty; import a feed: transom papers import FILE")
    updated = max(entry.first_seen for entry in entries)
    out.write_text(written(entries, base_url=base_url, updated=updated), encoding="utf-8")
    console().print(f"{len(entries)} entries: {out}", highlight=False, soft_wrap=True)


Config = Annotated[
    Path | None,
    typer.Option(
        "--config", help="Mail settings; TRANSOM_MAIL_CONFIG or mail.ini in your settings folder."
    ),
]
DryRun = Annotated[
    Path | None,
    typer.Option("--dry-run", help="Write .eml files into this folder; send and note nothing."),
]


@papers.command()
def digest(
    since: Annotated[str, typer.Option(help="7d, 36h, 2w or a day such as 2025-11-01.")] = "7d",
    topic: Annotated[
        str | None, typer.Option(help="Only what has all of these words.", metavar="WORDS")
    ] = None,
    to: Annotated[str | None, typer.Option(help="Only to this address.", metavar="ADDRESS")] = None,
    dry_run: DryRun = None,
    resend: Annotated[
        bool,
        typer.Option("--resend", help="Also what was refused, or may or may not have arrived."),
    ] = False,
    tries: Annotated[
        int, typer.Option(min=1, max=20, help="Attempts, with longer and longer pauses.")
    ] = 5,
    config: Config = None,
    db: Database = None,
) -> None:
    """Mail everybody what is new, and what has newly begun to run here.

    Nobody is sent an entry twice, however often this runs, also after a crash. Letters that the
    mail server does not take wait for the next run. Made for cron: one line, no questions.
    """
    import datetime

    from transom.gallery import letters
    from transom.gallery.digest import digests, moment, prepare, write
    from transom.gallery.subscriptions import load_secret

    store = _open(db)
    settings = _mail_settings(config, dry_run)
    secret = load_secret()
    start = moment(since, datetime.datetime.now(datetime.timezone.utc))
    with store:
        store.sync_rooms()
        found = digests(store, start, topic=topic, to=to)
        if dry_run is not None:
            paths = write(settings, secret, found, dry_run)
            console().print(f"{len(paths)} letters in {dry_run}", highlight=False, soft_wrap=True)
            return
        if resend:
            letters.again(store)
        prepare(store, settings, secret, found)
        line = letters.report(letters.deliver(store, settings, tries=tries))
    console().print(line, highlight=False, soft_wrap=True)


@papers.command()
def subscribe(
    address: Annotated[str, typer.Argument(help="Where letters go to.")],
    topic: Annotated[list[str] | None, typer.Option(help="Papers with all of these words.")] = None,
    family: Annotated[list[str] | None, typer.Option(help="Papers of this family.")] = None,
    author: Annotated[
        list[str] | None, typer.Option(help="Papers by this author or organisation.")
    ] = None,
    search_: Annotated[
        list[str] | None, typer.Option("--search", help="Papers with half of these words.")
    ] = None,
    dry_run: Annotated[
        Path | None,
        typer.Option("--dry-run", help="Write the letter as .eml into this folder instead."),
    ] = None,
    config: Config = None,
    db: Database = None,
) -> None:
    """Ask for papers by mail; a letter asks for confirmation. Each option may be repeated."""
    from transom.gallery import letters
    from transom.gallery.subscriptions import Interest, load_secret

    given = {"topic": topic, "family": family, "author": author, "search": search_}
    wanted = [Interest(kind, value) for kind, values in given.items() for value in values or []]
    store = _open(db)
    settings = _mail_settings(config, dry_run)
    with store:
        letter = letters.subscribe(store, settings, load_secret(), address, wanted)
        if letter is None:
            raise TransomError(
                f"a letter to {address} was written less than ten minutes ago; follow its link, "
                "or wait"
            )
        if dry_run is not None:
            path = letters.take_out(store, letter, dry_run)
            console().print(f"letter in {path}", highlight=False, soft_wrap=True)
            return
        line = letters.report(letters.deliver(store, settings))
    console().print(f"{address} is asked for confirmation: {line}", highlight=False, soft_wrap=True)


def _mail_settings(config: Path | None, dry_run: Path | None) -> MailSettings:
    from transom.gallery.mail import MailSettings, default_path, load_settings

    if dry_run is not None and config is None and not default_path().exists():
        return MailSettings(host="localhost", port=25, tls="none", sender="transom@localhost")
    return load_settings(config)


def _open(db: str | None) -> Store:
    for needed in ("sqlalchemy", "alembic", "bs4", "defusedxml", "itsdangerous", "platformdirs"):
        if importlib.util.find_spec(needed) is None:
            raise TransomError(
                f"the feed needs {needed}, which is not here: pip install 'transom[gallery]'"
            )
    from transom.gallery.store import open_store

    return open_store(db)


def _print(hits: list[Hit]) -> None:
    table = _table("score", "date", "slug", "title")
    for hit in hits:
        entry = hit.stored
        # What a stranger wrote is no markup.
        table.add_row(
            f"{hit.score:.3g}", str(entry.day), escape(entry.slug or ""), escape(entry.title)
        )
    console().print(table)


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, overflow="fold", no_wrap=name in ("slug", "year", "date", "score"))
    return table


def _show(card: Any, room: Any) -> None:
    console().print(f"[bold]{card.title}[/] ({card.year})")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("slug", card.slug)
    table.add_row("family", card.family)
    table.add_row("kind", card.kind)
    if card.published is not None:
        table.add_row("published", card.published.isoformat())
    table.add_row("works", ", ".join(room.kinds) if room else "coming")
    for link in card.links:
        table.add_row("link", link)
    if card.code is not None:
        table.add_row("code", getattr(card.code, "url", str(card.code)))
    console().print(table)
    if room is None:
        return
    if room.method is not None:
        console().print(f"\n[bold]{room.method.__name__}[/] settings and defaults")
        for field in dataclasses.fields(room.method):
            console().print(f"  {field.name} = {field.default!r}")
    if room.backbones:
        console().print("\n[bold]timm models[/]")
        for backbone in room.backbones:
            console().print(f"  {backbone.name}", highlight=False)
    for offer in room.offers:
        console().print(f"{offer.kind} {offer.name}", highlight=False)
    console().print(f"\n{(room.module.__doc__ or '').strip()}", highlight=False)
