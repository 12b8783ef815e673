"""The commands `transom gallery build` and `transom gallery serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    help="The feed of papers as a site: with what works here, how well, and on which models.",
    no_args_is_help=True,
)
console = Console()
errors = Console(stderr=True)


@app.command()
def build(
    folder: Annotated[Path, typer.Argument(help="To write the site to; an older one is replaced.")],
    feed: Annotated[
        bool, typer.Option(help="Show what was imported (`transom papers import`) as well.")
    ] = False,
    drawings: Annotated[
        bool, typer.Option(help="Draw the mechanisms, which takes about a minute.")
    ] = True,
    limit: Annotated[int, typer.Option(min=1, help="Most imported entries.")] = 2000,
) -> None:
    """Write the gallery as a static site that needs no server and no network."""
    from rich.progress import Progress

    from transom.gallery.site import build as run

    store = None
    if feed:
        from transom.gallery.store import open_store

        store = open_store()
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("gallery", total=None)
        page = run(
            folder,
            store=store,
            limit=limit,
            drawings=drawings,
            progress=lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total
            ),
        )
    console.print(f"site: {page}", highlight=False, soft_wrap=True)
