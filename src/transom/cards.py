"""The cards: facts about every paper transom knows, whether it works here yet or not.

The facts live in `data/papers.json`, one card a line. What a card does not say, on purpose, is
whether the paper works: that is read from the registry (`transom.registry.methods()`).
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from transom.errors import TransomError

FAMILIES = (
    "action",
    "adaptation",
    "attention",
    "compression",
    "fusion",
    "generation",
    "lens",
    "systems",
    "tokens",
    "vision_language",
)
KINDS = ("method", "backbone", "objective", "lens", "pipeline")
CODE_STATUS = ("available", "partial", "not released", "not found")

# A word in the slug or in a name says more than the same word somewhere in a title.
_WEIGHTS = {"slug": 8, "names": 8, "family": 4, "kind": 4, "keywords": 3, "title": 3, "venue": 1}


@dataclass(frozen=True)
class Code:
    """A public repository and the commit that was read."""

    repository: str
    commit: str | None = None
    licence: str | None = None

    @property
    def url(self) -> str:
        """Address of the repository, at the commit where one is known."""
        tree = f"/tree/{self.commit}" if self.commit else ""
        return f"https://github.com/{self.repository}{tree}"


@dataclass(frozen=True)
class Card:
    """The facts of one paper.

    Attributes:
        slug: key in the registry, on the command line and in the docs.
        family: one of `FAMILIES`.
        year: of the first public version.
        published: day of the first public version, where it is known.
        title: as published.
        kind: one of `KINDS`: what the paper mainly is here.
        venue: where it appeared, if known.
        names: what people call it.
        keywords: a few words to find it by.
        links: addresses given in the paper's abstract.
        code_status: one of `CODE_STATUS`, about the authors' own code.
        code: the authors' repository; None where there is none with the paper's code.
        related_code: other repositories a reader may want: ports, substrates, later homes.
        anchor: True for a paper outside the list, kept because the list is compared with it.
    """

    slug: str
    family: str
    year: int
    title: str
    kind: str
    published: datetime.date | None = None
    venue: str | None = None
    names: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    code_status: str = "not found"
    code: Code | None = None
    related_code: tuple[Code, ...] = ()
    anchor: bool = False

    @property
    def name(self) -> str:
        """Short name for tables: the first of `names`, else the slug."""
        return self.names[0] if self.names else self.slug


def _card(record: Mapping[str, Any]) -> Card:
    fields = dict(record)
    for key in ("names", "keywords", "links"):
        fields[key] = tuple(fields[key])
    published = fields["published"]
    fields["published"] = datetime.date.fromisoformat(published) if published else None
    fields["code"] = Code(**fields["code"]) if fields["code"] else None
    fields["related_code"] = tuple(Code(**each) for each in fields["related_code"])
    return Card(**fields)


def load_cards() -> dict[str, Card]:
    """All cards by slug, in alphabetical order.

    Returns:
        The 89 papers of the list and the anchors (see `Card.anchor`); a new dict each time.
    """
    return dict(_cards())


@cache
def _cards() -> dict[str, Card]:
    facts = resources.files("transom") / "data" / "papers.json"
    records = json.loads(facts.read_text(encoding="utf-8"))
    return {record["slug"]: _card(record) for record in records}


def card(slug: str) -> Card:
    """The card of one paper.

    Raises:
        TransomError: no paper has this slug; the message names the closest ones.
    """
    if slug in _cards():
        return _cards()[slug]
    near = ", ".join(each.slug for each in search([slug])[:5])
    hint = f"did you mean: {near}" if near else "`transom papers` lists all slugs"
    raise TransomError(f"no paper has the slug {slug!r}; {hint}")


def search(words: str | Iterable[str]) -> list[Card]:
    """Cards that match every word, best first; ties in alphabetical order.

    A word matches where it begins a word of the slug, names, family, kind, keywords, title or
    venue, without regard to case; a year matches as a number. No words match everything.

    Args:
        words: a line to be split at blanks, or words.
    """
    line = words if isinstance(words, str) else " ".join(words)
    wanted = _words(line)
    scored = [(_score(each, wanted), each) for each in _cards().values()]
    return [each for score, each in sorted(scored, key=lambda pair: -pair[0]) if score > 0]


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[^0-9a-z+]+", text.lower()) if word]


def _score(each: Card, wanted: list[str]) -> int:
    """Sum over the wanted words of all places where each occurs; 0 when one is missing."""
    places = {
        "slug": each.slug,
        "names": " ".join(each.names),
        "family": each.family,
        "kind": each.kind,
        "keywords": " ".join(each.keywords),
        "title": each.title,
        "venue": f"{each.venue or ''} {each.year}",
    }
    found = {place: _words(text) for place, text in places.items()}
    total = 1
    for word in wanted:
        score = sum(
            # A whole word counts twice as much as the beginning of one.
            _WEIGHTS[place] * (2 if word in there else 1)
            for place, there in found.items()
            if any(other.startswith(word) for other in there)
        )
        if score == 0:
            return 0
        total += score
    return total
