"""The gallery as a server: the same pages, search in the store, and methods on a visitor's picture.

    app = create_app(open_store(), host="127.0.0.1")

Everything that changes something asks for the token of a form of ours; every answer forbids inline
scripts; what strangers send is limited before it is looked at. See `security`, `uploads`, `jobs`.
"""

from __future__ import annotations

import contextlib
import secrets
import tempfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from transom.cards import load_cards
from transom.errors import GalleryError, StoreError
from transom.gallery import pages, trial
from transom.gallery.answers import Drawings, invalid, missing, refused, unusable
from transom.gallery.entering import entering_routes
from transom.gallery.jobs import Jobs
from transom.gallery.mailing import mailing_routes
from transom.gallery.reading import reading_routes
from transom.gallery.security import Guard, Sessions, check_binding, csrf, is_loopback
from transom.gallery.store import Store
from transom.gallery.trying import trying_routes

LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


def create_app(
    store: Store,
    *,
    host: str = "127.0.0.1",
    password: str | None = None,
    secret: str | None = None,
    drawings: Path | None = None,
    jobs: Jobs | None = None,
    base_url: str = "",
    time_limit: float = 180.0,
    memory_limit: int = 6 * 2**30,
) -> FastAPI:
    """The application.

    Args:
        store: of imported entries; stays the caller's.
        host: it will be bound to; anything but loopback wants a password.
        password: that visitors have to give; None for none.
        secret: that signs cookies, forms and the links in mails; a new one by default, with which
            everybody is logged out at the next start.
        drawings: folder of drawn mechanisms, as `draw_all` made it; pages go without by default.
        jobs: to run; by default they are made here, and ended with the application.
        base_url: under which readers reach the server, for the feed and for mails.
        time_limit, memory_limit: of a job, in seconds and bytes.

    Raises:
        GalleryError: the binding is refused.
    """
    check_binding(host, password)
    secret = secret or secrets.token_urlsafe(32)
    sessions = Sessions(secret, password)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with tempfile.TemporaryDirectory(prefix="transom-gallery-") as folder:
            own = jobs is None
            closing = threading.Event()
            warming = threading.Thread(target=warm, args=(closing,), name="gallery-warm")
            warming.start()
            app.state.jobs = jobs or Jobs(
                Path(folder), time_limit=time_limit, memory_limit=memory_limit
            )
            try:
                yield
            finally:
                closing.set()
                warming.join()
                if own:
                    app.state.jobs.close()

    app = FastAPI(
        title="transom gallery",
        description="Papers on attention and tokens, and what of them runs.",
        lifespan=lifespan,
        dependencies=[Depends(csrf)],
        docs_url=None,
        redoc_url=None,
    )
    app.state.sessions = sessions
    app.state.store = store
    app.state.pictures = Drawings(drawings)
    app.state.base_url = base_url or f"http://{host}"
    app.include_router(entering_routes())
    app.include_router(reading_routes())
    app.include_router(trying_routes())
    app.include_router(mailing_routes(store, secret, app.state.base_url))
    app.mount("/static", StaticFiles(packages=[("transom.gallery", "static")]), name="static")
    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(GalleryError, unusable)
    app.add_exception_handler(StoreError, missing)
    names = LOCAL | {host} if is_loopback(host) else None
    app.add_middleware(Guard, sessions=sessions, hosts=names)
    return app


def warm(closing: threading.Event) -> None:
    """Look at every room once, so that the first visitor does not wait for it."""
    for slug in load_cards():
        if closing.is_set():
            return
        pages.paper(slug)
    trial.methods()
