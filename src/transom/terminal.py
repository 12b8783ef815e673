"""Where the commands print.

A console is made at each use, so that it is as wide as the terminal is then. Where the output goes
to a file or a pipe, nothing is broken to fit 80 columns; COLUMNS counts there too.
"""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console

UNBROKEN = 200
"""Columns of a file or a pipe."""


def console(at_least: int = 0) -> Console:
    """Standard output.

    Args:
        at_least: columns; a table that needs them is printed whole, and a narrower terminal wraps
            its lines.
    """
    return _console(at_least, stderr=False)


def errors() -> Console:
    """Standard error: progress and errors."""
    return _console(0, stderr=True)


def _console(at_least: int, *, stderr: bool) -> Console:
    found = Console(stderr=stderr)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        at_least = max(at_least, UNBROKEN)
    return found if found.width >= at_least else Console(stderr=stderr, width=at_least)


class Progress:
    """A bar on a terminal, a line for each finished row elsewhere."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=errors(),
            transient=True,
            disable=not errors().is_terminal,
        )
        self.task = self.bar.add_task("plain", total=None)

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def steps(self, done: int, total: int) -> None:
        self.bar.update(self.task, completed=done, total=total, description="training")

    def __call__(self, row: Any, done: int, total: int) -> None:
        name = f"{row.method} {row.label}"
        self.bar.update(self.task, completed=done, total=total, description=name)
        if not errors().is_terminal:
            errors().print(f"{done}/{total} {name}", highlight=False)
