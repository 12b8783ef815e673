"""Where the commands print.

A console is made at each use, so that it is as wide as the terminal is then. Where the output goes
to a file or a pipe, nothing is broken to fit 80 columns; COLUMNS counts there too.
"""

from __future__ import annotations

import os

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
    width = found.width
    if not found.is_terminal and "COLUMNS" not in os.environ:
        width = UNBROKEN
    return (
        found
        if at_least <= width == found.width
        else Console(stderr=stderr, width=max(width, at_least))
    )
