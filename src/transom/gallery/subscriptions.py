"""Who wants which papers by mail: asked for, confirmed, ended by one click.

An address gets nothing before somebody who reads its mail has followed the link in the
confirmation. Links are signed with a secret and carry no address.
"""

from __future__ import annotations

import datetime
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from itsdangerous import BadData, SignatureExpired, URLSafeSerializer, URLSafeTimedSerializer
from sqlalchemy import Connection, func, select

from transom.cards import FAMILIES
from transom.errors import MailError
from transom.gallery.mail import check_address
from transom.gallery.schema import interests, letters, subscribers
from transom.gallery.search import words_of
from transom.gallery.store import Store

KINDS = ("all", "topic", "family", "author", "search")
MOST = 50
"""Interests of one address at most."""
VALID = datetime.timedelta(days=7)
"""How long the link of a confirmation holds."""
PAUSE = datetime.timedelta(minutes=10)
"""Between two confirmations to one address, so that nobody is flooded in another's name."""


@dataclass(frozen=True)
class Interest:
    """What somebody wants to hear of.

    Attributes:
        kind: 'topic' (all words occur), 'family' (of cards), 'author' (or organisation), 'search'
            (half of the words occur, as a search would find them), or 'all'.
        value: the words, family or name; "" for all.
    """

    kind: str
    value: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise MailError(f"an interest in {self.kind!r}; expected one of {', '.join(KINDS)}")
        if self.kind == "family" and self.value not in FAMILIES:
            raise MailError(
                f"there is no family {self.value!r}; families are {', '.join(FAMILIES)}"
            )
        if not self.value.isprintable():
            raise MailError(f"the {self.kind} {self.value!r} has characters that are no text")
        if len(self.value) > 200:
            raise MailError(f"an interest of {len(self.value)} characters; expected 200 at most")
        if self.kind in ("topic", "author", "search") and not words_of(self.value):
            raise MailError(f"the {self.kind} {self.value!r} has no word in it")

    def __str__(self) -> str:
        return "everything" if self.kind == "all" else f"{self.kind} {self.value!r}"


@dataclass(frozen=True)
class Subscriber:
    """Somebody who gets letters, and what about."""

    id: int
    address: str
    interests: tuple[Interest, ...]


@dataclass(frozen=True)
class Asked:
    """A subscription that waits for its confirmation.

    Attributes:
        subscriber_id: whose.
        address: to send the confirmation to.
        token: of the link.
    """

    subscriber_id: int
    address: str
    token: str


def load_secret(path: Path | None = None) -> str:
    """`TRANSOM_SECRET`, else the content of a file that is made on first use.

    Args:
        path: of the file; secret.key in the user's data folder by default.

    Raises:
        MailError: the secret is shorter than 16 characters or cannot be kept.
    """
    given = os.environ.get("TRANSOM_SECRET")
    if given is None:
        if path is None:
            from platformdirs import user_data_path

            path = Path(user_data_path("transom", appauthor=False)) / "secret.key"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with open(descriptor, "w", encoding="ascii") as file:
                    file.write(secrets.token_urlsafe(32))
            except FileExistsError:
                pass
            given = path.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise MailError(f"the secret of links cannot be kept in {path}: {error}") from None
    if len(given) < 16:
        raise MailError("the secret of links has fewer than 16 characters; give a longer one")
    return given


def ask(
    connection: Connection,
    secret: str,
    address: str,
    wanted: Sequence[Interest] = (),
    *,
    now: datetime.datetime | None = None,
) -> Asked | None:
    """Note what an address asks for; it counts once it is confirmed.

    Args:
        connection: a transaction of a store; the letter that asks belongs into it as well.
        secret: that signs the link.
        address: whose.
        wanted: in what; everything when empty.
        now: the present by default.

    Returns:
        What the letter needs; None, and nothing is noted, when one went out a moment ago.

    Raises:
        MailError: the address is none, or there are too many interests.
    """
    address = check_address(address)
    chosen = list(dict.fromkeys(wanted)) or [Interest("all")]
    if len(chosen) > MOST:
        raise MailError(f"{len(chosen)} interests at once; expected {MOST} at most")
    now = now or _now()
    one = subscriber_id(connection, address)
    row = connection.execute(select(subscribers).where(subscribers.c.id == one)).one()
    if row.asked is not None and now - row.asked < PAUSE:
        return None
    number = row.asks + 1
    values = {"asks": number, "asked": now}
    connection.execute(subscribers.update().where(subscribers.c.id == one).values(values))
    # What was asked for and not confirmed makes room for what is asked for now.
    mine = interests.c.subscriber_id == one
    connection.execute(interests.delete().where(mine, interests.c.confirmed.is_(None)))
    rows = [
        {"subscriber_id": one, "kind": each.kind, "value": each.value, "ask": number}
        for each in chosen
    ]
    connection.execute(interests.insert(), rows)
    token = URLSafeTimedSerializer(secret, salt="transom.confirm").dumps([one, number])
    return Asked(one, address, str(token))


