"""Digests through a real mail server on loopback: the right ones, to everybody, exactly once."""

from __future__ import annotations

import datetime
import os
import re
import signal
import threading
import time

import pytest

pytest.importorskip("sqlalchemy", reason="the extra 'gallery' is not installed")
pytest.importorskip("aiosmtpd", reason="aiosmtpd is not installed")

import email
import email.policy

from tests.gallery.mailbox import Mailbox, mail_server, parts, settings_for
from transom.cards import card
from transom.errors import MailError
from transom.gallery import digest as digests_module
from transom.gallery import letters, subscriptions
from transom.gallery.digest import digests, moment, prepare, write
from transom.gallery.feed import Entry
from transom.gallery.letters import deliver, report
from transom.gallery.store import open_store
from transom.gallery.subscriptions import Interest

UTC = datetime.timezone.utc
SECRET = "not a secret, only a test"
LONG_AGO = datetime.datetime(2020, 1, 1, tzinfo=UTC)


def subscribe(store, address, *wanted):
    with store.writes() as connection:
        asked = subscriptions.ask(connection, SECRET, address, wanted)
    return subscriptions.confirm(store, SECRET, asked.token)


def queue(store, settings, **options):
    return prepare(store, settings, SECRET, digests(store, LONG_AGO, **options))


def titles(found):
    return {one.subscriber.address: [e.title for e in one.entries] for one in found}


@pytest.fixture
def feed(store):
    store.add(
        [
            Entry(
                "Gizzard: Attention for Birds",
                abstract="Birds attend to grain.",
                authors=("Ada Lovelace Owl", "Ben Jay"),
                date=datetime.date(2025, 11, 3),
            ),
            Entry("Ships at Sea", abstract="Boats, no birds.", organisation="Harbour Inc"),
            Entry(card("evit").title, abstract="Tokens leave."),
        ]
    )
    return store


@pytest.fixture
def box():
    return Mailbox()


# Who gets what.


def test_everybody_gets_what_they_asked_for(feed):
    subscribe(feed, "all@example.org")
    subscribe(feed, "topic@example.org", Interest("topic", "attention bird"))
    subscribe(feed, "family@example.org", Interest("family", "tokens"))
    subscribe(feed, "author@example.org", Interest("author", "ada owl"))
    subscribe(feed, "house@example.org", Interest("author", "Harbour"))
    subscribe(feed, "search@example.org", Interest("search", "boats in stormy weather"))
    subscribe(feed, "half@example.org", Interest("search", "boats weather"))
    subscribe(feed, "two@example.org", Interest("topic", "boats"), Interest("family", "tokens"))
    subscribe(feed, "nothing@example.org", Interest("topic", "submarines"))
    found = titles(digests(feed, LONG_AGO))
    assert len(found.pop("all@example.org")) == 3
    assert {address.split("@")[0]: set(each) for address, each in found.items()} == {
        "topic": {"Gizzard: Attention for Birds"},
        "family": {card("evit").title},
        "author": {"Gizzard: Attention for Birds"},
        "house": {"Ships at Sea"},
        "half": {"Ships at Sea"},
        "two": {"Ships at Sea", card("evit").title},
    }


def test_only_what_is_new_since_then(feed):
    subscribe(feed, "ada@example.org")
    now = datetime.datetime.now(UTC)
    assert digests(feed, now + datetime.timedelta(seconds=5)) == []
    later = now + datetime.timedelta(days=3)
    feed.add([Entry("Of later")], now=later)
    assert titles(digests(feed, later)) == {"ada@example.org": ["Of later"]}


def test_a_topic_of_the_run_narrows_what_everybody_gets(feed):
    subscribe(feed, "ada@example.org")
    subscribe(feed, "ben@example.org", Interest("family", "tokens"))
    found = titles(digests(feed, LONG_AGO, topic="birds"))
    assert set(found) == {"ada@example.org"}
    assert set(found["ada@example.org"]) == {"Gizzard: Attention for Birds", "Ships at Sea"}


