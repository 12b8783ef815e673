"""Reading a feed of papers: saved daily-papers pages, their JSON, arXiv Atom.

Everything that comes in is text by people we do not know. It leaves here as plain text without
control characters, as numbers in range and as addresses that begin with http; whoever shows it
escapes it. A source is read whole or not at all.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import re
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from transom.cards import Card, load_cards
from transom.errors import FeedError

log = logging.getLogger(__name__)

LARGEST = 64 * 2**20
"""Bytes of a source that are read at most."""
LONGEST = {"title": 1000, "abstract": 50_000, "name": 300, "address": 2000}
"""Characters of one field at most."""
MOST = 2**31 - 1
"""Largest count a database column takes."""
SECONDS = 30.0
"""How long a server may take to answer."""

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAY = re.compile(r"(?:Published on )?([A-Z][a-z]{2,8})\.? (\d{1,2})(?:, (\d{4}))?(?: (\d{1,9}))?")
_COUNT = re.compile(r"(?:[•·]\s*)?(\d{1,9}) authors?")
_ARXIV = re.compile(r"(\d{4}\.\d{4,5}|[a-z-]+(?:\.[A-Z]{2})?/\d{7})(?:v\d+)?")
_REPO = re.compile(r"https?://(?:www\.)?github\.com/[\w.-]+/[\w.-]*\w")
_PROJECT = re.compile(r"https?://[\w-]+\.github\.io(?:/[\w./-]*\w)?/?")
_JSON_FORM = (
    "expected a list of items with 'title', 'publishedAt', 'numComments' and "
    "'paper': {'id', 'title', 'summary', 'authors', 'upvotes', ...}"
)


@dataclass(frozen=True)
class Entry:
    """One paper as a feed tells of it.

    Attributes:
        title: one line of text.
        abstract: "" where the source has none.
        authors: names; often only their number is known.
        author_count: None where the source does not say.
        organisation: whose paper it is, where the feed names one instead of authors.
        date: of publication; None where the source does not say.
        comments: written under it.
        votes: given to it.
        arxiv_id: without version.
        repo: address of the code.
        project: address of the project's page.
        slug: of the card here, if this is one of the papers transom knows.
    """

    title: str
    abstract: str = ""
    authors: tuple[str, ...] = ()
    author_count: int | None = None
    organisation: str | None = None
    date: datetime.date | None = None
    comments: int = 0
    votes: int = 0
    arxiv_id: str | None = None
    repo: str | None = None
    project: str | None = None
    slug: str | None = None

    @property
    def key(self) -> str:
        """What two entries of one paper have in common: see :func:`title_key`."""
        return title_key(self.title)


@lru_cache(maxsize=4096)
def title_key(title: str) -> str:
    """A title without case, accents, blanks and punctuation."""
    if title.isascii():
        return re.sub(r"[^a-z0-9]+", "", title.lower()) or title.lower()
    plain = unicodedata.normalize("NFKD", title).casefold()
    return "".join(c for c in plain if c.isalnum()) or plain


def recognised(entry: Entry) -> Entry:
    """The entry with the slug of the card of this title, if there is one, and with its day."""
    card = cards_by_key().get(entry.key)
    if card is None:
        return entry
    return dataclasses.replace(entry, slug=card.slug, date=entry.date or card.published)


@cache
def cards_by_key() -> dict[str, Card]:
    """All cards by :func:`title_key`."""
    return {title_key(card.title): card for card in load_cards().values()}


def read(source: str | Path | bytes, *, year: int | None = None) -> list[Entry]:
    """All entries of one source, in its order.

    Args:
        source: a file, an http(s) address, or the content itself as bytes: a daily-papers page
            saved as text or HTML, its JSON form, or an Atom feed of arXiv.
        year: of the page, for dates that are written without one; this year by default.

    Raises:
        FeedError: the source cannot be read, has an unknown form, holds no entry, or one of its
            entries is broken. Nothing of it is returned then.
    """
    name, content = _fetch(source)
    year = datetime.date.today().year if year is None else year
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FeedError(
            f"{name}: byte {error.start} is not UTF-8 text; expected a page saved as text or "
            "HTML, JSON, or Atom"
        ) from None
    if not text.strip():
        raise FeedError(f"{name}: is empty; expected a feed with at least one entry")
    try:
        found = list(_form(text.lstrip())(text, year))
    except FeedError as error:
        raise FeedError(f"{name}: {error}") from None
    if not found:
        raise FeedError(f"{name}: holds no entry; was the page saved before it had loaded?")
    return [recognised(entry) for entry in found]


def _fetch(source: str | Path | bytes) -> tuple[str, bytes]:
    """What to call the source in messages, and what is in it."""
    if isinstance(source, bytes):
        return f"{len(source)} bytes", source
    name = str(source)
    scheme = urllib.parse.urlsplit(name).scheme if "://" in name else ""
    try:
        if scheme in ("http", "https"):
            request = urllib.request.Request(name, headers={"User-Agent": "transom"})
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                content: bytes = answer.read(LARGEST + 1)
        elif scheme:
            raise FeedError(f"{name}: {scheme!r} addresses are not read; expected http or https")
        else:
            with Path(name).open("rb") as file:
                content = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or error
        raise FeedError(f"{name}: cannot be read: {reason}; expected a file or an address") from (
            error
        )
    if len(content) > LARGEST:
        raise FeedError(f"{name}: has more than {LARGEST // 2**20} MiB; expected a page of a feed")
    return name, content


def _form(text: str) -> Callable[[str, int], Iterator[Entry]]:
    if text[0] in "[{":
        return _json
    if text[0] == "<":
        opening = re.search(r"<([A-Za-z:]+)[\s>]", re.sub(r"<[?!][^>]*>", "", text[:4000]))
        return _atom if opening is not None and opening[1] in ("feed", "atom:feed") else _html
    return _page


def _page(text: str, year: int) -> Iterator[Entry]:
    """A page as a browser saves it as text.

    After "Daily Papers" and the day come, apart from each other by empty lines: a title, an
    abstract, and who and when ("• 8 authors", "·", "Apr 6, 2023 2"; 2 comments). Who and when may
    be missing, and an organisation may stand in the place of the authors.
    """
    blocks = _after_day(_blocks(text))
    at = 0
    while at < len(blocks):
        line, title = blocks[at]
        if "·" in title:
            raise FeedError(f"line {line}: authors and date without a title before them")
        at += 1
        abstract: list[str] = []
        while at < len(blocks) and "·" not in blocks[at][1]:
            if abstract and _may_be_title(blocks[at][1]):
                break
            abstract += blocks[at][1]
            at += 1
        byline: dict[str, Any] = {}
        if at < len(blocks) and "·" in blocks[at][1]:
            byline = _byline(*blocks[at], year)
            at += 1
        elif not abstract:
            raise FeedError(
                f"line {line}: {_short(' '.join(title))} is followed neither by an abstract nor by "
                "authors and a date"
            )
        yield _entry(" ".join(title), " ".join(abstract), f"line {line}", **byline)


def _blocks(text: str) -> list[tuple[int, list[str]]]:
    """Lines between empty lines, with the number of the first."""
    blocks: list[tuple[int, list[str]]] = []
    inside = False
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            inside = False
        elif inside:
            blocks[-1][1].append(line.strip())
        else:
            blocks.append((number, [line.strip()]))
            inside = True
    return blocks


def _after_day(blocks: list[tuple[int, list[str]]]) -> list[tuple[int, list[str]]]:
    seen = False
    for at, (_, lines) in enumerate(blocks):
        seen = seen or "Daily Papers" in lines
        if seen and _DAY.fullmatch(lines[-1]):
            return blocks[at + 1 :]
    missing = "no day below 'Daily Papers'" if seen else "no line 'Daily Papers'"
    raise FeedError(
        f"{missing}; expected a daily-papers page saved as text or HTML, its JSON, or Atom"
    )


def _may_be_title(lines: list[str]) -> bool:
    """Whether a block behind an abstract begins the next entry, or goes on with the abstract."""
    text = " ".join(lines)
    return len(text) <= 250 and not text.endswith(".") and "http" not in text


def _byline(line: int, lines: list[str], year: int) -> dict[str, Any]:
    if len(lines) != 3 or lines[1] != "·":
        raise FeedError(
            f"line {line}: {_short(' / '.join(lines))} is not authors, a line '·' and a date"
        )
    who = _COUNT.fullmatch(lines[0])
    date, comments = _day(lines[2], year, f"line {line + 2}")
    return {
        "author_count": int(who[1]) if who else None,
        "organisation": None if who else _organisation(lines[0]),
        "date": date,
        "comments": comments,
    }


def _organisation(line: str) -> str:
    """The name without the text of the logo before it: 'NexaAI Nexa AI' is 'Nexa AI'."""
    words = line.split()
    for at in range(1, len(words)):
        logo, name = " ".join(words[:at]), " ".join(words[at:])
        if title_key(logo) == title_key(name):
            return name
    return line


def _day(text: str, year: int, where: str) -> tuple[datetime.date, int]:
    """'Oct 15, 2024 2' -> that day and 2 comments."""
    parts = _DAY.fullmatch(text.strip())
    month = parts[1][:3].lower() if parts else ""
    if parts is None or month not in _MONTHS:
        raise FeedError(f"{where}: {_short(text)} is no date such as 'Apr 6, 2023' or 'Apr 6'")
    try:
        date = datetime.date(int(parts[3] or year), _MONTHS.index(month) + 1, int(parts[2]))
    except ValueError:
        hint = "" if parts[3] else f" in {year}; give the year of the page"
        raise FeedError(f"{where}: there is no day {_short(text)}{hint}") from None
    return date, int(parts[4] or 0)


def _html(text: str, year: int) -> Iterator[Entry]:
    """A page as a browser saves it as HTML: the data it was drawn from, else its articles."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(text, "html.parser")
    for element in soup.select("[data-props]"):
        try:
            props = json.loads(str(element["data-props"]))
        except (ValueError, RecursionError):
            continue
        if isinstance(props, dict) and isinstance(props.get("dailyPapers"), list):
            yield from _items(props["dailyPapers"])
            return
    articles = [each for each in soup.find_all("article") if each.find("h3")]
    if not articles:
        raise FeedError(
            "no papers in this HTML: neither the data of a daily-papers page nor articles"
        )
    for number, article in enumerate(articles, 1):
        yield _article(article, year, f"article {number}")


