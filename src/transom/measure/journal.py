"""Finished rows on disk, one JSON object a line, so that a broken-off comparison can go on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from transom.errors import DataError
from transom.measure.row import Row

logger = logging.getLogger(__name__)


class Journal:
    """Rows by key. Without a path nothing is remembered.

    A row is on the disk when `put` returns; a line that a crash cut short is left out on reading.

    Args:
        path: Of the JSON lines file; made with the first row.

    Raises:
        DataError: If the file is there and holds something else.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        self._rows: dict[str, Row] = {}
        self._whole: int | None = None  # bytes up to a line that was cut short
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read to resume from: {error}") from error
        whole, newline, rest = content.rpartition(b"\n")
        if rest:
            logger.warning("the last line of %s was cut short; its row is measured again", path)
            self._whole = len(whole) + len(newline)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                self._rows[entry["key"]] = Row.from_dict(entry["row"])
            except (ValueError, KeyError, TypeError, AttributeError, DataError) as error:
                raise DataError(
                    f"line {number} of {path} is no finished row ({error}); resume from a file "
                    "that a comparison wrote, or name a new one"
                ) from error

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: str) -> Row | None:
        """The finished row of this key."""
        return self._rows.get(key)

    def put(self, key: str, row: Row) -> None:
        """Remember a finished row."""
        self._rows[key] = row
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, "row": row.to_dict()}, ensure_ascii=False)
        if self._whole is not None:
            os.truncate(self.path, self._whole)
            self._whole = None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


def key_of(facts: Mapping[str, Any]) -> str:
    """A digest of everything that a row depends on."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def fingerprint(model: nn.Module) -> str:
    """A digest of a model's class, its tensors' names, shapes and types, and a few values of each.

    Values are sampled, so that large models take no time; other weights give another digest.
    """
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // 16)
        digest.update(repr(flat[::step][:16].double().tolist()).encode())
    return digest.hexdigest()[:16]