def test_what_begins_to_run_here_is_told_once(feed, box):
    now = datetime.datetime.now(UTC)
    feed.sync_rooms(["tome"])
    feed.sync_rooms(["tome", "evit", "moh"], now=now)
    subscribe(feed, "ada@example.org", Interest("family", "tokens"))
    subscribe(feed, "ben@example.org", Interest("topic", "head experts"))
    subscribe(feed, "cid@example.org", Interest("author", "Ada Owl"))
    found = {d.subscriber.address: [c.slug for c in d.rooms] for d in digests(feed, LONG_AGO)}
    assert found == {
        "ada@example.org": ["evit"],
        "ben@example.org": ["moh"],
        "cid@example.org": [],
    }
    with mail_server(box) as settings:
        queue(feed, settings)
        deliver(feed, settings)
        assert queue(feed, settings) == []
    message = dict(box.letters)["ada@example.org"]
    assert message["Subject"] == "transom: 1 new paper, 1 newly runs here"
    assert "NEWLY RUNNING HERE" in parts(message)[0]
    assert "https://gallery.example/papers/evit" in parts(message)[0]


def test_to_one_address_without_a_subscription(feed, box):
    subscribe(feed, "ada@example.org")
    with mail_server(box) as settings:
        queue(feed, settings, to="Ben@Example.ORG")
        deliver(feed, settings)
        assert queue(feed, settings, to="ben@example.org") == []
    assert box.recipients == {"Ben@example.org": 1}


def test_to_a_subscriber_keeps_to_their_interests(feed):
    subscribe(feed, "ada@example.org", Interest("topic", "boats"))
    assert titles(digests(feed, LONG_AGO, to="ADA@example.org")) == {
        "ada@example.org": ["Ships at Sea"]
    }


def test_to_somebody_who_has_unsubscribed_is_refused(feed):
    one = subscribe(feed, "ada@example.org")
    subscriptions.unsubscribe(feed, SECRET, subscriptions.unsubscribe_token(SECRET, one.id))
    with pytest.raises(MailError, match=r"ada@example.org has unsubscribed and gets no letters"):
        digests(feed, LONG_AGO, to="ada@example.org")


def test_what_does_not_fit_into_a_letter_comes_with_the_next(feed, monkeypatch):
    monkeypatch.setattr(digests_module, "MOST", 2)
    subscribe(feed, "ada@example.org")
    settings = settings_for(25)
    queue(feed, settings)
    (rest,) = digests(feed, LONG_AGO)
    assert len(rest.entries) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7d", datetime.datetime(2025, 11, 13, 12, tzinfo=UTC)),
        ("36h", datetime.datetime(2025, 11, 19, 0, tzinfo=UTC)),
        ("2w", datetime.datetime(2025, 11, 6, 12, tzinfo=UTC)),
        ("2025-11-01", datetime.datetime(2025, 11, 1, tzinfo=UTC)),
    ],
)
def test_since(text, expected):
    assert moment(text, datetime.datetime(2025, 11, 20, 12, tzinfo=UTC)) == expected


@pytest.mark.parametrize("text", ["", "7", "d", "-3d", "soon", "2025-13-01", "7m"])
def test_a_since_that_is_none_is_an_error(text):
    now = datetime.datetime(2025, 11, 20, 12, tzinfo=UTC)
    with pytest.raises(MailError, match="expected 7d, 36h, 2w or 2025-11-01"):
        moment(text, now)
    with pytest.raises(MailError, match="yet to come"):
        moment("2031-01-01", now)


# What a letter looks like when it has arrived.


