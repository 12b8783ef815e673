"""The commands `transom gallery build` and `transom gallery serve`."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Annotated

import typer

from transom.errors import GalleryError
from transom.terminal import console, errors

PASSWORD = "TRANSOM_GALLERY_PASSWORD"

app = typer.Typer(
    help="The feed of papers as a site: with what works here, how well, and on which models.",
    no_args_is_help=True,
)


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
    with Progress(console=errors(), transient=True, disable=not errors().is_terminal) as bar:
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
    console().print(f"site: {page}", highlight=False, soft_wrap=True)


@app.command()
def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen on; one that others reach wants a password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8080,
    password_file: Annotated[
        Path | None,
        typer.Option(help=f"File with the password; else {PASSWORD} in the environment."),
    ] = None,
    base_url: Annotated[
        str, typer.Option(help="Under which readers reach the server, for feeds and mails.")
    ] = "",
    drawings: Annotated[
        Path | None, typer.Option(help="Folder for drawings; one in the user's cache by default.")
    ] = None,
    draw: Annotated[bool, typer.Option(help="Draw what is missing there, in the background.")] = (
        True
    ),
    seconds: Annotated[float, typer.Option(min=1, help="Time limit of a job.")] = 180.0,
    memory: Annotated[float, typer.Option(min=0.25, help="Memory limit of a job, GiB.")] = 6.0,
) -> None:
    """Serve the gallery: the same pages, search, and methods on a picture of yours."""
    from platformdirs import user_cache_path

    from transom import __version__
    from transom.gallery.drawings import draw_missing
    from transom.gallery.security import check_binding

    password = _password(password_file)
    check_binding(host, password)
    try:
        import uvicorn

        from transom.gallery.server import create_app
    except ImportError as error:
        raise GalleryError(
            f"the server needs the package {error.name}: pip install 'transom[gallery]'"
        ) from error
    from transom.gallery.store import open_store
    from transom.gallery.subscriptions import load_secret

    folder = drawings or user_cache_path("transom", appauthor=False) / "gallery" / __version__
    address = base_url or f"http://{f'[{host}]' if ':' in host else host}:{port}"
    artist = multiprocessing.get_context("spawn").Process(
        target=draw_missing, args=(folder,), daemon=True
    )
    with open_store() as store:
        served = create_app(
            store,
            host=host,
            password=password,
            secret=load_secret(),
            drawings=folder,
            base_url=address,
            time_limit=seconds,
            memory_limit=int(memory * 2**30),
        )
        if draw:
            artist.start()
        console().print(f"gallery: {address} (stop with Ctrl+C)", highlight=False, soft_wrap=True)
        try:
            # a stream that waits for a job must not hold up the end
            uvicorn.run(
                served, host=host, port=port, log_level="warning", timeout_graceful_shutdown=2
            )
        finally:
            if artist.is_alive():
                artist.terminate()


def _password(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(PASSWORD)
    try:
        found = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise GalleryError(f"the password cannot be read from {str(file)!r}: {error}") from error
    if not found:
        raise GalleryError(f"{str(file)!r} is empty; expected the password")
    return found
