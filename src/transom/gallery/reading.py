"""Routes for reading: the feed, papers, results, search. Nothing here changes anything."""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response

from transom.cards import load_cards
from transom.gallery import content, index, pages
from transom.gallery.answers import Drawings, page
from transom.gallery.pages import Item
from transom.gallery.rendering import ServedUrls
from transom.gallery.results import results
from transom.gallery.store import Store, Stored

PAGE = 50  # entries of a page of the feed
_LARGEST = 2**31 - 1  # of the ids of a database
URLS = ServedUrls()
Text = Annotated[str, Query(max_length=200)]


def reading_routes() -> APIRouter:
    """The routes; `app.state` has the store and the drawings."""
    routes = APIRouter()
    for path, answer in (
        ("/", feed),
        ("/papers/{slug}", paper),
        ("/entries/{number}", entry),
        ("/results", overview),
        ("/results/{name}", result),
        ("/hosts", hosts),
        ("/search", search),
    ):
        routes.add_api_route(path, answer, methods=["GET"], response_class=HTMLResponse)
    routes.add_api_route("/api/search", api_search, methods=["GET"])
    routes.add_api_route("/api/papers", api_papers, methods=["GET"])
    routes.add_api_route("/feed.atom", feed_atom, methods=["GET"], response_class=Response)
    routes.add_api_route("/drawings/{name}", drawing, methods=["GET"], response_class=Response)
    return routes


def feed(
    request: Request,
    family: Text = "",
    kind: Text = "",
    status: Text = "",
    host: Text = "",
    before: Annotated[int | None, Query(ge=1, le=_LARGEST)] = None,
) -> HTMLResponse:
    """The feed, a page at a time; cards that were not imported stand in their place."""
    chosen = {"family": family, "kind": kind, "status": status, "host": host}
    chosen = {name: value for name, value in chosen.items() if value}
    wanted = _wanted(chosen)
    store: Store = request.app.state.store
    stored, ends = _part(store, before, wanted)
    top = store.get(before).day if before is not None else None
    known = {str(i.slug): i for i in content.newly_running(_cards(request).values(), store)}
    here = {each.slug for each in store.page(slugs=list(known), limit=len(known))}
    items = [_item(each, known) for each in stored]
    bottom = None if ends or not stored else stored[-1].day
    for slug, item in known.items():
        due = item.date or datetime.date(item.year or 1970, 1, 1)
        inside = (top is None or due <= top) and (bottom is None or due > bottom)
        if slug not in here and inside and (wanted is None or slug in wanted):
            items.append(content.linked(item, URLS))
    more = "" if ends else "/?" + urlencode({**chosen, "before": stored[-1].id})
    shown = content.feed(items, chosen) | {"more": more}
    return page(request, "feed.html.j2", here="feed", **shown)


def _part(
    store: Store, before: int | None, wanted: Collection[str] | None
) -> tuple[list[Stored], bool]:
    """One page of the store, and whether it is the last."""
    found = store.page(before=before, limit=PAGE + 1, slugs=wanted)
    return found[:PAGE], len(found) <= PAGE


def _wanted(chosen: dict[str, str]) -> set[str] | None:
    """Slugs that the filters let through; None for everything."""
    if not chosen:
        return None
    host = chosen.get("host", "")
    family = next((f for f in pages.host_families() if f.key == host), None)
    found = set()
    for slug in load_cards():
        item = pages.item_of(load_cards()[slug])
        fits = not host or (
            item.decodes
            if host == pages.DECODER
            else family is not None and family in pages.fitting_hosts(item)
        )
        if (
            fits
            and chosen.get("family", item.family) == item.family
            and chosen.get("kind", item.kinds[0]) in item.kinds
            and chosen.get("status", item.status[0]) in item.status
        ):
            found.add(slug)
    return found


def _cards(request: Request) -> dict[str, Item]:
    """Every card by slug, with what is drawn of it by now."""
    drawn: Drawings = request.app.state.pictures
    found = {}
    for slug, card in load_cards().items():
        pictures = drawn.of(slug)
        found[slug] = pages.item_of(card, pictures[-1].file if pictures else "")
    return found


def paper(request: Request, slug: str) -> Response:
    """The page of a paper that has a card."""
    if slug.endswith(".html"):  # the address it has in the static site, and in feeds
        return RedirectResponse(URLS.paper(slug.removesuffix(".html")), 308)
    if slug not in load_cards():
        raise HTTPException(404, "no paper has this name here")
    drawn: Drawings = request.app.state.pictures
    return page(request, "paper.html.j2", **content.paper(slug, drawn.of(slug), URLS))


