"""The static site: pages, drawings, search index, and nothing from the network.

    transom gallery build site

Every address is relative and every asset lies beside the pages, so the folder works where it is
opened from a disk as well as behind a web server.
"""

from __future__ import annotations

import datetime
import shutil
import tempfile
from collections.abc import Callable, Collection
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from transom import registry
from transom.cards import load_cards
from transom.errors import GalleryError
from transom.gallery import content, pages
from transom.gallery.drawings import Picture, draw_all
from transom.gallery.rendering import Urls, render
from transom.gallery.results import results

if TYPE_CHECKING:
    from transom.gallery.store import Store

_MARK = ".transom-gallery"  # tells a folder that we wrote from one that we did not
Progress = Callable[[str, int, int], None]


def build(
    out: str | Path,
    *,
    store: Store | None = None,
    limit: int = 2000,
    drawings: bool = True,
    only: Collection[str] | None = None,
    today: datetime.date | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the site; an older one in the same folder is replaced once the new one is whole.

    Args:
        out: folder; made if it is not there. One that holds anything else is refused.
        store: imported entries to show beside the cards; none by default. Their abstracts stay in
            it: the site shows titles, authors and links.
        limit: most entries of the store.
        drawings: whether mechanisms are drawn, which takes a minute.
        only: slugs to draw; all by default.
        today: day from which "new" is counted back.
        progress: called with what is being made, how much of it is done and how much there is.

    Returns:
        The page to open.

    Raises:
        GalleryError: the folder holds something that is no gallery.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / _MARK).exists())):
        raise GalleryError(
            f"{str(out)!r} is there and holds no gallery; expected a new or empty folder, or one "
            "that `transom gallery build` wrote, because what is in it is replaced"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        new = Path(folder) / "site"
        _write(new, store, limit, drawings, only, today or datetime.date.today(), progress)
        old = Path(folder) / "old"
        if out.exists():
            out.rename(old)
        new.rename(out)
    return out / "index.html"


def _write(
    out: Path,
    store: Store | None,
    limit: int,
    drawings: bool,
    only: Collection[str] | None,
    today: datetime.date,
    progress: Progress | None,
) -> None:
    tell = progress or (lambda *_: None)
    for name in ("papers", "results", "hosts", "static", "drawings"):
        (out / name).mkdir(parents=True)
    (out / _MARK).write_text("", encoding="utf-8")
    copy_static(out / "static")
    pictures: dict[str, list[Picture]] = {}
    if drawings:
        wanted = [s for s in registry.rooms() if s in load_cards() and (only is None or s in only)]
        pictures = draw_all(out / "drawings", wanted, lambda *at: tell("drawings", *at))
    thumbnails = {slug: drawn[-1].file for slug, drawn in pictures.items()}

    items = [pages.item_of(card, thumbnails.get(card.slug, "")) for card in load_cards().values()]
    (out / "static" / "index.js").write_text(
        content.search_index(items).to_script(), encoding="utf-8"
    )
    feed = content.merged(items, store, limit, today) if store else items
    urls = Urls()
    shown = content.feed([content.linked(item, urls) for item in feed])
    _page(out / "index.html", render("feed.html.j2", urls, **shown, here="feed"))

    below = Urls("../")
    for done, card in enumerate(load_cards().values()):
        tell("pages", done, len(load_cards()))
        shown = content.paper(card.slug, pictures.get(card.slug, []), below)
        _page(out / "papers" / f"{card.slug}.html", render("paper.html.j2", below, **shown))
    tell("results", 0, 1)
    _page(
        out / "results" / "index.html",
        render("results.html.j2", below, **content.overview(), here="results"),
    )
    for name, result in results().items():
        page = render("result.html.j2", below, **content.result(name), here="results")
        _page(out / "results" / f"{name}.html", page)
        shutil.copyfile(result.path, out / "results" / f"{name}.csv")
    _page(
        out / "hosts" / "index.html",
        render("hosts.html.j2", below, **content.hosts(), here="hosts"),
    )


def copy_static(folder: Path) -> None:
    """Style sheet and scripts, except what only the server needs."""
    source = resources.files("transom.gallery") / "static"
    for file in source.iterdir():
        if file.name != "try.js":
            (folder / file.name).write_bytes(file.read_bytes())


def _page(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