def confirm(
    store: Store, secret: str, token: str, *, now: datetime.datetime | None = None
) -> Subscriber:
    """What was asked for counts from now on; doing it twice changes nothing.

    Raises:
        MailError: the link is forged, too old, or replaced by a later one.
    """
    serializer = URLSafeTimedSerializer(secret, salt="transom.confirm")
    try:
        one, number = serializer.loads(token, max_age=int(VALID.total_seconds()))
    except SignatureExpired:
        raise MailError("this link is too old; subscribe once more") from None
    except (BadData, ValueError, TypeError):
        raise MailError("this link is not one of ours; copy it whole from the mail") from None
    now = now or _now()
    with store.writes() as connection:
        asked = (interests.c.subscriber_id == one) & (interests.c.ask == number)
        found = connection.execute(select(interests).where(asked)).all()
        if not found:
            raise MailError("this link counts no more; subscribe once more")
        if all(row.confirmed is None for row in found):
            for row in found:
                # The same interest from an earlier ask would be there twice.
                same = (
                    (interests.c.subscriber_id == one)
                    & (interests.c.kind == row.kind)
                    & (interests.c.value == row.value)
                    & (interests.c.ask != number)
                )
                connection.execute(interests.delete().where(same))
            connection.execute(interests.update().where(asked).values(confirmed=now))
            connection.execute(
                subscribers.update()
                .where(subscribers.c.id == one)
                .values(confirmed=now, ended=None)
            )
    return next(each for each in confirmed(store) if each.id == one)


def unsubscribe_token(secret: str, subscriber: int) -> str:
    """What ends the letters to a subscriber; it holds for ever."""
    return str(URLSafeSerializer(secret, salt="transom.unsubscribe").dumps(subscriber))


def unsubscribe(
    store: Store, secret: str, token: str, *, now: datetime.datetime | None = None
) -> None:
    """No more letters, also none that wait; doing it twice changes nothing.

    Raises:
        MailError: the link is forged.
    """
    one = read_unsubscribe(secret, token)
    with store.writes() as connection:
        connection.execute(interests.delete().where(interests.c.subscriber_id == one))
        mine = subscribers.c.id == one
        stamp = func.coalesce(subscribers.c.ended, now or _now())
        connection.execute(subscribers.update().where(mine).values(ended=stamp, confirmed=None))
        waiting = (letters.c.subscriber_id == one) & (letters.c.state == "prepared")
        connection.execute(letters.update().where(waiting).values(state="dropped"))


def read_unsubscribe(secret: str, token: str) -> int:
    """Whose letters the token ends.

    Raises:
        MailError: it is forged.
    """
    try:
        one = URLSafeSerializer(secret, salt="transom.unsubscribe").loads(token)
    except BadData:
        raise MailError("this link is not one of ours; copy it whole from the mail") from None
    return int(one)


def confirmed(store: Store) -> list[Subscriber]:
    """Everybody who gets letters."""
    with store.reads() as connection:
        rows = connection.execute(
            select(subscribers.c.id, subscribers.c.address, interests.c.kind, interests.c.value)
            .join(interests, interests.c.subscriber_id == subscribers.c.id)
            .where(
                subscribers.c.confirmed.is_not(None),
                subscribers.c.ended.is_(None),
                interests.c.confirmed.is_not(None),
            )
            .order_by(subscribers.c.id, interests.c.id)
        ).all()
    found: dict[int, Subscriber] = {}
    for row in rows:
        before = found[row.id].interests if row.id in found else ()
        interest = Interest(row.kind, row.value)
        found[row.id] = Subscriber(row.id, row.address, (*before, interest))
    return list(found.values())


def subscriber_id(connection: Connection, address: str) -> int:
    """The row of an address, made where it is not there yet; gets no letters by itself."""
    key = address.casefold()
    wanted = select(subscribers.c.id).where(subscribers.c.address_key == key)
    found = connection.execute(wanted).scalar_one_or_none()
    if found is not None:
        return int(found)
    values = {"address": address, "address_key": key, "asks": 0}
    made = connection.execute(subscribers.insert().values(values).returning(subscribers.c.id))
    return int(made.scalar_one())


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)