def _article(article: Any, year: int, where: str) -> Entry:
    heading = article.find("h3")
    links = [str(a["href"]) for a in article.find_all("a", href=True)]
    papers = (re.search(r"/papers/([^/?#]+)", link) for link in links)
    paragraph = article.find("p")
    facts: dict[str, Any] = {}
    stamp = article.find("time")
    if stamp is not None:
        given = stamp.get("datetime")
        text = stamp.get_text(" ", strip=True)
        facts["date"] = _iso(given, where) if given else _day(text, year, where)[0]
    names = [str(i["title"]) for i in article.find_all(["img", "li"], title=True)]
    for line in article.stripped_strings:
        count = _COUNT.fullmatch(" ".join(line.split()))
        if count:
            facts["author_count"] = int(count[1])
        elif "date" not in facts and _DAY.fullmatch(line) and line != heading.get_text(strip=True):
            facts["date"], facts["comments"] = _day(line, year, where)
    for a in article.find_all("a", href=True):
        number = a.get_text(strip=True)
        if str(a["href"]).endswith("#community") and number.isdecimal():
            facts["comments"] = int(number)
    votes = article.find(class_="leading-none")
    if votes is not None and votes.get_text(strip=True).isdecimal():
        facts["votes"] = int(votes.get_text(strip=True))
    return _entry(
        heading.get_text(" ", strip=True),
        paragraph.get_text(" ", strip=True) if paragraph else "",
        where,
        authors=names,
        arxiv_id=next((found[1] for found in papers if found), None),
        **facts,
    )