def test_a_letter_arrives_whole(feed, box):
    subscribe(feed, "ada@example.org")
    with mail_server(box) as settings:
        queue(feed, settings)
        assert report(deliver(feed, settings)) == "1 sent"
    ((to, message),) = box.letters
    assert to == "ada@example.org" == message["To"]
    assert message["From"] == "transom <papers@example.org>"
    assert message["Subject"] == "transom: 3 new papers"
    assert message["Message-ID"].endswith("@example.org>")
    assert message["Date"].datetime.tzinfo is not None
    text, html = parts(message)
    for part in (text, html):
        assert "Gizzard: Attention for Birds" in part
        assert "2025-11-03 · Ada Lovelace Owl, Ben Jay" in part
        assert "Birds attend to grain." in part
        assert "https://gallery.example/papers/evit" in part
        assert "You asked for: everything." in part
    assert b"=?" not in message.as_bytes().split(b"\n\n")[0]  # the link is not encoded or folded
    link = message["List-Unsubscribe"].strip("<>")
    assert link.startswith("https://gallery.example/unsubscribe/")
    assert message["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    assert link in text and link in html
    subscriptions.unsubscribe(feed, SECRET, link.rpartition("/")[2])
    assert subscriptions.confirmed(feed) == []


def test_hostile_text_neither_becomes_markup_nor_headers(store, box):
    title = "<script>alert(1)</script> Bcc: all@example.org"
    store.add([Entry(title, abstract="\n.\nQUIT <b>", authors=("<i>",))])
    subscribe(store, "ada@example.org", Interest("topic", "<script>alert"))
    with mail_server(box) as settings:
        queue(store, settings)
        deliver(store, settings)
    ((_, message),) = box.letters
    text, html = parts(message)
    assert title in text
    assert "<script>" not in html and "&lt;script&gt;" in html and "<b>" not in html
    assert message["Bcc"] is None


def test_lines_that_begin_with_a_dot_and_all_letters_arrive(feed, box):
    feed.add([Entry("Dots", abstract=".\n..\n.hidden and ünïcödé 東京 " + "long " * 300)])
    with mail_server(box) as settings, feed.writes() as connection:
        one = subscriptions.subscriber_id(connection, "ada@example.org")
        content = b"Subject: dots\n\n.\n..\n.a\nend"
        letters.put(connection, one, "digest", content, now=LONG_AGO)
    with mail_server(box) as settings:
        deliver(feed, settings)
    ((_, message),) = box.letters
    assert message.get_content().splitlines() == [".", "..", ".a", "end"]


def test_a_dry_run_writes_files_and_notes_nothing(feed, tmp_path, box):
    subscribe(feed, "ada@example.org")
    subscribe(feed, "ben@example.org", Interest("topic", "boats"))
    settings = settings_for(1)
    for _ in range(2):
        paths = write(settings, SECRET, digests(feed, LONG_AGO), tmp_path / "out")
        assert [path.suffix for path in paths] == [".eml", ".eml"]
    message = email.message_from_bytes(paths[1].read_bytes(), policy=email.policy.default)
    assert message["To"] == "ben@example.org" and "Ships at Sea" in parts(message)[0]
    with mail_server(box) as settings:
        queue(feed, settings)
        deliver(feed, settings)
    assert box.recipients == {"ada@example.org": 1, "ben@example.org": 1}


# Once.


def test_nothing_is_sent_twice(feed, box):
    subscribe(feed, "ada@example.org")
    with mail_server(box) as settings:
        for _ in range(3):
            queue(feed, settings)
            deliver(feed, settings)
        assert box.recipients == {"ada@example.org": 1}
        feed.add([Entry("One more")])
        queue(feed, settings)
        deliver(feed, settings)
    text = parts(box.letters[1][1])[0]
    assert "One more" in text and "Gizzard" not in text


def test_runs_at_the_same_time_share_the_work(feed, url, box):
    for number in range(8):
        subscribe(feed, f"reader{number}@example.org")
    failures = []

    def run(settings):
        try:
            with open_store(url) as own:
                queue(own, settings)
                deliver(own, settings, pause=0.01)
        except Exception as error:
            failures.append(error)

    with mail_server(box) as settings:
        threads = [threading.Thread(target=run, args=(settings,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        deliver(feed, settings)
    assert failures == []
    assert box.recipients == {f"reader{number}@example.org": 1 for number in range(8)}


def _forked(work):
    """Run in a process that can be killed; its number."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # should it hang
        try:
            work()
        finally:
            os._exit(0)
    return child


def _killed(child):
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


READERS = [f"reader{number}@example.org" for number in range(4)]


@pytest.mark.parametrize("moment", ["MAIL", "RCPT", "DATA"])
def test_everybody_gets_exactly_one_when_a_run_is_killed(feed, url, box, moment):
    """Killed between two recipients; before the second is handed over; and when the server has
    taken the second and its answer is still on the way."""
    for reader in READERS:
        subscribe(feed, reader)
    feed.close()
    child = 0

    def kill(count):
        if count == 2 and child:
            os.kill(child, signal.SIGKILL)
            time.sleep(0.1)

    box.at[moment] = kill
    with mail_server(box) as settings:

        def work():
            with open_store(url) as own:
                queue(own, settings)
                deliver(own, settings)

        child = _forked(work)
        assert _killed(child)
        assert sum(box.recipients.values()) == (2 if moment == "DATA" else 1)
        child = 0
        with open_store(url) as again:
            queue(again, settings)
            deliver(again, settings)
            queue(again, settings)
            assert deliver(again, settings).waiting == 0
    assert box.recipients == dict.fromkeys(READERS, 1)


def test_a_run_killed_before_its_last_line_leaves_nothing_behind(feed, url, box, monkeypatch):
    """The server has the whole letter but its last line, and throws it away."""
    for reader in READERS:
        subscribe(feed, reader)
    feed.close()
    real, calls = letters._move, []

    def move(store, letter, before, after, error=None):
        calls.append(after)
        if calls.count("sending") == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(store, letter, before, after, error)

    with mail_server(box) as settings:

        def work():
            monkeypatch.setattr(letters, "_move", move)
            with open_store(url) as own:
                queue(own, settings)
                deliver(own, settings)

        assert _killed(_forked(work))
        with open_store(url) as again:
            queue(again, settings)
            deliver(again, settings)
    assert box.recipients == dict.fromkeys(READERS, 1)


def test_a_letter_that_may_have_arrived_is_told_of_and_sent_again_only_when_asked(
    feed, box, monkeypatch
):
    subscribe(feed, "ada@example.org")
    real = letters._move

    class Gone(BaseException):
        pass

    def move(store, letter, before, after, error=None):
        done = real(store, letter, before, after, error)
        if after == "sending":
            raise Gone
        return done

    with mail_server(box) as settings:
        queue(feed, settings)
        with monkeypatch.context() as patch:
            patch.setattr(letters, "_move", move)
            with pytest.raises(Gone):
                deliver(feed, settings)
        monkeypatch.setattr(letters, "LOST", datetime.timedelta(0))
        told = deliver(feed, settings)
        assert (told.sent, told.waiting, told.unsure) == (0, 0, 1)
        assert "1 perhaps arrived and not sent again (--resend sends these again)" in report(told)
        assert box.letters == []
        assert letters.again(feed) == 1
        assert deliver(feed, settings).sent == 1
    assert box.recipients == {"ada@example.org": 1}


@pytest.mark.slow
def test_killed_at_any_time_nobody_gets_two_and_nothing_is_lost(feed, url, box):
    import random

    readers = [f"reader{number}@example.org" for number in range(30)]
    for reader in readers:
        subscribe(feed, reader)
    feed.close()
    chance = random.Random(0)
    with mail_server(box) as settings:

        def work():
            with open_store(url) as own:
                queue(own, settings)
                deliver(own, settings, pause=0.01)

        for _ in range(25):
            child = _forked(work)
            time.sleep(chance.uniform(0.05, 0.6))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        with open_store(url) as again:
            queue(again, settings)
            last = deliver(again, settings)
            waiting = letters._waiting(again)
    assert max(box.recipients.values()) == 1
    assert waiting == [] and last.waiting == 0
    missing = set(readers) - set(box.recipients)
    with open_store(url) as store, store.reads() as connection:
        from sqlalchemy import select

        from transom.gallery.schema import letters as table

        states = list(connection.execute(select(table.c.state)).scalars())
    assert len(states) == 30 and set(states) <= {"sent", "sending"}
    assert len(missing) <= states.count("sending")


# When the mail server does not play along.


def test_a_server_that_is_down_is_tried_with_longer_and_longer_pauses(feed, box):
    subscribe(feed, "ada@example.org")
    with mail_server(box) as settings:
        pass  # the port is free again
    queue(feed, settings)
    pauses = []
    told = deliver(feed, settings, tries=5, pause=2.0, sleep=pauses.append)
    assert pauses == [2.0, 4.0, 8.0, 16.0]
    assert (told.sent, told.waiting) == (0, 1)
    expected = r"0 sent; 1 wait and go out with the next run of .*: 127.0.0.1:\d+: .*[Rr]efused"
    with pytest.raises(MailError, match=expected):
        report(told)
    with mail_server(box) as settings:
        assert deliver(feed, settings).sent == 1
    assert box.recipients == {"ada@example.org": 1}


def test_a_server_that_comes_back_during_the_pauses_gets_everything(feed, box):
    subscribe(feed, "ada@example.org")
    answers = iter(["421 too busy", "451 later", "451 later"])
    box.at["MAIL"] = lambda count: next(answers, None)
    with mail_server(box) as settings:
        queue(feed, settings)
        told = deliver(feed, settings, sleep=lambda seconds: None)
    assert (told.sent, told.waiting) == (1, 0)


@pytest.mark.parametrize("command", ["MAIL", "RCPT", "before"])
def test_not_now_is_no_loss(feed, box, command):
    subscribe(feed, "ada@example.org")
    subscribe(feed, "ben@example.org")
    box.at[command] = lambda count: "450 not now"
    with mail_server(box) as settings:
        queue(feed, settings)
        told = deliver(feed, settings, tries=1)
        assert (told.sent, told.waiting, told.refused, told.unsure) == (0, 2, 0, 0)
        assert any("450 not now" in error for error in told.errors)
        box.at.clear()
        assert deliver(feed, settings).sent == 2
    assert box.recipients == {"ada@example.org": 1, "ben@example.org": 1}


@pytest.mark.parametrize("command", ["RCPT", "before"])
def test_never_is_told_and_holds_up_nobody(feed, box, command):
    subscribe(feed, "gone@example.org")
    subscribe(feed, "ben@example.org")
    box.at[command] = lambda count: "550 no such mailbox" if count == 1 else None
    with mail_server(box) as settings:
        queue(feed, settings)
        line = report(deliver(feed, settings))
        assert line.startswith("1 sent, 1 refused for good (--resend sends these again): ")
        assert "gone@example.org: 550 no such mailbox" in line
        assert deliver(feed, settings).sent == 0
    assert box.recipients == {"ben@example.org": 1}


def test_a_server_that_hangs_up_between_letters_gets_the_rest(feed, box):
    for reader in READERS:
        subscribe(feed, reader)
    box.at["MAIL"] = lambda count: "421 enough for one connection" if count in (2, 3) else None
    with mail_server(box) as settings:
        queue(feed, settings)
        told = deliver(feed, settings, sleep=lambda seconds: None)
    assert told.waiting == 0
    assert box.recipients == dict.fromkeys(READERS, 1)


def test_who_unsubscribes_before_the_letter_goes_out_gets_none(feed, box):
    one = subscribe(feed, "ada@example.org")
    with mail_server(box) as settings:
        queue(feed, settings)
        subscriptions.unsubscribe(feed, SECRET, subscriptions.unsubscribe_token(SECRET, one.id))
        told = deliver(feed, settings)
    assert (told.sent, told.waiting) == (0, 0) and box.letters == []


def test_a_crash_while_letters_are_written_leaves_no_half_of_one(feed, box, monkeypatch):
    subscribe(feed, "ada@example.org")
    subscribe(feed, "ben@example.org")
    real, calls = digests_module.compose, []

    def compose(settings, secret, digest):
        calls.append(digest)
        if len(calls) == 2:
            raise RuntimeError("out of paper")
        return real(settings, secret, digest)

    with mail_server(box) as settings:
        with monkeypatch.context() as patch:
            patch.setattr(digests_module, "compose", compose)
            with pytest.raises(RuntimeError):
                queue(feed, settings)
        queue(feed, settings)
        deliver(feed, settings)
    assert box.recipients == {"ada@example.org": 1, "ben@example.org": 1}
    assert all(len(re.findall(r"^\* ", parts(m)[0], re.M)) == 3 for _, m in box.letters)
