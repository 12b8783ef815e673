"""Letters: written once, kept in the database, handed to the mail server one by one.

A letter is `prepared` until it has been handed over, `sending` from the moment its last line is
about to be said, then `sent`. One that is still `sending` after its process is gone may have
arrived: it is not sent again by itself. `refused` is what the server will never take, `dropped`
what nobody wants any more.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from sqlalchemy import Connection as Database
from sqlalchemy import func, select

from transom.errors import MailError
from transom.gallery.mail import Connection, MailSettings, Refused, Unsure, message
from transom.gallery.schema import letters, subscribers
from transom.gallery.store import Store
from transom.gallery.subscriptions import Asked, Interest, ask, unsubscribe_token

log = logging.getLogger(__name__)

LOST = datetime.timedelta(minutes=10)
"""After which a letter that is `sending` belongs to nobody."""


@dataclass
class Delivered:
    """What became of the letters.

    Attributes:
        sent: accepted by the server in this run.
        waiting: still prepared; the next run tries again.
        refused: never taken.
        unsure: perhaps arrived, and not sent again by itself.
        errors: why, in the order they happened; the last one of each kind.
    """

    sent: int = 0
    waiting: int = 0
    refused: int = 0
    unsure: int = 0
    errors: list[str] = field(default_factory=list)


@cache
def _templates() -> jinja2.Environment:
    def escapes(name: str | None) -> bool:
        return name is None or ".html" in name

    return jinja2.Environment(
        loader=jinja2.PackageLoader("transom.gallery", "templates/mail"),
        autoescape=escapes,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(name: str, content: Mapping[str, Any]) -> tuple[str, str]:
    """A letter as text and as HTML."""
    made = [
        _templates().get_template(f"{name}.{kind}.j2").render(content) for kind in ("txt", "html")
    ]
    return made[0], made[1]


def unsubscribe_link(settings: MailSettings, secret: str, subscriber: int) -> str:
    """Where one click ends the letters to a subscriber."""
    return f"{settings.base_url}/unsubscribe/{unsubscribe_token(secret, subscriber)}"


def confirmation(settings: MailSettings, asked: Asked, wanted: tuple[Interest, ...]) -> bytes:
    """The letter that asks whether a subscription is meant."""
    text, html = render(
        "confirmation",
        {
            "confirm": f"{settings.base_url}/confirm/{asked.token}",
            "wanted": [str(each) for each in wanted] or ["everything"],
            "address": asked.address,
        },
    )
    subject = "transom: confirm your subscription"
    return message(settings, asked.address, subject, text, html)


def subscribe(
    store: Store,
    settings: MailSettings,
    secret: str,
    address: str,
    wanted: Sequence[Interest] = (),
    *,
    now: datetime.datetime | None = None,
) -> int | None:
    """Note a wish and write the letter that asks for its confirmation; `deliver` sends it.

    Returns:
        The letter; None when one to this address was written a moment ago.

    Raises:
        MailError: the address is none, or there are too many interests.
    """
    with store.writes() as database:
        asked = ask(database, secret, address, wanted, now=now)
        if asked is None:
            return None
        content = confirmation(settings, asked, tuple(wanted))
        return put(database, asked.subscriber_id, "confirmation", content, now=now or _now())


def put(
    database: Database,
    subscriber: int,
    kind: str,
    content: bytes,
    *,
    now: datetime.datetime,
) -> int:
    """Keep a letter until it has been sent; the caller's transaction decides."""
    values = {
        "subscriber_id": subscriber,
        "kind": kind,
        "state": "prepared",
        "content": content,
        "attempts": 0,
        "created": now,
        "changed": now,
    }
    made = database.execute(letters.insert().values(values).returning(letters.c.id))
    return int(made.scalar_one())


def take_out(store: Store, letter: int, folder: Path) -> Path:
    """A waiting letter as a file, for somebody who sends it by other means."""
    folder.mkdir(parents=True, exist_ok=True)
    with store.writes() as database:
        own = letters.c.id == letter
        row = database.execute(select(letters.c.kind, letters.c.content).where(own)).one()
        database.execute(letters.update().where(own).values(state="dropped"))
    path = folder / f"{row.kind}-{letter}.eml"
    path.write_bytes(row.content)
    return path