def _json(text: str, year: int) -> Iterator[Entry]:
    try:
        content = json.loads(text)
    except RecursionError:
        raise FeedError(f"JSON nested too deeply; {_JSON_FORM}") from None
    except ValueError as error:
        raise FeedError(f"broken JSON: {error}") from None
    if isinstance(content, dict):
        content = content.get("dailyPapers")
    if not isinstance(content, list):
        raise FeedError(f"unknown JSON form; {_JSON_FORM}")
    return _items(content)


def _items(items: list[Any]) -> Iterator[Entry]:
    for number, item in enumerate(items, 1):
        where = f"item {number}"
        if not isinstance(item, dict) or not isinstance(item.get("paper"), dict):
            raise FeedError(f"unknown JSON form: {where} has no 'paper'; {_JSON_FORM}")
        paper = item["paper"]
        title = item.get("title") or paper.get("title")
        if not isinstance(title, str):
            raise FeedError(f"unknown JSON form: {where} has no 'title'; {_JSON_FORM}")
        given = item.get("publishedAt") or paper.get("publishedAt")
        authors = _authors(paper.get("authors"), where)
        whose = paper.get("organization") or item.get("organization")
        if isinstance(whose, dict):
            whose = whose.get("fullname") or whose.get("name")
        yield _entry(
            title,
            paper.get("summary") or item.get("summary") or "",
            where,
            authors=authors,
            author_count=len(authors) or None,
            organisation=whose,
            date=None if given is None else _iso(given, where),
            comments=item.get("numComments") or 0,
            votes=paper.get("upvotes") or 0,
            arxiv_id=paper.get("id"),
            repo=paper.get("githubRepo"),
            project=paper.get("projectPage"),
        )


