"""Routes for subscriptions: a form, and the pages behind the links in letters.

    GET, POST /subscribe              who, and what about; a letter asks for confirmation
    GET, POST /confirm/TOKEN          the letter's link; the page's button confirms
    GET, POST /unsubscribe/TOKEN      a page with a button, and the one click of RFC 8058

Nothing happens by a GET, since mail programs follow links to look at them. What /subscribe answers
does not tell whether an address is known.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Form, Request
from fastapi.responses import HTMLResponse, Response

from transom.cards import FAMILIES
from transom.errors import MailError
from transom.gallery import letters, subscriptions
from transom.gallery.answers import page, refusal
from transom.gallery.mail import MailSettings, check_address, load_settings
from transom.gallery.store import Store
from transom.gallery.subscriptions import Interest

log = logging.getLogger(__name__)

Line = Annotated[str, Form(max_length=1000)]


def mailing_routes(store: Store, secret: str, base_url: str) -> APIRouter:
    """The routes; the application guards what changes something with its own form tokens.

    Args:
        store: with the subscribers.
        secret: that signs links, the same as that of `transom papers digest`.
        base_url: for links, where the mail settings name none.
    """
    mailing = _Mailing(store, secret, base_url)
    routes = APIRouter(default_response_class=HTMLResponse)
    for path, get, post in (
        ("/subscribe", mailing.form, mailing.subscribe),
        ("/confirm/{token}", mailing.confirming, mailing.confirm),
        ("/unsubscribe/{token}", mailing.unsubscribing, mailing.unsubscribe),
    ):
        routes.add_api_route(path, get, methods=["GET"])
        routes.add_api_route(path, post, methods=["POST"])
    return routes


@dataclasses.dataclass(frozen=True)
class _Mailing:
    store: Store
    secret: str
    base_url: str

    def form(self, request: Request) -> Response:
        """The form; what is asked for by a link, such as ?search=..., stands in it."""
        given = {name: request.query_params.get(name, "")[:200] for name in ("search", "topic")}
        return page(request, "subscribe.html.j2", families=FAMILIES, given=given)

    def subscribe(
        self,
        request: Request,
        background: BackgroundTasks,
        address: Annotated[str, Form(max_length=254)] = "",
        topics: Line = "",
        authors: Line = "",
        searches: Line = "",
        families: Annotated[list[str] | None, Form(max_length=50)] = None,
    ) -> Response:
        """Note the wish, and let the letter go out after this answer."""
        try:
            wanted = [Interest("family", each) for each in families or []]
            for kind, text in (("topic", topics), ("author", authors), ("search", searches)):
                wanted += [Interest(kind, part.strip()) for part in text.split(",") if part.strip()]
            checked = check_address(address)
        except MailError as error:
            return refusal(request, 400, str(error))
        try:
            settings = load_settings(base_url=self.base_url)
        except MailError as error:
            log.warning("no subscriptions: %s", error)
            return refusal(request, 404, "this gallery is not set up to send mail")
        try:
            letter = letters.subscribe(self.store, settings, self.secret, checked, wanted)
        except MailError as error:
            return refusal(request, 400, str(error))
        if letter is not None:
            background.add_task(_deliver, self.store, settings)
        return page(
            request,
            "message.html.j2",
            202,
            title="Look into your mail",
            says="A letter with a link is on its way. Papers come once you have followed it.",
        )

    def confirming(self, request: Request, token: str) -> Response:
        """The page with the button; a token that is none is told at the button."""
        return page(
            request,
            "button.html.j2",
            title="Confirm the subscription",
            says="One more click, and new papers come by mail.",
            action=f"/confirm/{token}",
            button="Confirm",
        )

    def confirm(self, request: Request, token: str) -> Response:
        """The subscription counts."""
        try:
            found = subscriptions.confirm(self.store, self.secret, token)
        except MailError as error:
            return refusal(request, 400, str(error))
        what = ", ".join(str(each) for each in found.interests)
        return page(
            request, "message.html.j2", title="Papers will come", says=f"You asked for: {what}."
        )

    def unsubscribing(self, request: Request, token: str) -> Response:
        """The page with the button."""
        try:
            subscriptions.read_unsubscribe(self.secret, token)
        except MailError as error:
            return refusal(request, 400, str(error))
        return page(
            request,
            "button.html.j2",
            title="No more letters?",
            says="One click, and no more papers come by mail.",
            action=f"/unsubscribe/{token}",
            button="Unsubscribe",
        )

    def unsubscribe(self, request: Request, token: str) -> Response:
        """No more letters; the signed token is all a mail program has to send."""
        try:
            subscriptions.unsubscribe(self.store, self.secret, token)
        except MailError as error:
            return refusal(request, 400, str(error))
        return page(
            request, "message.html.j2", title="No more letters", says="You are unsubscribed."
        )


def _deliver(store: Store, settings: MailSettings) -> None:
    """Send what waits; what the server does not take goes out with the next digest."""
    try:
        line = letters.report(letters.deliver(store, settings, tries=2))
        log.info("mail: %s", line)
    except MailError as error:
        log.warning("mail: %s", error)
