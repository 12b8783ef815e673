"""What stands between the server and whoever sends it something.

Pure ASGI, so that nothing here waits for a body or holds back an answer that streams.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import time
from collections import deque
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from fastapi import HTTPException, Request
from itsdangerous import BadSignature, URLSafeSerializer
from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from transom.errors import GalleryError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
COOKIE = "transom_session"
OPEN = ("/login", "/static/", "/health", "/confirm/", "/unsubscribe/")
UNSAFE = ("POST", "PUT", "PATCH", "DELETE")
SIGNED = ("/unsubscribe/",)  # a signed token in the address stands for the form's
MAX_BODY = 12 * 2**20
_TRIES, _WITHIN = 5, 60.0  # wrong passwords, in seconds


def is_loopback(host: str) -> bool:
    """Whether an address reaches this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_binding(host: str, password: str | None) -> None:
    """Refuse to be seen by others without a password.

    Raises:
        GalleryError: `host` is no loopback address and there is no password, or a weak one.
    """
    if is_loopback(host):
        return
    if not password:
        raise GalleryError(
            f"--host {host} lets other machines in, and whoever comes may run jobs here; set a "
            "password in the environment variable TRANSOM_GALLERY_PASSWORD or in a file named by "
            "--password-file, or leave --host out"
        )
    if len(password) < 8:
        raise GalleryError("the password has fewer than 8 characters; others can reach this server")


class Sessions:
    """Signed cookies, and tokens for forms that belong to them.

    Args:
        secret: signs; whoever has it can forge.
        password: that lets somebody in; None lets everybody in.
    """

    def __init__(self, secret: str, password: str | None = None) -> None:
        self.password = password
        self._signer = URLSafeSerializer(secret, salt="session")
        self._key = hashlib.sha256(b"csrf" + secret.encode()).digest()
        self._wrong: deque[float] = deque(maxlen=_TRIES)

    def read(self, cookies: dict[str, str]) -> dict[str, Any]:
        """What the cookie says; {} for none or a forged one."""
        try:
            found = self._signer.loads(cookies.get(COOKIE, ""))
        except BadSignature:
            return {}
        return found if isinstance(found, dict) and isinstance(found.get("id"), str) else {}

    def ensure(self, request: Request) -> dict[str, Any]:
        """The session of a request, a new one if it has none."""
        session: dict[str, Any] = getattr(request.state, "session", None) or self.read(
            request.cookies
        )
        if not session:
            session = {"id": secrets.token_urlsafe(16), "in": False}
        request.state.session = session
        return session

    def token(self, session: dict[str, Any]) -> str:
        """What a form of this session has to send back."""
        return hmac.new(self._key, str(session["id"]).encode(), "sha256").hexdigest()

    def keep(self, response: Response, session: dict[str, Any], secure: bool) -> None:
        """Send the session along with an answer."""
        response.set_cookie(
            COOKIE,
            str(self._signer.dumps(session)),
            httponly=True,
            samesite="lax",
            secure=secure,
            max_age=14 * 86400,
        )

    def admits(self, session: dict[str, Any]) -> bool:
        """Whether this session may see anything."""
        return self.password is None or session.get("in") is True

    def enter(self, password: str) -> dict[str, Any] | None:
        """A session for somebody who gives the password; None for a wrong one.

        Raises:
            HTTPException: 429 after too many wrong ones.
        """
        now = time.monotonic()
        if len(self._wrong) == _TRIES and now - self._wrong[0] < _WITHIN:
            raise HTTPException(429, "too many wrong passwords; wait a minute")
        if self.password is None or not hmac.compare_digest(
            password.encode(), self.password.encode()
        ):
            self._wrong.append(now)
            return None
        return {"id": secrets.token_urlsafe(16), "in": True}


async def csrf(request: Request) -> None:
    """Dependency of the whole application: whoever changes something comes from a form of ours."""
    if request.method not in UNSAFE or request.url.path.startswith(SIGNED):
        return
    if request.headers.get("sec-fetch-site") == "cross-site":
        raise HTTPException(403, "this request comes from another site")
    origin = request.headers.get("origin")
    if origin and origin != "null" and _place(origin) != request.headers.get("host"):
        raise HTTPException(403, "this request comes from another site")
    sessions: Sessions = request.app.state.sessions
    session = sessions.read(request.cookies)
    given = request.headers.get("x-csrf-token", "")
    if not given and "form" in request.headers.get("content-type", ""):
        sent = (await request.form()).get("csrf")
        given = sent if isinstance(sent, str) else ""
    if not session or not hmac.compare_digest(given.encode(), sessions.token(session).encode()):
        raise HTTPException(403, "the form is out of date; load the page again and repeat")


class Guard:
    """Middleware: known host names, size of bodies, password, headers of every answer.

    Args:
        app: inside.
        sessions: who is in.
        hosts: names by which the server may be called; None for any. A page of another site that
            gives its own name this machine's address is refused by it.
    """

    def __init__(
        self, app: ASGIApp, sessions: Sessions, hosts: frozenset[str] | None = None
    ) -> None:
        self.app, self.sessions, self.hosts = app, sessions, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)

        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(request)
        if refusal is not None:
            await refusal(scope, receive, headed)
            return
        await self.app(scope, _limited(receive), headed)

    def _refusal(self, request: Request) -> Response | None:
        name = _name(request.headers.get("host", ""))
        if self.hosts is not None and name not in self.hosts:
            return PlainTextResponse("this server is not called by that name", 421)
        length = request.headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit() and len(length) < 19):
            return PlainTextResponse("the length of the request is no number", 400)
        if int(length) > MAX_BODY:
            return PlainTextResponse(f"at most {MAX_BODY // 2**20} MiB are taken", 413)
        path = request.url.path
        if path.startswith(OPEN) or self.sessions.admits(self.sessions.read(request.cookies)):
            return None
        if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
            return RedirectResponse(f"/login?next={quote(path)}", 303)
        return PlainTextResponse("log in first", 401)


def _limited(receive: Receive) -> Receive:
    """Count what really comes: a length that was not told counts as well."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > MAX_BODY:
            raise HTTPException(413, f"at most {MAX_BODY // 2**20} MiB are taken")
        return message

    return counted


def local_path(address: str) -> str:
    """An address to go on to, if it stays on this server; else the start."""
    safe = address.startswith("/") and not address.startswith(("//", "/\\"))
    return address if safe and address.isprintable() else "/"


def _place(address: str) -> str | None:
    """Name and port of an address; None for one that is none."""
    try:
        return urlsplit(address).netloc
    except ValueError:
        return None


def _name(host: str) -> str | None:
    """The name in a `Host` header; None for one that is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