def _authors(given: Any, where: str) -> list[str]:
    if given is None:
        return []
    if not isinstance(given, list):
        raise FeedError(f"{where}: 'authors' is a {type(given).__name__}; expected a list")
    names = [each.get("name") if isinstance(each, dict) else each for each in given]
    known = [name for name in names if isinstance(name, str)]
    if len(known) < len(names):
        raise FeedError(f"{where}: an author has no 'name'")
    return known


_ATOM = {"a": "http://www.w3.org/2005/Atom", "x": "http://arxiv.org/schemas/atom"}


def _atom(text: str, year: int) -> Iterator[Entry]:
    from xml.etree.ElementTree import ParseError

    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import fromstring

    try:
        root = fromstring(text.strip())
    except ParseError as error:
        raise FeedError(f"broken XML: {error}") from None
    except DefusedXmlException as error:
        raise FeedError(f"XML with entities of its own is not read: {error}") from None
    for number, entry in enumerate(root.findall("a:entry", _ATOM), 1):

        def tag(name: str, entry: Any = entry) -> str:
            return " ".join((entry.findtext(name, "", _ATOM) or "").split())

        where, address = f"entry {number}", tag("a:id")
        if "arxiv.org/api/errors" in address:
            raise FeedError(f"arXiv answered with an error: {tag('a:summary')}")
        authors = [
            " ".join(name.text.split())
            for name in entry.findall("a:author/a:name", _ATOM)
            if name.text
        ]
        published = tag("a:published") or tag("a:updated")
        yield _entry(
            tag("a:title"),
            tag("a:summary"),
            where,
            authors=authors,
            author_count=len(authors) or None,
            date=_iso(published, where) if published else None,
            arxiv_id=address.partition("/abs/")[2] or None,
            repo=_first(_REPO, tag("x:comment")),
        )


