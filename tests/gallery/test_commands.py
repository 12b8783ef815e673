"""`transom papers` at the command line."""

from __future__ import annotations

import email
import email.policy
import os
import subprocess
import sys

import pytest

pytest.importorskip("sqlalchemy", reason="the extra 'gallery' is not installed")
pytest.importorskip("aiosmtpd", reason="aiosmtpd is not installed")

from tests.gallery.mailbox import Mailbox, mail_server, parts
from tests.gallery.pages import ATOM, ITEMS, JSON, SAMPLES, TEXT, needs_samples
from transom import cli
from transom.gallery import subscriptions
from transom.gallery.feed import read
from transom.gallery.store import open_store


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """A command line with a database, a secret and mail settings of its own."""
    monkeypatch.setenv("TRANSOM_DB_URL", f"sqlite:///{tmp_path / 'gallery.sqlite'}")
    monkeypatch.setenv("TRANSOM_SECRET", "not a secret, only a test")
    monkeypatch.setenv("TRANSOM_MAIL_CONFIG", str(tmp_path / "mail.ini"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["transom", "papers", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        return ended.value.code, told.out, told.err

    return run


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def _configured(tmp_path, port):
    (tmp_path / "mail.ini").write_text(
        f"[mail]\nhost = 127.0.0.1\nport = {port}\ntls = none\nfrom = papers@example.org\n"
        "base_url = https://gallery.example\n"
    )


def _confirmed(address, *interests):
    with open_store() as store:
        with store.writes() as connection:
            asked = subscriptions.ask(connection, subscriptions.load_secret(), address, interests)
        subscriptions.confirm(store, subscriptions.load_secret(), asked.token)


def test_the_bare_command_lists_as_before(run):
    code, out, _ = run()
    assert code == 0 and "evit" in out and "of them work" in out.splitlines()[-1]
    code, out, _ = run("spectrum", "merging")
    assert code == 0 and "pitome" in out
    code, out, _ = run("--ready", "spectrum")
    assert code == 0 and "pitome" in out
    code, out, _ = run("show", "evit")
    assert code == 0 and "published  2022-02-15" in out
    code, _, err = run("no-such-paper-anywhere")
    assert code == 1 and "no paper matches" in err


def test_help_tells_of_the_commands(run):
    code, out, _ = run("--help")
    assert code == 0
    for name in ("list", "import", "search", "trending", "atom", "digest", "subscribe"):
        assert f" {name} " in out


def test_a_wrong_option_is_one_clear_line(run):
    for words in (["--bogus"], ["search", "--bogus"]):
        code, _, err = run(*words)
        assert code == 2 and "No such option" in err and "Traceback" not in err


@needs_samples
def test_the_sample_pages(run):
    words = ["import", "--year", "2025", "--no-meaning", *SAMPLES]
    expected = "90 entries, 89 papers: 89 new, 0 merged, 1 unchanged; 89 are known here"
    assert run(*words)[:2] == (0, f"{expected}\n")
    expected = "90 entries, 89 papers: 0 new, 0 merged, 90 unchanged; 89 are known here"
    assert run(*words)[:2] == (0, f"{expected}\n")
    code, out, _ = run("search", "--limit", "3", "--no-meaning", "drop patches the class token")
    assert code == 0 and "evit" in out
    code, out, _ = run("trending", "--limit", "2")
    assert code == 0 and len(out.splitlines()) == 3 and "autoneural" in out


def test_several_forms_at_once(run, page, tmp_path):
    (tmp_path / "api.json").write_text(JSON)
    (tmp_path / "arxiv.xml").write_text(ATOM)
    code, out, _ = run(
        "import", page, tmp_path / "api.json", tmp_path / "arxiv.xml", "--no-meaning"
    )
    assert code == 0 and out.startswith("7 entries, 4 papers: 4 new, 2 merged, 1 unchanged;")


def test_one_bad_page_and_nothing_is_imported(run, page, tmp_path):
    (tmp_path / "bad.json").write_text("[3]")
    code, _, err = run("import", page, tmp_path / "bad.json")
    assert code == 1 and "bad.json: unknown JSON form: item 1 has no 'paper'" in err
    with open_store() as store:
        assert store.count() == 0


def test_years_are_in_reason(run, page):
    code, _, err = run("import", page, "--year", "25")
    assert code == 2 and "--year" in err


def test_nothing_found_says_what_to_do(run):
    for words in (["search", "birds"], ["trending"], ["atom"]):
        code, _, err = run(*words)
        assert code == 1 and "transom papers import FILE" in err


def test_markup_in_titles_is_shown_as_it_is(run, tmp_path):
    import json

    (tmp_path / "api.json").write_text(json.dumps([{**ITEMS[0], "title": "[red]A[/red] [link=x]"}]))
    run("import", tmp_path / "api.json", "--no-meaning")
    assert "[red]A[/red] [link=x]" in run("search", "red", "--no-meaning")[1]


def test_the_feed_as_atom(run, page, tmp_path):
    run("import", page, "--no-meaning")
    code, out, _ = run("atom", "--out", tmp_path / "feed.atom", "--base-url", "https://x.example")
    assert code == 0 and out.startswith("4 entries: ")
    assert len(read(tmp_path / "feed.atom")) == 4


def test_subscribe_confirm_digest(run, page, tmp_path):
    run("import", page, "--no-meaning")
    box = Mailbox()
    with mail_server(box) as settings:
        _configured(tmp_path, settings.port)
        code, out, _ = run("subscribe", "ada@example.org", "--topic", "birds", "--family", "tokens")
        assert code == 0 and "ada@example.org is asked for confirmation: 1 sent" in out
        code, _, err = run("subscribe", "ada@example.org")
        assert code == 1 and "less than ten minutes ago" in err
        code, out, _ = run("digest")
        assert (code, out) == (0, "0 sent\n")  # nobody has confirmed
        _confirmed("ben@example.org")
        assert run("digest", "--since", "1d")[:2] == (0, "1 sent\n")
        assert run("digest", "--since", "1d")[:2] == (0, "0 sent\n")
        code, out, _ = run("digest", "--to", "cid@example.org", "--topic", "feathers")
        assert (code, out) == (0, "1 sent\n")
    assert [to for to, _ in box.letters] == [
        "ada@example.org",
        "ben@example.org",
        "cid@example.org",
    ]
    assert "topic 'birds'" in parts(box.letters[0][1])[0]
    assert "Counting Feathers" in parts(box.letters[2][1])[0]


def test_a_dry_run_needs_neither_settings_nor_a_server(run, page, tmp_path):
    run("import", page, "--no-meaning")
    _confirmed("ada@example.org")
    for _ in range(2):
        code, out, _ = run("digest", "--dry-run", tmp_path / "out")
        assert code == 0 and out.startswith("1 letters in ")
    (path,) = (tmp_path / "out").iterdir()
    message = email.message_from_bytes(path.read_bytes(), policy=email.policy.default)
    assert message["To"] == "ada@example.org" and path.suffix == ".eml"
    assert "Gizzard" in parts(message)[0] and "Gizzard" in parts(message)[1]
    code, out, _ = run("subscribe", "ben@example.org", "--dry-run", tmp_path / "asks")
    assert code == 0 and "confirm" in next((tmp_path / "asks").iterdir()).read_text()


def test_without_settings_nothing_is_noted(run, page, tmp_path):
    run("import", page, "--no-meaning")
    _confirmed("ada@example.org")
    code, _, err = run("digest")
    assert code == 1 and "no mail settings" in err and "[mail]" in err
    with mail_server(box := Mailbox()) as settings:
        _configured(tmp_path, settings.port)
        assert run("digest")[:2] == (0, "1 sent\n")
    assert box.recipients == {"ada@example.org": 1}


def test_a_server_that_is_down_is_an_error_and_no_loss(run, page, tmp_path):
    run("import", page, "--no-meaning")
    _confirmed("ada@example.org")
    _configured(tmp_path, 9)
    code, _, err = run("digest", "--tries", "1")
    assert code == 1 and "1 wait and go out with the next run of `transom papers digest`" in err
    with mail_server(box := Mailbox()) as settings:
        _configured(tmp_path, settings.port)
        assert run("digest")[:2] == (0, "1 sent\n")
    assert box.recipients == {"ada@example.org": 1}


@pytest.mark.slow
def test_it_works_from_cron(run, page, tmp_path):
    """With the few variables cron sets, no terminal, and from the root folder."""
    run("import", page, "--no-meaning")
    _confirmed("ada@example.org")
    with mail_server(box := Mailbox()) as settings:
        _configured(tmp_path, settings.port)
        names = ("TRANSOM_DB_URL", "TRANSOM_MAIL_CONFIG", "TRANSOM_SECRET")
        given = {name: os.environ[name] for name in names}
        kept = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "SHELL": "/bin/sh"}
        told = [
            subprocess.run(
                [sys.executable, "-m", "transom.cli", "papers", "digest", "--since", "7d"],
                env={**kept, **given},
                cwd="/",
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
            for _ in range(2)
        ]
    assert [(each.returncode, each.stdout, each.stderr) for each in told] == [
        (0, "1 sent\n", ""),
        (0, "0 sent\n", ""),
    ]
    assert box.recipients == {"ada@example.org": 1}


def test_without_the_extra_the_list_works_and_the_feed_says_what_to_install(run, monkeypatch):
    from transom.gallery import commands

    real = commands.importlib.util.find_spec
    monkeypatch.setattr(
        commands.importlib.util, "find_spec", lambda name: None if name == "alembic" else real(name)
    )
    assert run("pitome")[0] == 0
    code, _, err = run("search", "birds")
    assert code == 1 and "the feed needs alembic" in err and "pip install 'transom[gallery]'" in err
