"""What several commands take: CPU threads, and methods as they are typed."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from transom.errors import SettingsError

Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]


def set_threads(count: int | None) -> None:
    """Run PyTorch on so many CPU threads; None leaves it as it is."""
    import torch

    if count is not None:
        torch.set_num_threads(count)


def parse_methods(text: str | None) -> list[str | tuple[str, dict[str, Any]]] | None:
    """Methods as typed: 'tome,pitome:ratio=0.9;margin=0.5,evit'.

    Args:
        text: slugs between commas; settings behind a colon, between semicolons.

    Returns:
        Slugs, or pairs of slug and settings; None for None.

    Raises:
        SettingsError: a setting is not of the form name=value.
    """
    if text is None:
        return None
    parsed: list[str | tuple[str, dict[str, Any]]] = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        slug, colon, rest = entry.partition(":")
        if not colon:
            parsed.append(slug)
            continue
        settings = {}
        for pair in rest.split(";"):
            name, equals, value = pair.partition("=")
            if not (name and equals):
                raise SettingsError(
                    f"{entry!r} has a setting {pair!r}; expected name=value, for example "
                    "'tome:r=8' or 'evit:keep_rate=0.7;fuse_token=true'"
                )
            settings[name.strip()] = _value(value.strip())
        parsed.append((slug, settings))
    return parsed


def _value(text: str) -> Any:
    """A number, a truth value, null, or the text itself; numbers between slashes are a tuple."""
    if "/" in text:
        return tuple(_value(part) for part in text.split("/"))
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false", "none") else text)
    except json.JSONDecodeError:
        return None if text.lower() == "none" else text
