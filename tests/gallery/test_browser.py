"""A real browser reads the static site from the disk and drives the server.

Needs Chromium (Debian's package, or the program named by TRANSOM_CHROMIUM) and Playwright's Python
package without its own browsers. The checks of accessibility need axe-core as well: install it with
`npm install axe-core` and name its `axe.min.js` in TRANSOM_AXE. `TRANSOM_SCREENSHOTS=DIR` keeps
pictures of the pages.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright drives the browser")
pytest.importorskip("fastapi", reason="the server needs transom[gallery]")
uvicorn = pytest.importorskip("uvicorn", reason="the server needs transom[gallery]")

from PIL import Image

from transom import registry
from transom.cards import load_cards
from transom.gallery.server import create_app
from transom.gallery.site import build
from transom.gallery.store import open_store

CHROMIUM = os.environ.get("TRANSOM_CHROMIUM") or shutil.which("chromium")
AXE = os.environ.get("TRANSOM_AXE", "")
SHOTS = os.environ.get("TRANSOM_SCREENSHOTS", "")
DESK, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not CHROMIUM, reason="no chromium on this machine; TRANSOM_CHROMIUM names one"
    ),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield opened
        opened.close()


class Window:
    """A page that remembers what went wrong on it, and what it asked the network for."""

    def __init__(self, browser: Any, size: dict[str, int], scheme: str = "light") -> None:
        self.context = browser.new_context(viewport=size, color_scheme=scheme)
        self.page = self.context.new_page()
        self.troubles: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.troubles.append(message.text)

    def shoot(self, name: str) -> None:
        if SHOTS:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=str(Path(SHOTS) / f"{name}.png"))

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *exc: object) -> None:
        self.context.close()
        if exc == (None, None, None):
            assert not self.troubles, self.troubles


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("browser") / "site"
    build(out, only=None if SHOTS else ["tome", "fna"])
    return out.as_uri()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open_store(f"sqlite:///{folder / 'gallery.sqlite'}") as store:
        config = uvicorn.Config(
            create_app(store), host="127.0.0.1", port=port, log_level="error",
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        served = uvicorn.Server(config)
        thread = threading.Thread(target=served.run)
        thread.start()
        end = time.monotonic() + 60
        while not served.started:
            assert time.monotonic() < end and thread.is_alive()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
        served.should_exit = True
        thread.join(timeout=60)


def visible(page: Any) -> int:
    return int(page.locator("#feed .card:visible").count())


def test_the_feed_from_the_disk(browser: Any, site: str) -> None:
    with Window(browser, DESK) as window:
        page = window.page
        page.goto(f"{site}/index.html")
        assert visible(page) == len(load_cards())
        assert all(address.startswith("file:") for address in window.asked)
        assert (
            page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(250, 248, 244)"
        )
        window.shoot("feed")


def test_filters(browser: Any, site: str) -> None:
    with Window(browser, DESK) as window:
        page = window.page
        page.goto(f"{site}/index.html")
        page.get_by_label("runs here").check(force=True)
        assert visible(page) == sum(slug in registry.rooms() for slug in load_cards())
        page.locator("input[name=family][value=tokens]").check(force=True)
        wanted = sum(
            slug in registry.rooms() and card.family == "tokens"
            for slug, card in load_cards().items()
        )
        assert visible(page) == wanted
        assert page.locator(".count").inner_text() == f"{wanted} papers"
        assert "family=tokens" in page.url
        window.shoot("filter")
        page.locator("#host").select_option("timm-vit-parallel-fused")
        assert 0 < visible(page) <= wanted
        page.reload()
        assert 0 < visible(page) <= wanted  # the address keeps the choice
        page.locator("input[name=kind][value=pipeline]").check(force=True)
        page.locator("input[name=family][value=lens]").check(force=True)
        assert page.locator(".none").is_visible()
        page.locator(".none button").click()
        page.wait_for_function("!location.hash")
        assert visible(page) == len(load_cards())


def test_search_while_typing_and_by_keys(browser: Any, site: str) -> None:
    with Window(browser, DESK) as window:
        page = window.page
        page.goto(f"{site}/papers/fna.html")
        page.keyboard.press("/")
        page.keyboard.type("token merg")
        hits = page.locator("#hits li")
        hits.first.wait_for()
        assert "Merging" in page.locator("#hits").inner_text()
        assert page.locator("#q").get_attribute("aria-expanded") == "true"
        window.shoot("search")
        page.keyboard.press("ArrowDown")
        assert page.locator("#q").get_attribute("aria-activedescendant") == "hit-1"
        page.keyboard.press("Escape")
        assert page.locator("#hits").is_hidden()
        page.locator("#q").fill("your vit but faster")
        page.keyboard.press("Enter")
        page.wait_for_url("**/papers/tome.html")
        page.locator("#q").fill("qqqq")
        assert "Nothing has all" in page.locator("#hits").inner_text()


def test_the_page_of_a_paper(browser: Any, site: str) -> None:
    with Window(browser, DESK) as window:
        page = window.page
        page.goto(f"{site}/papers/tome.html")
        assert page.locator("h1").inner_text().startswith("Token Merging")
        loaded = "[...document.images].every((i) => { i.loading = 'eager'; return true; })"
        assert page.evaluate(loaded)
        page.wait_for_function("[...document.images].every((i) => i.complete && i.naturalWidth)")
        assert page.locator(".pictures img").count() == 5
        assert page.locator("svg.chart .series.lit").count() >= 1
        window.shoot("paper")
        page.locator("#measured").scroll_into_view_if_needed()
        window.shoot("measured")


def test_tables_sort_by_any_column(browser: Any, site: str) -> None:
    with Window(browser, DESK) as window:
        page = window.page
        page.goto(f"{site}/results/token_reduction.html")
        column = page.locator("thead button", has_text="speedup").first
        read = """() => {
          const heads = [...document.querySelectorAll("thead th")];
          const at = heads.findIndex((h) => h.textContent === "speedup");
          const rows = [...document.querySelectorAll("tbody tr")];
          return rows.map((row) => Number(row.cells[at].dataset.value));
        }"""
        column.click()
        values = page.evaluate(read)
        assert values == sorted(values) and len(values) > 10
        column.click()
        assert page.evaluate(read) == sorted(values, reverse=True)
        page.goto(f"{site}/results/index.html")
        window.shoot("results")


def test_dark_follows_the_system_and_the_button(browser: Any, site: str) -> None:
    with Window(browser, DESK, "dark") as window:
        page = window.page
        page.goto(f"{site}/index.html")
        colour = "getComputedStyle(document.body).backgroundColor"
        assert page.evaluate(colour) == "rgb(16, 21, 28)"
        window.shoot("dark")
        page.locator("#theme").click()
        assert page.evaluate(colour) == "rgb(250, 248, 244)"
        page.goto(f"{site}/papers/fna.html")
        assert page.evaluate(colour) == "rgb(250, 248, 244)"  # it is remembered
        page.keyboard.press("t")
        assert page.evaluate(colour) == "rgb(16, 21, 28)"
        window.shoot("paper-dark")


@pytest.mark.parametrize("path", ["index.html", "papers/tome.html", "results/index.html"])
def test_nothing_sticks_out_on_a_phone(browser: Any, site: str, path: str) -> None:
    with Window(browser, PHONE) as window:
        page = window.page
        page.goto(f"{site}/{path}")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= PHONE["width"]
        if path == "index.html":
            assert not page.locator("input[name=family]").first.is_visible()
            page.locator(".filters summary").click()
            page.locator("input[name=family][value=tokens]").check(force=True)
            assert 0 < visible(page) < len(load_cards())
            page.locator(".filters summary").click()
        window.shoot(f"phone-{path.split('/')[0].removesuffix('.html')}")


def test_the_keyboard_walks_the_feed(browser: Any, site: str) -> None:
    with Window(browser, DESK) as window:
        page = window.page
        page.goto(f"{site}/index.html")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        title = "document.activeElement.textContent"
        page.keyboard.press("j")
        first = page.evaluate(title)
        page.keyboard.press("j")
        assert page.evaluate(title) != first
        page.keyboard.press("k")
        assert page.evaluate(title) == first
        page.keyboard.press("Enter")
        page.wait_for_url("**/papers/*.html")


def test_upload_progress_result(browser: Any, server: str, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    photograph(picture)
    with Window(browser, DESK) as window:
        page = window.page
        page.goto(f"{server}/try")
        page.set_input_files("#picture", str(picture))
        page.locator("#preview").wait_for()
        page.locator("#model").fill("saliency" if SHOTS else "transom/digits-vit")
        window.shoot("try")
        page.locator("button.big").click()
        page.wait_for_url("**/jobs/*")
        # how far it is, unless it is done by now
        page.locator("#part:has-text('of'), .fates").first.wait_for(timeout=120_000)
        page.wait_for_timeout(2500 if SHOTS else 0)
        window.shoot("progress")
        page.get_by_text("Where the tokens went").wait_for(timeout=180_000)
        page.wait_for_load_state("networkidle")
        slider = page.locator(".layers input").first
        shown = page.locator(".layers output").first
        last = shown.inner_text()
        slider.fill("0")
        assert shown.inner_text().startswith("block 1:") and shown.inner_text() != last
        slider.fill(slider.get_attribute("max"))
        assert page.locator("table tbody tr").count() == 4
        assert not (AXE and violations(page, "result"))
        window.shoot("result")


def test_a_job_is_cancelled_in_the_browser(browser: Any, server: str, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    photograph(picture)
    with Window(browser, DESK) as window:
        page = window.page
        page.goto(f"{server}/try")
        page.set_input_files("#picture", str(picture))
        page.locator("#model").fill("vit_small_patch16_224")
        page.locator("button.big").click()
        page.wait_for_url("**/jobs/*")
        page.locator("button.cancel").click()
        page.locator("h1", has_text="Cancelled").wait_for(timeout=60_000)


def test_the_served_feed_searches_and_filters(browser: Any, server: str) -> None:
    with Window(browser, DESK) as window:
        page = window.page
        page.goto(server)
        page.locator("input[name=status][value=runs]").check(force=True)
        page.wait_for_url("**status=runs*")
        assert visible(page) == sum(slug in registry.rooms() for slug in load_cards())
        page.locator("#q").fill("neighborhood")
        page.locator("#hits li[data-href='/papers/fna']").click()
        page.wait_for_url("**/papers/fna")


PAGES = [
    "index.html",
    "papers/tome.html",
    "papers/rmt.html",
    "papers/asit.html",
    "hosts/index.html",
    "results/index.html",
    "results/token_reduction.html",
]


@pytest.mark.skipif(not AXE, reason="TRANSOM_AXE does not name axe.min.js of axe-core")
@pytest.mark.parametrize(
    ("size", "scheme"), [(DESK, "light"), (DESK, "dark"), (PHONE, "light")], ids=str
)
def test_axe_finds_no_violation(
    browser: Any, site: str, server: str, size: dict[str, int], scheme: str
) -> None:
    with Window(browser, size, scheme) as window:
        page = window.page
        addresses = [f"{site}/{path}" for path in PAGES]
        served = ("/", "/try", "/search?q=merge", "/nope/x", "/subscribe")
        addresses += [f"{server}{path}" for path in served]
        found = []
        for address in addresses:
            page.goto(address)
            found += violations(page, address.rpartition("site/")[2])
        window.troubles = [t for t in window.troubles if "404" not in t]
        assert not found, "\n".join(map(str, found))


def violations(page: Any, name: str) -> list[tuple[str, str, list[str]]]:
    """What axe-core finds on the page that is open."""
    page.evaluate(Path(AXE).read_text(encoding="utf-8"))
    answer = page.evaluate("axe.run(document, { preload: false })")
    return [
        (name, violation["id"], [node["html"][:160] for node in violation["nodes"][:3]])
        for violation in answer["violations"]
    ]


def photograph(path: Path) -> None:
    """A photograph where the demo's packages are, else a drawn one."""
    try:
        from transom.demo.photos import load_photos

        load_photos()[2].image.save(path)
    except Exception:
        Image.radial_gradient("L").convert("RGB").save(path)
