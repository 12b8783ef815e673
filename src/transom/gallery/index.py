"""The search index that is shipped with the static site: words, and where they stand.

A word that begins with what was typed counts, a whole word counts twice; rare words count more.
`static/search.js` does the same sums as `search` here.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

WEIGHTS = {"name": 12, "title": 6, "keywords": 5, "lead": 4, "facts": 3, "body": 1}


@dataclass(frozen=True)
class Document:
    """One page that can be found.

    Attributes:
        title, href, says: shown in the list of results.
        runs: whether it works here.
        words: its texts by part, see `WEIGHTS`.
    """

    title: str
    href: str
    says: str
    runs: bool
    words: Mapping[str, str]


@dataclass(frozen=True)
class Index:
    """Words with the documents they stand in.

    Attributes:
        documents: title, address, sentence, and 1 for what works here.
        terms: for every word, document and weight in turn.
    """

    documents: list[tuple[str, str, str, int]]
    terms: dict[str, list[int]]

    def to_script(self) -> str:
        """A script that a page loads: from `file://` nothing else may be read."""
        content = {"documents": self.documents, "terms": self.terms}
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        # inside a script these end it, or end a line in old engines
        for sign in ("<", "\u2028", "\u2029"):
            text = text.replace(sign, f"\\u{ord(sign):04x}")
        return f"window.transomIndex = {text};\n"


def build(documents: Iterable[Document]) -> Index:
    """The index of some documents, in their order."""
    shown: list[tuple[str, str, str, int]] = []
    terms: dict[str, list[int]] = {}
    for number, document in enumerate(documents):
        shown.append((document.title, document.href, document.says, int(document.runs)))
        weights: dict[str, int] = {}
        for part, text in document.words.items():
            for word in {*words(text)}:
                weights[word] = weights.get(word, 0) + WEIGHTS[part]
        for word, weight in weights.items():
            terms.setdefault(word, []).extend((number, weight))
    return Index(shown, dict(sorted(terms.items())))


def words(text: str) -> list[str]:
    """Words in small letters, without accents; at least two characters."""
    plain = unicodedata.normalize("NFKD", text.lower())
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    return [word for word in re.split(r"[^0-9a-z+]+", plain) if len(word) > 1]


def search(index: Index, text: str, limit: int = 20) -> list[int]:
    """Numbers of the documents that have all the words, best first."""
    wanted = words(text)
    vocabulary = list(index.terms)
    count = len(index.documents)
    total: dict[int, float] | None = None
    for word in wanted:
        found: dict[int, float] = {}
        at = bisect_left(vocabulary, word)
        while at < len(vocabulary) and vocabulary[at].startswith(word):
            term = vocabulary[at]
            entries = index.terms[term]
            rare = math.log(1 + count / (len(entries) / 2))
            for i in range(0, len(entries), 2):
                score = entries[i + 1] * rare * (2 if term == word else 1)
                found[entries[i]] = max(found.get(entries[i], 0.0), score)
            at += 1
        total = (
            found
            if total is None
            else {d: total[d] + score for d, score in found.items() if d in total}
        )
    ranked = sorted((total or {}).items(), key=lambda pair: (-pair[1], pair[0]))
    return [document for document, _ in ranked[:limit]]