def _entry(
    title: str,
    abstract: Any,
    where: str,
    *,
    authors: Iterable[str] = (),
    author_count: int | None = None,
    organisation: Any = None,
    date: datetime.date | None = None,
    comments: Any = 0,
    votes: Any = 0,
    arxiv_id: Any = None,
    repo: Any = None,
    project: Any = None,
) -> Entry:
    """An entry of cleaned fields."""
    title = _clean(title, "title", where)
    if not title:
        raise FeedError(f"{where}: has an empty title")
    abstract = _clean(abstract, "abstract", where)
    number = _ARXIV.fullmatch(arxiv_id) if isinstance(arxiv_id, str) else None
    names = (_clean(name, "name", where) for name in authors)
    return Entry(
        title=title,
        abstract=abstract,
        authors=tuple(name for name in names if name),
        author_count=author_count,
        organisation=_clean(organisation or "", "name", where) or None,
        date=date,
        comments=_count(comments, "comments", where),
        votes=_count(votes, "votes", where),
        arxiv_id=number[1] if number else None,
        repo=_address(repo) or _first(_REPO, abstract),
        project=_address(project) or _first(_PROJECT, abstract),
    )


def _clean(text: Any, field: str, where: str) -> str:
    """One line of text without control characters, surrogates and invisible marks."""
    if not isinstance(text, str):
        raise FeedError(f"{where}: the {field} is a {type(text).__name__}; expected text")
    if len(text) > LONGEST[field]:
        raise FeedError(
            f"{where}: a {field} of {len(text)} characters; expected at most {LONGEST[field]}"
        )
    line = " ".join(text.split())
    if line.isprintable():
        return line
    kept = (c if unicodedata.category(c) not in ("Cc", "Cf", "Cs") else " " for c in line)
    return " ".join("".join(kept).split())


def _count(value: Any, field: str, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST:
        raise FeedError(f"{where}: {_short(str(value))} is no number of {field}")
    return value


def _iso(value: Any, where: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(str(value)[:10])
    except ValueError:
        raise FeedError(
            f"{where}: {_short(str(value))} is no date such as 2023-04-06T17:59:00Z"
        ) from None


def _address(value: Any) -> str | None:
    """An http(s) address; None for everything else, javascript: above all."""
    if not isinstance(value, str) or len(value) > LONGEST["address"]:
        return None
    try:
        parts = urllib.parse.urlsplit(value.strip())
    except ValueError:
        return None
    safe = parts.scheme in ("http", "https") and parts.netloc and value.isprintable()
    return value.strip() if safe and not re.search(r"[\s\"'<>\\]", value.strip()) else None


def _first(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.search(text)
    return found[0].removesuffix(".git") if found else None


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def merge(one: Entry, other: Entry) -> Entry:
    """What two entries tell of one paper together.

    The longer abstract and list of authors, the earlier date, the higher counts; of everything
    else what `one` says, if it says something. In which order entries arrive makes no difference
    to counts and dates, so reading an old page again takes nothing back.
    """
    dates = [entry.date for entry in (one, other) if entry.date is not None]
    counts = [e.author_count for e in (one, other) if e.author_count is not None]
    return Entry(
        title=one.title,
        abstract=max(one.abstract, other.abstract, key=len),
        authors=max(one.authors, other.authors, key=len),
        author_count=max(counts, default=None),
        organisation=one.organisation or other.organisation,
        date=min(dates, default=None),
        comments=max(one.comments, other.comments),
        votes=max(one.votes, other.votes),
        arxiv_id=one.arxiv_id or other.arxiv_id,
        repo=one.repo or other.repo,
        project=one.project or other.project,
        slug=one.slug or other.slug,
    )


def same(one: Entry, other: Entry) -> bool:
    """Whether two entries are about one paper: by arXiv number, else by title."""
    if one.arxiv_id and other.arxiv_id:
        return one.arxiv_id == other.arxiv_id
    return one.key == other.key