def entry(request: Request, number: int) -> Response:
    """The page of an imported paper that has no card; its abstract is the reader's own copy."""
    store: Store = request.app.state.store
    if not 0 < number <= _LARGEST:
        raise HTTPException(404, "no entry has this number")
    stored = store.get(number)
    if stored.slug in load_cards():
        return RedirectResponse(URLS.paper(str(stored.slug)), 303)
    related = [_item(hit.stored) for hit in store.related(number, 4)]
    item = _item(stored)
    links = []
    if stored.arxiv_id:
        links.append(("arXiv", f"https://arxiv.org/abs/{stored.arxiv_id}"))
    for label, address in (("Code", stored.repo), ("Project", stored.project)):
        if address and address.startswith(("https://", "http://")):
            links.append((label, address))
    return page(request, "entry.html.j2", entry=stored, item=item, links=links, related=related)


def overview(request: Request) -> HTMLResponse:
    """All results."""
    return page(request, "results.html.j2", here="results", **content.overview())


def result(request: Request, name: str) -> Response:
    """One result, as a page or as its file."""
    found = results().get(name.removesuffix(".csv"))
    if found is None:
        raise HTTPException(404, "no result has this name")
    if name.endswith(".csv"):
        return FileResponse(found.path, media_type="text/csv", filename=f"{found.name}.csv")
    return page(request, "result.html.j2", here="results", **content.result(found.name))


def hosts(request: Request) -> HTMLResponse:
    """The table of hosts."""
    return page(request, "hosts.html.j2", here="hosts", **content.hosts())


def search(request: Request, q: Text = "") -> HTMLResponse:
    """Search as a page, for the return key and for browsers without scripts."""
    items = _found(request, q, 50)
    return page(request, "search.html.j2", items=items, text=q)


def api_search(
    request: Request, q: Text = "", limit: Annotated[int, Query(ge=1, le=50)] = 10
) -> JSONResponse:
    """Search as JSON: what the box asks while somebody types."""
    hits = [
        {"title": i.title, "href": i.href, "says": i.says or i.authors, "runs": "runs" in i.status}
        for i in _found(request, q, limit)
    ]
    return JSONResponse({"hits": hits})


def api_papers(request: Request, limit: Annotated[int, Query(ge=1, le=500)] = 100) -> JSONResponse:
    """Every paper with a card: what it is and whether it works here."""
    items = [content.linked(item, URLS) for item in _cards(request).values()][:limit]
    return JSONResponse(
        {
            "papers": [
                {
                    "slug": item.slug,
                    "title": item.title,
                    "published": item.date.isoformat() if item.date else None,
                    "family": item.family,
                    "kinds": item.kinds,
                    "status": item.status,
                    "slots": item.slots,
                    "hosts": item.hosts,
                    "href": item.href,
                }
                for item in items
            ]
        }
    )


def _found(request: Request, text: str, limit: int) -> list[Item]:
    """What the store finds, then cards that were never imported."""
    store: Store = request.app.state.store
    items = [_item(hit.stored) for hit in store.search(text, limit)] if text.strip() else []
    have = {item.slug for item in items}
    slugs = list(load_cards())
    for number in index.search(_index(), text, limit):
        if slugs[number] not in have:
            items.append(content.linked(pages.item_of(load_cards()[slugs[number]]), URLS))
    return items[:limit]


@functools.cache
def _index() -> index.Index:
    """Of all cards, in their order."""
    return content.search_index([pages.item_of(card) for card in load_cards().values()])


def _item(stored: Stored, known: Mapping[str, Item] | None = None) -> Item:
    """An entry with what its card knows, leading to its page."""
    slug = stored.slug or ""
    base = None
    if slug in load_cards():
        base = known[slug] if known else pages.item_of(load_cards()[slug])
    today = datetime.datetime.now(datetime.timezone.utc).date()
    item = content.from_store(stored, base, today)
    if item.slug:
        return content.linked(item, URLS)
    return dataclasses.replace(item, href=URLS.entry(stored.id))


def feed_atom(request: Request) -> Response:
    """The newest entries for readers of feeds."""
    from transom.gallery.atom import atom

    store: Store = request.app.state.store
    entries: Sequence[Any] = store.page(limit=PAGE)
    newest = max((each.first_seen for each in entries), default=None)
    text = atom(
        entries,
        base_url=request.app.state.base_url,
        updated=newest or datetime.datetime.now(datetime.timezone.utc),
    )
    return Response(text, media_type="application/atom+xml")


def drawing(request: Request, name: str) -> Response:
    """One drawn mechanism."""
    drawn: Drawings = request.app.state.pictures
    path = drawn.file(name)
    if path is None:
        raise HTTPException(404, "no drawing has this name")
    return FileResponse(path, media_type="image/webp", headers={"cache-control": "max-age=3600"})
