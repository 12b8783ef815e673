"""Answers to visitors: pages with the token for their forms, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from transom.gallery.drawings import Picture, read_captions
from transom.gallery.rendering import ServedUrls, render
from transom.gallery.security import Sessions


class Drawings:
    """Drawn mechanisms in a folder; what is drawn while the server runs is found as well.

    Args:
        folder: with `SLUG-NUMBER.webp` and the captions in `SLUG.json`.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def of(self, slug: str) -> list[Picture]:
        """The pictures of one paper."""
        return read_captions(self.folder, slug) if self.folder is not None else []

    def file(self, name: str) -> Path | None:
        """A picture by name, if it is one of this folder."""
        if self.folder is None or "/" in name or "\\" in name or name.startswith("."):
            return None
        path = self.folder / name
        return path if path.suffix == ".webp" and path.is_file() else None


def page(request: Request, template: str, status: int = 200, **given: Any) -> HTMLResponse:
    """A page for this visitor, with the token for its forms."""
    sessions: Sessions = request.app.state.sessions
    known = bool(sessions.read(request.cookies))
    session = sessions.ensure(request)
    text = render(
        template,
        ServedUrls(),
        csrf=sessions.token(session),
        user=sessions.password is not None and sessions.admits(session),
        **given,
    )
    answer = HTMLResponse(text, status, headers={"cache-control": "no-cache"})
    if not known:
        sessions.keep(answer, session, request.url.scheme == "https")
    return answer


def refusal(request: Request, status: int, says: str) -> Response:
    """An error as a page for people and as JSON for programs."""
    if "text/html" in request.headers.get("accept", "") and request.method != "HEAD":
        return page(request, "message.html.j2", status, title=_title(status), says=says)
    return JSONResponse({"detail": says}, status)


def _title(status: int) -> str:
    titles = {403: "Not from here", 404: "Nothing is here", 413: "Too large", 429: "Too often"}
    return titles.get(status, "That did not work")


async def refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = refusal(request, error.status_code, str(error.detail))
    answer.headers.update(error.headers or {})
    return answer


async def invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = " ".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
    return refusal(request, 422, f"{where}: {first['msg']}")


async def unusable(request: Request, error: Exception) -> Response:
    return refusal(request, 400, str(error))


async def missing(request: Request, error: Exception) -> Response:
    return refusal(request, 404, str(error))