def deliver(
    store: Store,
    settings: MailSettings,
    *,
    tries: int = 5,
    pause: float = 2.0,
    sleep: Callable[[float], None] = time.sleep,
) -> Delivered:
    """Hand over all letters that wait.

    Several runs at the same time, in one process or many, never send one letter twice.

    Args:
        store: with the letters.
        settings: of the mail server.
        tries: attempts without any success before giving up for this run.
        pause: seconds before the second attempt; each further pause is twice as long.
        sleep: to wait by.

    Raises:
        MailError: the server refuses the login, the sender, or TLS. All letters go on waiting.
    """
    result = Delivered()
    errors: dict[str, None] = {}
    failures = 0
    while failures < tries and (waiting := _waiting(store)):
        if failures:
            sleep(pause * 2 ** (failures - 1))
        before = result.sent
        try:
            with Connection(settings) as connection:
                for letter in waiting:
                    result.sent += _hand_over(store, connection, letter, errors)
        except OSError as error:
            reason = f"{settings.host}:{settings.port}: {error}"
            errors[reason] = None
            log.info("the mail server failed: %s", reason)
        failures = 0 if result.sent > before else failures + 1
    with store.reads() as database:
        counted = select(letters.c.state, func.count()).group_by(letters.c.state)
        states = {row[0]: row[1] for row in database.execute(counted)}
    result.waiting = states.get("prepared", 0)
    result.refused = states.get("refused", 0)
    result.unsure = len(_unsure(store))
    result.errors = list(errors)
    return result


def _waiting(store: Store) -> list[int]:
    wanted = select(letters.c.id).where(letters.c.state == "prepared").order_by(letters.c.id)
    with store.reads() as database:
        return list(database.execute(wanted).scalars())


def _unsure(store: Store) -> list[int]:
    """Letters whose process is gone; a younger one may be on its way just now."""
    wanted = select(letters.c.id).where(
        letters.c.state == "sending",
        (letters.c.changed < _now() - LOST) | letters.c.error.is_not(None),
    )
    with store.reads() as database:
        return list(database.execute(wanted).scalars())


def _hand_over(store: Store, connection: Connection, letter: int, errors: dict[str, None]) -> bool:
    """Whether this letter was accepted now."""
    wanted = (
        select(letters.c.content, subscribers.c.address)
        .join(subscribers, subscribers.c.id == letters.c.subscriber_id)
        .where(letters.c.id == letter, letters.c.state == "prepared")
    )
    with store.reads() as database:
        row = database.execute(wanted).one_or_none()
    if row is None:
        return False  # another run was faster, or nobody wants it any more
    try:
        accepted = connection.send(
            row.address, row.content, lambda: _move(store, letter, "prepared", "sending")
        )
    except Refused as refusal:
        errors[f"{row.address}: {refusal}"] = None
        state = "refused" if refusal.code >= 500 else "prepared"
        for before in ("prepared", "sending"):
            _move(store, letter, before, state, str(refusal))
        return False
    except Unsure as doubt:
        errors[f"{row.address}: no answer after the last line: {doubt}"] = None
        _move(store, letter, "sending", "sending", f"no answer after the last line: {doubt}")
        raise OSError(str(doubt)) from doubt
    if accepted:
        _move(store, letter, "sending", "sent")
        return True
    raise OSError("another run was faster; the connection begins anew")


def _move(store: Store, letter: int, before: str, after: str, error: str | None = None) -> bool:
    """Change the state of a letter if it is what we think; says whether it was."""
    own = (letters.c.id == letter) & (letters.c.state == before)
    values: dict[str, Any] = {"state": after, "changed": _now(), "error": error}
    if after == "sending" and before == "prepared":
        values["attempts"] = letters.c.attempts + 1
    with store.writes() as database:
        return database.execute(letters.update().where(own).values(values)).rowcount == 1


def again(store: Store) -> int:
    """Let refused letters, and those that may have arrived, wait once more; says how many.

    Who got one of the latter gets it twice: under the same Message-ID, so that most mail programs
    show it once.
    """
    ids = _unsure(store)
    with store.writes() as database:
        own = (letters.c.state == "refused") | letters.c.id.in_(ids)
        return database.execute(letters.update().where(own).values(state="prepared")).rowcount


def report(delivered: Delivered) -> str:
    """One line on a run.

    Raises:
        MailError: letters wait because the server did not take them.
    """
    rest = [
        f"{count} {what}"
        for count, what in (
            (delivered.refused, "refused for good"),
            (delivered.unsure, "perhaps arrived and not sent again"),
        )
        if count
    ]
    line = ", ".join([f"{delivered.sent} sent", *rest])
    if delivered.waiting:
        why = "; ".join(delivered.errors[-3:]) or "the mail server took none"
        raise MailError(
            f"{line}; {delivered.waiting} wait and go out with the next run of "
            f"`transom papers digest`: {why}"
        )
    if rest:
        line += " (--resend sends these again)"
        if delivered.errors:
            line += f": {'; '.join(delivered.errors[-3:])}"
    return line


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)
