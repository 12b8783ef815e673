"""The static site: whole, self-contained, and telling what the registry knows."""

from __future__ import annotations

import datetime
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from transom import registry
from transom.cards import load_cards
from transom.errors import GalleryError
from transom.gallery import anatomy, charts, content, index, pages, prose, results
from transom.gallery.pages import Item
from transom.gallery.rendering import Urls, render
from transom.gallery.site import build

TODAY = datetime.date(2026, 1, 10)


class Page(HTMLParser):
    """What a page asks for, and what it must not hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.assets: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.inline: list[str] = []
        self.headings: list[int] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "source"):
            self.assets.append(given.get("src") or "")
        if tag == "link":
            self.assets.append(given.get("href") or "")
        if tag == "a":
            self.links.append(given.get("href") or "")
        if "id" in given:
            self.ids.add(given["id"] or "")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "style" or "style" in given or any(name.startswith("on") for name in given):
            self.inline.append(f"{tag} {given}")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gallery") / "site"
    build(out, only=["tome", "fna", "pace"], today=TODAY)
    return out


@pytest.fixture(scope="module")
def read(site: Path) -> dict[str, Page]:
    return {
        str(path.relative_to(site)): Page(path.read_text(encoding="utf-8"))
        for path in site.rglob("*.html")
    }


def test_there_is_a_page_for_every_paper_and_every_result(read: dict[str, Page]) -> None:
    assert {f"papers/{slug}.html" for slug in load_cards()} <= read.keys()
    assert {f"results/{name}.html" for name in results.results()} <= read.keys()
    assert {"index.html", "hosts/index.html", "results/index.html"} <= read.keys()


def test_everything_a_page_needs_lies_beside_it(site: Path, read: dict[str, Page]) -> None:
    for name, page in read.items():
        folder = (site / name).parent
        for address in page.assets:
            assert not urlsplit(address).scheme and not address.startswith("/"), (name, address)
            assert (folder / unquote(address)).is_file(), (name, address)
    styles = (site / "static" / "gallery.css").read_text(encoding="utf-8")
    assert "url(" not in styles and "@import" not in styles


def test_links_inside_the_site_lead_somewhere(site: Path, read: dict[str, Page]) -> None:
    for name, page in read.items():
        folder = (site / name).parent
        for address in page.links:
            parts = urlsplit(address)
            if parts.scheme:
                assert parts.scheme in ("https", "http"), (name, address)
            elif parts.path:
                assert (folder / unquote(parts.path)).is_file(), (name, address)
            else:
                assert parts.fragment in page.ids, (name, address)


def test_nothing_is_inline_and_headings_step_down_one_by_one(read: dict[str, Page]) -> None:
    for name, page in read.items():
        assert not page.inline, (name, page.inline[:2])
        assert page.headings[0] == 1 and page.headings.count(1) == 1, name
        steps = zip(page.headings, page.headings[1:], strict=False)
        assert all(below - above <= 1 for above, below in steps), (name, page.headings)


def test_the_feed_is_newest_first_and_holds_every_card(site: Path) -> None:
    text = (site / "index.html").read_text(encoding="utf-8")
    dates = re.findall(r'<time datetime="([\d-]+)"', text)
    assert dates == sorted(dates, reverse=True) and len(set(dates)) == len(dates)
    assert text.count("<article class=") == len(load_cards())


def test_the_page_of_a_method_shows_all_that_is_known(site: Path) -> None:
    text = (site / "papers" / "tome.html").read_text(encoding="utf-8")
    assert "6 of 6</b> golden cases pass" in text
    assert "transom.apply(model, &#34;tome&#34;)" in text
    assert len(re.findall(r"drawings/tome-\d\.webp", text)) == 5
    assert "python benchmarks/token_reduction.py" in text and '<svg class="chart"' in text
    assert "af95e4b" in text  # the commit the golden cases were recorded from
    assert len(re.findall(r'class="pane lit"', text)) > 12


def test_a_room_without_a_method_is_seen_through_its_lens(site: Path) -> None:
    text = (site / "papers" / "pace.html").read_text(encoding="utf-8")
    assert len(re.findall(r'class="wide"><img src="../drawings/pace-\d\.webp"', text)) == 2
    assert "Concepts that explain the patch embeddings" in text
    assert "transom look demo --model demo --lens concepts" in text


def test_the_page_of_a_paper_that_is_not_here_says_so(site: Path) -> None:
    missing = next(s for s in load_cards() if s not in registry.rooms())
    text = (site / "papers" / f"{missing}.html").read_text(encoding="utf-8")
    assert "Not here yet" in text and "Run it" not in text


def test_an_older_site_is_replaced_and_another_folder_is_not(site: Path, tmp_path: Path) -> None:
    (site / "leftover.html").write_text("old", encoding="utf-8")
    build(site, drawings=False, today=TODAY)
    assert not (site / "leftover.html").exists() and (site / "index.html").is_file()
    (tmp_path / "thesis.tex").write_text("mine", encoding="utf-8")
    with pytest.raises(GalleryError, match="holds no gallery"):
        build(tmp_path, drawings=False)
    assert (tmp_path / "thesis.tex").read_text(encoding="utf-8") == "mine"


def test_entries_of_a_store_meet_their_cards_and_leave_their_abstracts(tmp_path: Path) -> None:
    from transom.gallery.feed import Entry
    from transom.gallery.store import open_store

    today = datetime.datetime.now(datetime.timezone.utc).date()
    common: dict[str, Any] = {
        "organisation": None, "comments": 2, "arxiv_id": None, "repo": None, "project": None,
        "abstract": "KEPT AT HOME",
    }  # fmt: skip
    entries = [
        Entry(title=load_cards()["fna"].title, authors=(), author_count=3, date=today, votes=41,
              slug="fna", **common),
        Entry(title="A paper of today", authors=("Ada", "Bo", "Cy", "Di"), author_count=4,
              date=today, votes=1, slug=None, **common),
    ]  # fmt: skip
    with open_store(f"sqlite:///{tmp_path / 'feed.sqlite'}") as store:
        store.add(entries)
        build(tmp_path / "site", store=store, drawings=False)
    text = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert text.count("<article class=") == len(load_cards()) + 1
    assert "Ada, Bo, Cy and 1 more" in text and "41 votes" in text
    # a guessed year does not make an old paper new: its card knows the day
    assert text.count('class="new"') == 1 and "2024-03-07" in text
    every = "".join(p.read_text(encoding="utf-8") for p in (tmp_path / "site").rglob("*.html"))
    assert "KEPT AT HOME" not in every
    assert "KEPT AT HOME" not in (tmp_path / "site" / "static" / "index.js").read_text()


HOSTILE = '<img src=x onerror="alert(1)">"\'</script><script>alert(2)</script>{{ 7 * 7 }}'


def test_hostile_titles_stay_text() -> None:
    item = Item(HOSTILE, TODAY, 2026, None, authors=HOSTILE)
    text = render("feed.html.j2", Urls(), **content.feed([item]), here="feed")
    assert (
        "<img src=x" not in text
        and "alert(2)</script>" not in text
        and "49" not in text.split("<article", 1)[1].split("</article>")[0]
    )
    assert "&lt;img src=x onerror=" in text


def test_hostile_titles_do_not_leave_the_script_of_the_index() -> None:
    document = index.Document(HOSTILE, "papers/x.html", HOSTILE, True, {"title": HOSTILE})
    script = index.build([document]).to_script()
    assert "<" not in script
    stored = json.loads(script.removeprefix("window.transomIndex = ").rstrip(";\n"))
    assert stored["documents"][0][0] == HOSTILE


def test_the_index_finds_beginnings_of_words_and_wants_all_of_them() -> None:
    found = content.search_index([pages.item_of(card) for card in load_cards().values()])

    def first(text: str) -> str:
        hits = index.search(found, text, 1)
        return found.documents[hits[0]][1] if hits else ""

    assert first("your vit but fast") == "papers/tome.html"
    assert first("neighbo") == "papers/fna.html"
    assert first("attention sink") == "papers/var.html"
    assert first("merging zebra") == ""


def test_filters_count_what_they_would_show() -> None:
    items = [pages.item_of(card) for card in load_cards().values()]
    groups = {name: options for name, _, options in content.feed(items)["filters"]}
    runs = {value: count for value, _, count in groups["status"]}
    assert runs["runs"] == sum(slug in registry.rooms() for slug in load_cards())
    assert sum(count for _, _, count in groups["family"]) == len(items)


def test_hosts_of_a_method_have_every_slot_open() -> None:
    item = pages.item_of(load_cards()["illama"])
    wanted = {"norm", "attention", "ffn"}
    assert wanted <= set(item.slots)
    fits = pages.fitting_hosts(item)
    assert fits and all(wanted <= {*family.fits} for family in fits)
    assert len(fits) == sum(wanted <= {*f.fits} for f in pages.host_families())


def test_anatomy_is_read_off_a_fitted_host() -> None:
    found = anatomy.anatomy("evit")
    assert found is not None
    assert [i for i, block in enumerate(found.blocks) if block] == [3, 6, 9]
    assert found.start == 197 and found.lengths[2:4] == (197, 139)
    assert anatomy.anatomy("t2t-vit").front == ("tokenizer",)  # type: ignore[union-attr]
    assert anatomy.anatomy("vit-visual-analytics") is None


def test_the_words_of_a_room_stay_text() -> None:
    text = "X: says <b>so</b>.\n\nWith `a < b`:\n\n    y = x <script>\n\n- one\n- two\n"
    assert prose.lead(text) == "Says <b>so</b>."
    body = prose.body(text)
    assert "<script>" not in body and "<code>a &lt; b</code>" in body
    assert "y = x &lt;script&gt;</pre>" in body and body.count("<li>") == 2


def test_a_chart_draws_every_point_inside_its_frame() -> None:
    points = [charts.Point(x, x * x, f"{x}") for x in (1.0, 2.0, 7.5)]
    drawn = charts.draw(charts.Chart("t", "x", "y", [charts.Series("a", points)], front=True))
    marks = re.findall(r'class="mark" d="M([\d.-]+) ([\d.-]+)', drawn.svg)
    assert len(marks) == 3
    assert all(0 <= float(x) <= charts.WIDTH and 0 <= float(y) <= charts.HEIGHT for x, y in marks)
    assert [p.x for p in charts.pareto([*points, charts.Point(1.5, 0.5)])] == [7.5]


def test_every_result_with_a_speed_up_has_a_chart() -> None:
    assert results.results(), "docs/results is not found"
    for found in results.results().values():
        if "speedup" in found.columns:
            assert results.charts(found), found.name
        assert found.command.startswith("python benchmarks/"), found.name


QUICK = ("tome", "shvit", "dyvte", "vit-visual-analytics")  # one of each form


@pytest.mark.parametrize(
    "slug",
    [
        pytest.param(slug, marks=[] if slug in QUICK else pytest.mark.slow)
        for slug in sorted(registry.rooms().keys() & load_cards().keys())
    ],
)
def test_the_snippet_of_every_room_runs(slug: str) -> None:
    room = registry.rooms()[slug]
    code = pages.snippet(room, anatomy.anatomy(slug))
    exec(compile(code, slug, "exec"), {})  # our own words, made in this process


def test_a_backbone_that_does_not_run_takes_nothing_with_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(backbone: registry.Backbone) -> list[anatomy.Stage]:
        raise AttributeError("half of it is gone")

    monkeypatch.setattr(pages, "stages", broken)
    pages._pyramid.cache_clear()
    try:
        assert pages.paper("rmt").pyramid == "" and "are not drawn" in caplog.text
    finally:
        pages._pyramid.cache_clear()
