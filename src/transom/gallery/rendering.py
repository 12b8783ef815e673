"""Templates and addresses: the same pages as files on a disk and as answers of a server."""

from __future__ import annotations

import functools
from typing import Any
from urllib.parse import quote

import jinja2

from transom import __version__
from transom.gallery.index import Document

NAMES = {
    "vision_language": "vision and language",
    "generation": "generation",
}


class Urls:
    """Addresses inside the static site, relative to the page they stand on.

    Args:
        root: from the page to the top of the site: "" or "../".
    """

    served = False

    def __init__(self, root: str = "") -> None:
        self.root = root

    def home(self) -> str:
        return f"{self.root}index.html"

    def paper(self, slug: str) -> str:
        return f"{self.root}papers/{quote(slug)}.html"

    def page(self, name: str) -> str:
        return f"{self.root}{name}/index.html"

    def result(self, name: str) -> str:
        return f"{self.root}results/{quote(name)}.html"

    def table(self, name: str) -> str:
        return f"{self.root}results/{quote(name)}.csv"

    def static(self, file: str) -> str:
        return f"{self.root}static/{file}"

    def drawing(self, file: str) -> str:
        return f"{self.root}drawings/{quote(file)}"


class ServedUrls(Urls):
    """Addresses on the server, from its root."""

    served = True

    def home(self) -> str:
        return "/"

    def paper(self, slug: str) -> str:
        return f"/papers/{quote(slug)}"

    def page(self, name: str) -> str:
        return f"/{name}"

    def result(self, name: str) -> str:
        return f"/results/{quote(name)}"

    def table(self, name: str) -> str:
        return f"/results/{quote(name)}.csv"

    def static(self, file: str) -> str:
        return f"/static/{file}"

    def drawing(self, file: str) -> str:
        return f"/drawings/{quote(file)}"

    def entry(self, number: int) -> str:
        return f"/entries/{number}"


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("transom.gallery"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["spoken"] = spoken
    environment.filters["sentence"] = sentence
    environment.filters["cell"] = cell
    environment.filters["code"] = code
    return environment


def render(template: str, urls: Urls, **content: Any) -> str:
    """A page as text.

    Args:
        template: file name below `templates`.
        urls: addresses for this page.
        **content: what the template shows.
    """
    given = {"csrf": "", "here": "", "user": False, **content}
    page = _environment().get_template(template)
    return page.render(urls=urls, version=__version__, **given)


def spoken(name: str) -> str:
    """A family, kind or column as words."""
    return NAMES.get(name, name.replace("_", " "))


def sentence(text: str) -> str:
    """With a large letter in front; the others as they are."""
    return text[:1].upper() + text[1:]


def code(text: str) -> str:
    """A cell of generated Markdown without its backticks."""
    return text.strip("`")


def cell(text: str) -> str:
    """A cell of a table for reading: four digits are enough."""
    try:
        value = float(text)
    except ValueError:
        return text
    if text.lstrip("-").isdigit():
        return text
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3e}"


def document(item: Any, urls: Urls, words: dict[str, str]) -> Document:
    """What the search index keeps of an item that has a card."""
    return Document(item.title, urls.paper(item.slug), item.says, "runs" in item.status, words)
