"""Routes of the door: log in, log out, and whether anybody is home."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from transom.gallery.answers import page
from transom.gallery.security import COOKIE, Sessions, local_path


def entering_routes() -> APIRouter:
    """The routes; `app.state.sessions` knows the password."""
    routes = APIRouter()
    routes.add_api_route("/login", _form, methods=["GET"], response_class=HTMLResponse)
    routes.add_api_route("/login", _enter, methods=["POST"], response_class=HTMLResponse)
    routes.add_api_route("/logout", _leave, methods=["POST"], response_class=HTMLResponse)
    routes.add_api_route("/health", _health, methods=["GET"])
    return routes


def _form(request: Request, next: str = "/") -> Response:
    """The form that asks for the password; without one there is nothing to ask for."""
    sessions: Sessions = request.app.state.sessions
    if sessions.admits(sessions.read(request.cookies)):
        return RedirectResponse(local_path(next), 303)
    return page(request, "login.html.j2", next=local_path(next), wrong=False)


def _enter(
    request: Request,
    password: Annotated[str, Form(max_length=500)] = "",
    next: Annotated[str, Form(max_length=500)] = "/",
) -> Response:
    sessions: Sessions = request.app.state.sessions
    session = sessions.enter(password)
    if session is None:
        return page(request, "login.html.j2", 401, next=local_path(next), wrong=True)
    answer = RedirectResponse(local_path(next), 303)
    sessions.keep(answer, session, request.url.scheme == "https")
    return answer


def _leave(request: Request) -> Response:
    answer = RedirectResponse("/", 303)
    answer.delete_cookie(COOKIE)
    return answer


def _health() -> Response:
    return JSONResponse({"status": "ok"})
