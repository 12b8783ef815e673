"""Full-text search in the store: which entries, in which order.

Words are weighed by how rare they are. Ranking reads every candidate, so candidates are bounded:
entries with one of the rare words of the query, in which the frequent words then count as well;
where all words are frequent, the newest entries that have all of them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, text

BUDGET = 3000
"""Candidates that are ranked at most."""
MOST_WORDS = 16
"""Words of a query that are looked at."""
WEIGHTS = {"title": 8.0, "words": 6.0, "authors": 3.0, "organisation": 3.0, "abstract": 1.0}
"""What a word counts by where it stands (bm25)."""

_STOP = frozenset(
    re.findall(
        r"\w+",
        """
        a about all also an and any are as at be been but by can could do does each for from had has
        have how i if in into is it its just like make me more most my no not of on one or our out
        over paper papers so some such than that the their them then there these they this those to
        too up use used uses using via was we were what when where which while who why will with
        without you your
        """,
    )
)


@dataclass(frozen=True)
class Ranked:
    """An entry and how well it fits; only scores of one query compare."""

    id: int
    score: float


def words_of(line: str) -> list[str]:
    """The words of a line that tell something, once each, in small letters."""
    found = dict.fromkeys(re.findall(r"[^\W_]+", line.casefold()))
    telling = [word for word in found if word not in _STOP]
    return (telling or list(found))[:MOST_WORDS]


def find(connection: Connection, line: str, limit: int) -> list[Ranked]:
    """Entries for what a person typed, best first."""
    return _ranked(connection, words_of(line), limit)


def similar(connection: Connection, entry_id: int, line: str, limit: int) -> list[Ranked]:
    """Entries whose text is like this one's, without itself.

    Args:
        connection: to the database.
        entry_id: to leave out.
        line: title and abstract.
        limit: entries at most.
    """
    repeated = Counter(re.findall(r"[^\W_]+", line.casefold()))
    counts = {
        word: _count(connection, word)
        for word, _ in repeated.most_common(60)
        if word not in _STOP and len(word) > 2
    }
    total = max(2, _total(connection))
    # A word that only this entry has finds nothing else.
    weights = {
        word: repeated[word] * math.log(total / count)
        for word, count in counts.items()
        if 1 < count < BUDGET
    }
    telling = sorted(weights, key=lambda word: -weights[word])[:MOST_WORDS]
    found = _ranked(connection, telling, limit + 1, counts)
    return [each for each in found if each.id != entry_id][:limit]


def having(connection: Connection, word: str, low: int) -> set[int]:
    """Ids of all entries, from `low` on, that have a word in one of its forms."""
    if connection.dialect.name == "sqlite":
        line = "SELECT rowid AS id FROM entries_fts WHERE entries_fts MATCH :word AND rowid >= :low"
        given = _quoted(word)
    else:
        line = f"SELECT id FROM entries WHERE document @@ {_query('word')} AND id >= :low"
        given = _lexeme(word)
    return {row.id for row in connection.execute(text(line), {"word": given, "low": low})}


def _ranked(
    connection: Connection, words: Iterable[str], limit: int, known: dict[str, int] | None = None
) -> list[Ranked]:
    counts: dict[str, int] = {}
    for word in words:
        count = known[word] if known else _count(connection, word)
        if count == 0 and len(word) > 2:
            # Nobody has this word: what begins with it, as while somebody is typing.
            word, count = f"{word}*", _count(connection, f"{word}*")
        if count:
            counts[word] = count
    if not counts:
        return []
    rare: list[str] = []
    left = BUDGET
    for word in sorted(counts, key=counts.__getitem__):
        left -= counts[word]
        if left < 0:
            break
        rare.append(word)
    if connection.dialect.name == "sqlite":
        return _fts5(connection, counts, rare, limit)
    return _tsvector(connection, counts, rare, limit)


def _count(connection: Connection, word: str) -> int:
    """Entries that have the word, counted up to one more than the budget."""
    if connection.dialect.name == "sqlite":
        inner = "SELECT 1 FROM entries_fts WHERE entries_fts MATCH :word LIMIT :most"
        given = _quoted(word)
    else:
        inner = f"SELECT 1 FROM entries WHERE document @@ {_query('word')} LIMIT :most"
        given = _lexeme(word)
    statement = text(f"SELECT count(*) FROM ({inner}) AS found")
    return int(connection.execute(statement, {"word": given, "most": BUDGET + 1}).scalar_one())


def _total(connection: Connection) -> int:
    return int(connection.execute(text("SELECT coalesce(max(id), 0) FROM entries")).scalar_one())


def _quoted(word: str) -> str:
    """A word as FTS5 takes it; a star behind it asks for what begins so."""
    return f'"{word.removesuffix("*")}"' + ("*" if word.endswith("*") else "")


def _fts5(
    connection: Connection, counts: dict[str, int], rare: Sequence[str], limit: int
) -> list[Ranked]:
    every = [_quoted(word) for word in counts]
    score = f"bm25(entries_fts, {', '.join(map(str, WEIGHTS.values()))})"
    if rare:
        match = " OR ".join(_quoted(word) for word in rare)
        if len(rare) < len(every):  # the frequent words find nothing more, but they count
            match = f"({match}) AND ({' OR '.join(every)})"
        inner = f"SELECT rowid AS id, {score} AS score FROM entries_fts WHERE entries_fts MATCH :q"
    else:
        match = " AND ".join(every)
        inner = (
            f"SELECT rowid AS id, {score} AS score FROM entries_fts WHERE entries_fts MATCH :q "
            "ORDER BY rowid DESC LIMIT :budget"
        )
    statement = text(f"SELECT id, score FROM ({inner}) ORDER BY score, id DESC LIMIT :limit")
    rows = connection.execute(statement, {"q": match, "limit": limit, "budget": BUDGET})
    return [Ranked(row.id, -row.score) for row in rows]


def _lexeme(word: str) -> str:
    """A word as to_tsquery takes it; it holds nothing but letters and digits."""
    return f"{word.removesuffix('*')}:*" if word.endswith("*") else word


def _query(name: str) -> str:
    """Titles and abstracts are indexed by stem, names of people as they are."""
    return f"(to_tsquery('english', :{name}) || to_tsquery('simple', :{name}))"


def _tsvector(
    connection: Connection, counts: dict[str, int], rare: Sequence[str], limit: int
) -> list[Ranked]:
    total = max(2, _total(connection))
    given: dict[str, object] = {"limit": limit, "budget": BUDGET}
    parts, name_of = [], {}
    for number, (word, count) in enumerate(counts.items()):
        name_of[word] = f"w{number}"
        given[f"w{number}"] = _lexeme(word)
        weight = math.log(1 + total / count)
        # Weights of D, C, B, A; the rank is divided by 1 + log of the length.
        rank = f"ts_rank('{{0.4,0.4,0.7,1.0}}', document, {_query(f'w{number}')}, 1)"
        parts.append(f"{weight:.4f} * {rank}")
    joint, chosen = (" || ", rare) if rare else (" && ", list(counts))
    match = joint.join(_query(name_of[word]) for word in chosen)
    statement = text(
        f"SELECT id, {' + '.join(parts)} AS score FROM (SELECT id, document FROM entries "
        f"WHERE document @@ ({match}) ORDER BY id DESC LIMIT :budget) AS candidates "
        "ORDER BY score DESC, id DESC LIMIT :limit"
    )
    return [Ranked(row.id, float(row.score)) for row in connection.execute(statement, given)]
