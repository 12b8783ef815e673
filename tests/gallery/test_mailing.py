"""Subscriptions, their links and pages, and the ways to a mail server."""

from __future__ import annotations

import datetime
import html
import re
import ssl

import pytest

pytest.importorskip("sqlalchemy", reason="the extra 'gallery' is not installed")
pytest.importorskip("aiosmtpd", reason="aiosmtpd is not installed")
pytest.importorskip("fastapi", reason="fastapi is not installed")

from tests.gallery.mailbox import Mailbox, mail_server, parts, settings_for
from transom.errors import MailError
from transom.gallery import letters, subscriptions
from transom.gallery.letters import deliver
from transom.gallery.mail import check_address, load_settings
from transom.gallery.subscriptions import Interest

SECRET = "not a secret, only a test"
DAY = datetime.timedelta(days=1)
NOW = datetime.datetime(2025, 11, 20, 12, tzinfo=datetime.timezone.utc)


def ask(store, address, *wanted, now=NOW):
    with store.writes() as connection:
        return subscriptions.ask(connection, SECRET, address, wanted, now=now)


def confirm(store, token, now=NOW):
    return subscriptions.confirm(store, SECRET, token, now=now)


# Subscriptions.


def test_nobody_gets_letters_before_confirming(store):
    asked = ask(store, "ada@example.org", Interest("topic", "birds"))
    assert subscriptions.confirmed(store) == []
    one = confirm(store, asked.token)
    assert one.address == "ada@example.org" and one.interests == (Interest("topic", "birds"),)
    assert confirm(store, asked.token) == one
    assert subscriptions.confirmed(store) == [one]


def test_a_later_wish_adds_to_the_first_once_it_is_confirmed(store):
    confirm(store, ask(store, "ada@example.org", Interest("topic", "birds")).token)
    wanted = (Interest("topic", "birds"), Interest("family", "tokens"))
    asked = ask(store, "Ada@Example.org", *wanted, now=NOW + DAY)
    assert len(subscriptions.confirmed(store)[0].interests) == 1
    assert set(confirm(store, asked.token).interests) == set(wanted)


def test_a_wish_in_somebody_elses_name_changes_nothing(store):
    confirm(store, ask(store, "ada@example.org", Interest("topic", "birds")).token)
    ask(store, "ada@example.org", Interest("all"), now=NOW + DAY)
    assert subscriptions.confirmed(store)[0].interests == (Interest("topic", "birds"),)


def test_nobody_is_flooded_with_confirmations(store):
    first = ask(store, "ada@example.org")
    assert ask(store, "ada@example.org", now=NOW + DAY / 1000) is None
    assert ask(store, "ADA@example.org", now=NOW + DAY / 1000) is None
    assert confirm(store, first.token).address == "ada@example.org"
    assert ask(store, "ada@example.org", now=NOW + DAY) is not None


def test_only_the_last_confirmation_counts(store):
    first = ask(store, "ada@example.org")
    last = ask(store, "ada@example.org", now=NOW + DAY)
    with pytest.raises(MailError, match="this link counts no more; subscribe once more"):
        confirm(store, first.token)
    confirm(store, last.token)


def test_unsubscribing_ends_everything_until_asked_again(store):
    asked = ask(store, "ada@example.org")
    one = confirm(store, asked.token)
    token = subscriptions.unsubscribe_token(SECRET, one.id)
    for _ in range(2):
        subscriptions.unsubscribe(store, SECRET, token)
        assert subscriptions.confirmed(store) == []
    with pytest.raises(MailError, match="counts no more"):
        confirm(store, asked.token)
    confirm(store, ask(store, "ada@example.org", now=NOW + DAY).token)
    assert len(subscriptions.confirmed(store)) == 1


@pytest.mark.parametrize("change", ["secret", "letter", "other", "kind", "empty", "unicode"])
def test_links_cannot_be_forged(store, change):
    asked = ask(store, "ada@example.org")
    one = confirm(store, asked.token)
    good = subscriptions.unsubscribe_token(SECRET, one.id)
    somebody = subscriptions.unsubscribe_token(SECRET, 999)
    forged = {
        "secret": subscriptions.unsubscribe_token("another secret altogether", one.id),
        "letter": good[:-2] + ("AA" if good[-2:] != "AA" else "BB"),
        "other": ".".join((somebody.split(".")[0], good.split(".")[1])),
        "kind": asked.token,
        "empty": "",
        "unicode": "é.é",
    }[change]
    with pytest.raises(MailError, match="this link is not one of ours"):
        subscriptions.unsubscribe(store, SECRET, forged)
    with pytest.raises(MailError, match=r"not one of ours|too old"):
        confirm(store, good if change == "kind" else forged)
    assert len(subscriptions.confirmed(store)) == 1


