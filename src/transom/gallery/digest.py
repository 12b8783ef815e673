"""The digest: what is new, and what has newly begun to run here, for each subscriber."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select

from transom.cards import Card, load_cards
from transom.errors import MailError
from transom.gallery.atom import link
from transom.gallery.feed import Entry, title_key
from transom.gallery.letters import put, render, unsubscribe_link
from transom.gallery.mail import MailSettings, check_address, message
from transom.gallery.schema import letter_entries, letter_rooms, subscribers
from transom.gallery.search import having, words_of
from transom.gallery.store import Store, Stored
from transom.gallery.subscriptions import Interest, Subscriber, confirmed, subscriber_id

MOST = 100
"""Entries of one letter; what is left comes with the next."""
_SHOWN = 400  # characters of an abstract
_UNITS = {"h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True)
class Digest:
    """What one subscriber is to read.

    Attributes:
        subscriber: who.
        entries: new ones, newest first.
        rooms: cards of papers that have begun to run here.
    """

    subscriber: Subscriber
    entries: tuple[Stored, ...]
    rooms: tuple[Card, ...]


def moment(text: str, now: datetime.datetime) -> datetime.datetime:
    """'7d', '36h', '2w' before now, or a day such as '2025-11-01'.

    Raises:
        MailError: it is none of these, or lies in the future.
    """
    span = re.fullmatch(r"(\d{1,5})([hdw])", text.strip())
    try:
        if span:
            return now - datetime.timedelta(**{_UNITS[span[2]]: int(span[1])})
        day = datetime.date.fromisoformat(text.strip())
    except (ValueError, OverflowError):
        raise MailError(f"--since is {text!r}; expected 7d, 36h, 2w or 2025-11-01") from None
    since = datetime.datetime.combine(day, datetime.time(), datetime.timezone.utc)
    if since > now:
        raise MailError(f"--since is {text!r}, which is yet to come")
    return since


class _New:
    """What was first seen since a moment, and which of it an interest is about."""

    def __init__(self, store: Store, since: datetime.datetime) -> None:
        self.store = store
        self.entries = store.page(since=since, limit=100_000)
        self.rooms = [load_cards()[s] for s in store.began(since) if s in load_cards()]
        self._low = min((entry.id for entry in self.entries), default=0)
        self._having: dict[str, set[int]] = {}

    def entries_for(self, interests: Sequence[Interest]) -> list[Stored]:
        """Newest first."""
        return [e for e in self.entries if any(self._entry(each, e) for each in interests)]

    def rooms_for(self, interests: Sequence[Interest]) -> list[Card]:
        """By slug."""
        return [card for card in self.rooms if any(_card(each, card) for each in interests)]

    def _entry(self, interest: Interest, entry: Stored) -> bool:
        if interest.kind == "all":
            return True
        if interest.kind == "family":
            card = load_cards().get(entry.slug or "")
            return card is not None and card.family == interest.value
        if interest.kind == "author":
            return _is_by(interest.value, entry)
        words = words_of(interest.value)
        found = sum(entry.id in self._ids(word) for word in words)
        return found >= _enough(interest, len(words))

    def _ids(self, word: str) -> set[int]:
        if word not in self._having:
            with self.store.reads() as connection:
                self._having[word] = having(connection, word, self._low)
        return self._having[word]


def _enough(interest: Interest, words: int) -> int:
    """A topic is all of its words; a saved search finds what has half of them."""
    return words if interest.kind == "topic" else (words + 1) // 2


def _card(interest: Interest, card: Card) -> bool:
    if interest.kind == "all":
        return True
    if interest.kind == "family":
        return card.family == interest.value
    if interest.kind == "author":
        return False
    text = " ".join([card.title, card.slug, card.family, *card.names, *card.keywords])
    there = re.findall(r"[^\W_]+", text.casefold())
    words = words_of(interest.value)
    found = sum(any(other.startswith(word) for other in there) for word in words)
    return found >= _enough(interest, len(words))


def _is_by(name: str, entry: Entry) -> bool:
    """Whether all parts of a name are parts of one author's or the organisation's."""
    parts = {title_key(part) for part in name.split()}
    names: Iterable[str] = (*entry.authors, entry.organisation or "")
    return any(parts <= {title_key(part) for part in each.split()} for each in names)


def digests(
    store: Store,
    since: datetime.datetime,
    *,
    topic: str | None = None,
    to: str | None = None,
) -> list[Digest]:
    """What everybody would be sent now; without what they have been sent.

    Args:
        store: with entries, rooms and subscribers.
        since: from when on something is new.
        topic: only entries and papers with all of these words.
        to: only for this address, which need not have subscribed.

    Raises:
        MailError: `to` is no address, or has unsubscribed.
    """
    new = _New(store, since)
    only = (Interest("topic", topic),) if topic is not None else None
    found = []
    for subscriber in [_directly(store, to)] if to is not None else confirmed(store):
        entries = new.entries_for(subscriber.interests)
        rooms = new.rooms_for(subscriber.interests)
        if only is not None:
            kept = {entry.id for entry in new.entries_for(only)}
            entries = [entry for entry in entries if entry.id in kept]
            rooms = [card for card in rooms if card in new.rooms_for(only)]
        with store.reads() as connection:
            had = select(letter_entries.c.entry_id).where(
                letter_entries.c.subscriber_id == subscriber.id
            )
            ids = set(connection.execute(had).scalars())
            had = select(letter_rooms.c.slug).where(letter_rooms.c.subscriber_id == subscriber.id)
            slugs = set(connection.execute(had).scalars())
        entries = [entry for entry in entries if entry.id not in ids][:MOST]
        rooms = [card for card in rooms if card.slug not in slugs]
        if entries or rooms:
            found.append(Digest(subscriber, tuple(entries), tuple(rooms)))
    return found


def _directly(store: Store, to: str) -> Subscriber:
    """Somebody by address: with their interests if they have subscribed, else with all."""
    address = check_address(to)
    for each in confirmed(store):
        if each.address.casefold() == address.casefold():
            return each
    with store.writes() as connection:
        one = subscriber_id(connection, address)
        ended = select(subscribers.c.ended).where(subscribers.c.id == one)
        if connection.execute(ended).scalar_one() is not None:
            raise MailError(f"{address} has unsubscribed and gets no letters")
    return Subscriber(one, address, (Interest("all"),))


def compose(settings: MailSettings, secret: str, digest: Digest) -> bytes:
    """The letter of one digest."""
    unsubscribe = unsubscribe_link(settings, secret, digest.subscriber.id)
    content = {
        "entries": [_shown(entry, settings.base_url) for entry in digest.entries],
        "rooms": [
            {
                "title": card.title,
                "name": card.name,
                "link": f"{settings.base_url}/papers/{card.slug}",
            }
            for card in digest.rooms
        ],
        "interests": [str(each) for each in digest.subscriber.interests],
        "base_url": settings.base_url,
        "unsubscribe": unsubscribe,
    }
    text, html = render("digest", content)
    return message(
        settings, digest.subscriber.address, subject(digest), text, html, unsubscribe=unsubscribe
    )


def subject(digest: Digest) -> str:
    """'transom: 12 new papers, 1 newly runs here'."""
    parts = []
    if digest.entries:
        count = len(digest.entries)
        parts.append(f"{count} new paper{'s' * (count != 1)}")
    if digest.rooms:
        count = len(digest.rooms)
        parts.append(f"{count} newly run{'s' * (count == 1)} here")
    return f"transom: {', '.join(parts)}"


def _shown(entry: Stored, base_url: str) -> dict[str, object]:
    abstract = entry.abstract
    if len(abstract) > _SHOWN:
        abstract = abstract[:_SHOWN].rsplit(" ", 1)[0] + " …"
    who = ", ".join(entry.authors[:3]) + (" et al." if len(entry.authors) > 3 else "")
    if not who and entry.organisation:
        who = entry.organisation
    if not who and entry.author_count:
        who = f"{entry.author_count} author{'s' * (entry.author_count != 1)}"
    return {
        "title": entry.title,
        "link": link(entry, base_url),
        "day": entry.day.isoformat(),
        "who": who,
        "abstract": abstract,
        "slug": entry.slug,
    }


def prepare(
    store: Store, settings: MailSettings, secret: str, found: Iterable[Digest]
) -> list[int]:
    """Write the letters and note what is in them, both or neither.

    An entry that another run has put into a letter meanwhile is left out.

    Returns:
        The letters that wait from now on.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    made = []
    for digest in found:
        one = digest.subscriber.id
        with store.writes() as connection:
            mine = letter_entries.c.subscriber_id == one
            ids = set(connection.execute(select(letter_entries.c.entry_id).where(mine)).scalars())
            own = letter_rooms.c.subscriber_id == one
            slugs = set(connection.execute(select(letter_rooms.c.slug).where(own)).scalars())
            left = Digest(
                digest.subscriber,
                tuple(entry for entry in digest.entries if entry.id not in ids),
                tuple(card for card in digest.rooms if card.slug not in slugs),
            )
            if not left.entries and not left.rooms:
                continue
            letter = put(connection, one, "digest", compose(settings, secret, left), now=now)
            key = {"subscriber_id": one, "letter_id": letter}
            if left.entries:
                rows = [{**key, "entry_id": entry.id} for entry in left.entries]
                connection.execute(letter_entries.insert(), rows)
            if left.rooms:
                slug_rows = [{**key, "slug": card.slug} for card in left.rooms]
                connection.execute(letter_rooms.insert(), slug_rows)
        made.append(letter)
    return made


def write(settings: MailSettings, secret: str, found: Iterable[Digest], folder: Path) -> list[Path]:
    """The letters as .eml files; nothing is noted and nothing is sent."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for digest in found:
        path = folder / f"digest-{digest.subscriber.id}.eml"
        path.write_bytes(compose(settings, secret, digest))
        paths.append(path)
    return paths