def test_the_link_of_a_confirmation_grows_too_old(store, monkeypatch):
    asked = ask(store, "ada@example.org")
    monkeypatch.setattr(subscriptions, "VALID", -DAY)
    with pytest.raises(MailError, match="this link is too old; subscribe once more"):
        confirm(store, asked.token)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("birds", "", "an interest in 'birds'; expected one of all, topic"),
        ("family", "birds", "there is no family 'birds'; families are action"),
        ("topic", "  ", "the topic '  ' has no word in it"),
        ("search", "?!", "has no word in it"),
        ("author", "x" * 201, "an interest of 201 characters"),
        ("topic", "a\x00b", "characters that are no text"),
    ],
)
def test_an_interest_that_is_none_is_an_error(kind, value, message):
    with pytest.raises(MailError, match=message):
        Interest(kind, value)


def test_there_is_an_end_to_interests(store):
    with pytest.raises(MailError, match="51 interests at once; expected 50 at most"):
        ask(store, "ada@example.org", *(Interest("topic", f"birds {i}") for i in range(51)))


@pytest.mark.parametrize(
    "address",
    ["", "ada", "@example.org", "ada@", "a b@example.org", "ada@example.org, ben@example.org",
     "ada@example.org\nBcc: all@example.org", "<ada@example.org>", "ada@exa_mple.org",
     "x" * 250 + "@example.org", "ådå@example.org", "ada@example..org"],
)  # fmt: skip
def test_an_address_that_is_none_is_an_error(store, address):
    with pytest.raises(MailError, match=r"expected one mail address such as ada@example\.org"):
        ask(store, address)


def test_domains_have_no_case():
    assert check_address(" Ada@EXAMPLE.org ") == "Ada@example.org"


def test_the_secret_is_made_once_and_kept_to_its_owner(tmp_path, monkeypatch):
    monkeypatch.delenv("TRANSOM_SECRET", raising=False)
    path = tmp_path / "data" / "secret.key"
    made = subscriptions.load_secret(path)
    assert len(made) >= 32 and subscriptions.load_secret(path) == made
    assert path.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("TRANSOM_SECRET", "from the environment")
    assert subscriptions.load_secret(path) == "from the environment"
    monkeypatch.setenv("TRANSOM_SECRET", "short")
    with pytest.raises(MailError, match="fewer than 16 characters"):
        subscriptions.load_secret(path)


# The configuration.


def _written(tmp_path, text):
    path = tmp_path / "mail.ini"
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_settings_are_read(tmp_path):
    (tmp_path / "password").write_text("s3cret%\n")
    path = _written(
        tmp_path,
        "[mail]\nhost = smtp.example.org\nuser = ada\npassword_file = password\n"
        "from = Papers <papers@example.org>\nbase_url = https://papers.example.org/\n",
    )
    found = load_settings(path)
    assert (found.host, found.port, found.tls) == ("smtp.example.org", 587, "starttls")
    assert (found.user, found.password) == ("ada", "s3cret%")
    assert found.base_url == "https://papers.example.org"


BASE = "[mail]\nhost = smtp.example.org\nfrom = papers@example.org\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("host = x", "cannot be read as mail settings"),
        ("[post]\nhost = x", r"has no section \[mail\]"),
        ("[mail]\nhost = x", "from is missing"),
        ("[mail]\nfrom = a@b.org", "host is missing"),
        (BASE + "tsl = none", "unknown tsl; known are host, port, tls"),
        (BASE + "tls = ssl", "tls is 'ssl'; expected one of starttls, tls, none"),
        (BASE + "port = smtp", "port is 'smtp'; expected a number"),
        (BASE + "port = 99999", "port is 99999; expected a number from 1 to 65535"),
        (BASE + "user = ada", "a user and no password"),
        (BASE + "user = ada\npassword = x\ntls = none", "would show the password to everybody"),
        (BASE + "password_file = nowhere", "password_file cannot be read"),
        (BASE + "base_url = papers.example.org", "expected http://... or https://..."),
        ("[mail]\nhost = x\nfrom = nobody", "from is 'nobody'; expected one mail address"),
    ],
)
def test_settings_that_are_wrong_are_named_with_their_file(tmp_path, text, message):
    path = _written(tmp_path, text)
    with pytest.raises(MailError, match=message) as caught:
        load_settings(path)
    assert str(path) in str(caught.value)


def test_settings_that_are_not_there_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TRANSOM_MAIL_CONFIG", str(tmp_path / "none.ini"))
    with pytest.raises(MailError, match=r"none.ini is not there; write it with a section \[mail\]"):
        load_settings()


def test_a_password_that_others_may_read_is_told_of(tmp_path, caplog):
    path = _written(tmp_path, BASE + "user = ada\npassword = x")
    load_settings(path)
    assert caplog.text == ""
    path.chmod(0o644)
    load_settings(path)
    assert "chmod 600" in caplog.text


# TLS and login.


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    trustme = pytest.importorskip("trustme", reason="trustme is not installed")
    folder = tmp_path_factory.mktemp("tls")
    made = trustme.CA()
    made.cert_pem.write_to_path(str(folder / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.issue_cert("127.0.0.1").configure_cert(context)
    return context, str(folder / "ca.pem")


def _login(server, session, envelope, mechanism, data):
    from aiosmtpd.smtp import AuthResult

    known = (data.login, data.password) == (b"ada", b"right")
    return AuthResult(success=known, handled=False)


def _waiting_letter(store):
    letters.subscribe(store, settings_for(25), SECRET, "ada@example.org")


@pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS:UserWarning")
@pytest.mark.parametrize("tls", ["starttls", "tls"])
def test_letters_go_through_tls_and_a_login(store, authority, tls):
    context, ca_file = authority
    box = Mailbox()
    _waiting_letter(store)
    server = {"tls_context": context, "require_starttls": True} if tls == "starttls" else {}
    if tls == "tls":
        server = {"ssl_context": context, "auth_require_tls": False}
    server |= {"authenticator": _login, "auth_required": True}
    client = {"tls": tls, "ca_file": ca_file, "user": "ada"}
    with _secure(box, server, **client, password="wrong") as settings:
        with pytest.raises(MailError, match=r"refuses the login of ada: 535 .*check user and pass"):
            deliver(store, settings)
        assert box.letters == []
    with _secure(box, server, **client, password="right") as settings:
        assert deliver(store, settings).sent == 1
    assert box.recipients == {"ada@example.org": 1}


def _secure(box, server, **client):
    context = server.get("ssl_context")
    options = {key: value for key, value in server.items() if key != "ssl_context"}
    return mail_server(box, ssl_context=context, **options, **client)


def test_a_certificate_nobody_vouches_for_is_no_server_of_ours(store, authority):
    context, _ = authority
    box = Mailbox()
    _waiting_letter(store)
    with mail_server(box, tls_context=context, tls="starttls") as settings:
        told = deliver(store, settings, tries=1)
    assert told.waiting == 1 and "CERTIFICATE_VERIFY_FAILED" in told.errors[0]
    assert box.letters == []


def test_a_server_without_starttls_gets_nothing(store):
    box = Mailbox()
    _waiting_letter(store)
    with (
        mail_server(box, tls="starttls") as settings,
        pytest.raises(MailError, match="does not offer STARTTLS; set tls to tls or"),
    ):
        deliver(store, settings)
    assert box.letters == []


# The pages.


@pytest.fixture
def site(store, tmp_path, monkeypatch):
    """A visitor of the server, the mailbox behind it, and the store."""
    testclient = pytest.importorskip("fastapi.testclient", reason="httpx is not installed")
    from transom.gallery.server import create_app

    box = Mailbox()
    with mail_server(box) as settings:
        path = _written(
            tmp_path,
            f"[mail]\nhost = 127.0.0.1\nport = {settings.port}\ntls = none\n"
            "from = papers@example.org\nbase_url = https://gallery.example\n",
        )
        monkeypatch.setenv("TRANSOM_MAIL_CONFIG", str(path))
        app = create_app(store, secret=SECRET)
        yield testclient.TestClient(app, base_url="http://127.0.0.1"), box, store


def _send(client, path, **fields):
    text = client.get(path, headers={"accept": "text/html"}).text
    token = re.search(r'name="csrf" value="([^"]+)"', text)[1]
    headers = {"accept": "text/html"}
    return client.post(path, data={"csrf": token, **fields}, headers=headers)


def _path(link):
    return link.removeprefix("https://gallery.example")


def test_subscribe_confirm_unsubscribe(site):
    client, box, store = site
    fields = {"address": "ada@example.org", "topics": "birds, token merging", "families": "tokens"}
    assert _send(client, "/subscribe", **fields).status_code == 202
    assert subscriptions.confirmed(store) == []
    ((to, message),) = box.letters
    assert to == "ada@example.org"
    text, markup = parts(message)
    (link,) = re.findall(r"https://\S+", text)
    assert link in html.unescape(markup) and "topic 'token merging'" in text
    assert client.get(_path(link)).status_code == 200
    assert subscriptions.confirmed(store) == []  # looking at a link does nothing
    answer = _send(client, _path(link))
    assert answer.status_code == 200 and "Papers will come" in answer.text
    (one,) = subscriptions.confirmed(store)
    assert {(each.kind, each.value) for each in one.interests} == {
        ("topic", "birds"),
        ("topic", "token merging"),
        ("family", "tokens"),
    }
    leave = f"/unsubscribe/{subscriptions.unsubscribe_token(SECRET, one.id)}"
    assert "Unsubscribe" in client.get(leave).text
    assert subscriptions.confirmed(store) == [one]
    # As a mail program does it: one POST, no cookie, no form token.
    client.cookies.clear()
    answer = client.post(leave, data={"List-Unsubscribe": "One-Click"})
    assert answer.status_code == 200
    assert subscriptions.confirmed(store) == []


def test_a_form_without_its_token_does_nothing(site):
    client, box, store = site
    answer = client.post("/subscribe", data={"address": "ada@example.org"})
    assert answer.status_code == 403
    asked = ask(store, "ben@example.org")
    assert client.post(f"/confirm/{asked.token}").status_code == 403
    assert box.letters == [] and subscriptions.confirmed(store) == []


@pytest.mark.parametrize("path", ["/confirm/nonsense", "/unsubscribe/nonsense", "/confirm/%00"])
def test_forged_links_are_told_so(site, path):
    client, _, _ = site
    answer = client.post(path) if "unsub" in path else _send(client, path)
    assert answer.status_code == 400
    assert "not one of ours" in answer.text


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"address": "nobody"}, "expected one mail address"),
        ({"address": "ada@example.org", "families": "birds"}, "there is no family"),
        ({"address": "ada@example.org", "topics": "?"}, "has no word in it"),
        ({"address": "ada@example.org", "topics": "x" * 1001}, "at most 1000"),
    ],
)
def test_wrong_wishes_are_told_of(site, fields, says):
    client, box, _ = site
    answer = _send(client, "/subscribe", **fields)
    assert answer.status_code in (400, 422)
    assert says in html.unescape(answer.text)
    assert box.letters == []


def test_the_answer_does_not_tell_whether_an_address_is_known(site):
    client, box, _ = site
    first = _send(client, "/subscribe", address="ada@example.org")
    second = _send(client, "/subscribe", address="ada@example.org")
    assert (first.status_code, first.text) == (second.status_code, second.text)
    assert len(box.letters) == 1


def test_without_mail_settings_there_are_no_subscriptions(store, tmp_path, monkeypatch):
    testclient = pytest.importorskip("fastapi.testclient", reason="httpx is not installed")
    from transom.gallery.server import create_app

    monkeypatch.setenv("TRANSOM_MAIL_CONFIG", str(tmp_path / "none.ini"))
    client = testclient.TestClient(create_app(store), base_url="http://127.0.0.1")
    answer = _send(client, "/subscribe", address="ada@example.org")
    assert answer.status_code == 404 and "not set up to send mail" in answer.text


def test_what_is_asked_for_by_a_link_stands_in_the_form_as_text(site):
    client, _, _ = site
    answer = client.get("/subscribe", params={"search": '"><script>alert(1)</script>'})
    assert "<script>alert" not in answer.text and "alert(1)" in answer.text
