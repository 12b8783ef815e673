"""What the server refuses: bombs, disguises, forgeries, strangers and other names."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server needs transom[gallery]")

from fastapi.testclient import TestClient
from PIL import Image

from transom.errors import GalleryError
from transom.gallery.feed import Entry
from transom.gallery.jobs import Jobs
from transom.gallery.security import MAX_BODY, Sessions, check_binding, is_loopback, local_path
from transom.gallery.server import create_app
from transom.gallery.store import Store, open_store
from transom.gallery.uploads import MAX_BYTES, read_picture, sniff

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'{{ 7*7 }}../../etc/passwd"


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Store]:
    with open_store(f"sqlite:///{tmp_path / 'gallery.sqlite'}") as opened:
        yield opened


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    made = Jobs(tmp_path / "jobs", "tests.gallery.chores:run")
    yield made
    made.close()


@pytest.fixture
def client(shelf: Store, jobs: Jobs) -> Iterator[TestClient]:
    with TestClient(create_app(shelf, jobs=jobs), base_url="http://localhost") as opened:
        yield opened


def encoded(form: str, size: tuple[int, int] = (40, 30), **how: Any) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(buffer, form, **how)
    return buffer.getvalue()


def token(client: TestClient) -> str:
    found = re.search(r'name="csrf" value="([0-9a-f]+)"', client.get("/try").text)
    assert found is not None
    return found[1]


def send(client: TestClient, data: bytes, csrf: str, **changes: Any) -> Any:
    form = {"model": "vit_tiny_patch16_224", "method": "tome", "budget": "mild", "csrf": csrf}
    return client.post(
        "/try",
        data={**form, **changes},
        files={"picture": ("picture.png", data, "image/png")},
        headers={"accept": "text/html"},
        follow_redirects=False,
    )


# pictures


def png(width: int, height: int, body: bytes = b"", *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    middle = b"".join(chunk(*each) for each in chunks)
    data = chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + middle + data


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_taken_by_their_content(form: str) -> None:
    data = encoded(form)
    assert sniff(data) == form
    assert read_picture(data).size == (40, 30)


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "PPM", "ICO", "PDF"])
def test_other_formats_are_refused_though_pillow_could_read_them(form: str) -> None:
    with pytest.raises(GalleryError, match="expected JPEG, PNG or WebP"):
        read_picture(encoded(form))


def test_a_page_in_the_clothes_of_a_picture_is_refused() -> None:
    for data in (b"<svg onload=alert(1)>", b"<html>", b"", b"GIF89a<script>", b"PK\x03\x04"):
        with pytest.raises(GalleryError, match="expected JPEG, PNG or WebP"):
            read_picture(data)
    with pytest.raises(GalleryError, match="cannot be decoded"):
        read_picture(b"\x89PNG\r\n\x1a\n<script>alert(1)</script>")


def test_a_bomb_is_refused_by_its_header_before_it_is_decoded() -> None:
    for side, says in ((9_000, "9000×9000 pixels; at most 40 million"), (60_000, "far more than")):
        bomb = png(side, side, bytes(1_000_000))
        assert len(bomb) < 10_000
        with pytest.raises(GalleryError, match=says):
            read_picture(bomb)


def test_a_bomb_in_the_text_of_a_picture_is_refused() -> None:
    text = b"comment\0\0" + zlib.compress(bytes(200 * 2**20))
    with pytest.raises(GalleryError, match="cannot be decoded"):
        read_picture(png(16, 16, bytes(16 * 49), (b"zTXt", text)))


def test_truncated_and_tiny_and_large_ones_are_refused() -> None:
    with pytest.raises(GalleryError, match="cannot be decoded"):
        read_picture(encoded("PNG")[:900])
    with pytest.raises(GalleryError, match="at least 8×8"):
        read_picture(encoded("PNG", (40, 4)))
    with pytest.raises(GalleryError, match="MiB; at most 10"):
        read_picture(b"\xff\xd8\xff" + bytes(MAX_BYTES))


def test_what_is_kept_is_small_upright_and_without_metadata() -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a secret place"
    Image.new("RGB", (3000, 1000), "green").save(buffer, "JPEG", exif=exif)
    found = read_picture(buffer.getvalue())
    assert found.size == (341, 1024) and found.mode == "RGB"
    assert not found.info and not found.getexif()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "I;16", "1"])
def test_every_mode_of_png_becomes_rgb(mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (20, 20)).save(buffer, "PNG")
    assert read_picture(buffer.getvalue()).mode == "RGB"


# requests


def test_every_answer_forbids_inline_scripts(client: TestClient) -> None:
    for path in ("/", "/papers/tome", "/try", "/nope", "/static/gallery.js", "/api/search?q=a"):
        answer = client.get(path, headers={"accept": "text/html"})
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy
        assert "unsafe" not in policy and "*" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"


def test_every_change_asks_for_the_token(client: TestClient) -> None:
    changing = {
        path: sorted(methods)
        for path, methods in (
            (path, {m.upper() for m in item} & {"POST", "PUT", "PATCH", "DELETE"})
            for path, item in client.get("/openapi.json").json()["paths"].items()
        )
        if methods
    }
    assert {"/try", "/login", "/logout", "/jobs/{identity}/cancel"} <= changing.keys()
    for path in changing.keys() - {p for p in changing if p.startswith("/unsubscribe")}:
        for cookie in ("", "transom_session=forged"):
            client.cookies.clear()
            headers = {"cookie": cookie} if cookie else {}
            answer = client.post(path.replace("{identity}", "x"), data={}, headers=headers)
            assert answer.status_code == 403, path


def test_a_token_of_another_session_is_refused(client: TestClient) -> None:
    theirs = token(client)
    client.cookies.clear()
    token(client)
    assert send(client, encoded("PNG"), theirs).status_code == 403


def test_a_request_from_another_site_is_refused_even_with_the_token(client: TestClient) -> None:
    mine = token(client)
    for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
        answer = client.post("/logout", data={"csrf": mine}, headers=headers)
        assert answer.status_code == 403
    assert client.post("/logout", data={"csrf": mine}, follow_redirects=False).status_code == 303


def test_an_upload_with_the_token_becomes_a_job(client: TestClient) -> None:
    answer = send(client, encoded("PNG"), token(client))
    assert answer.status_code == 303 and answer.headers["location"].startswith("/jobs/")


def test_an_upload_that_is_no_picture_is_told_so_on_the_form(client: TestClient) -> None:
    answer = send(client, b"<svg onload=alert(1)></svg>", token(client))
    assert answer.status_code == 400
    assert "expected JPEG, PNG or WebP" in answer.text and "onload" not in answer.text


def test_a_hostile_choice_comes_back_as_text(client: TestClient) -> None:
    answer = send(client, encoded("PNG"), token(client), model=HOSTILE[:100])
    assert answer.status_code == 400 and "<script>alert" not in answer.text


def test_bodies_are_limited_told_or_not(client: TestClient) -> None:
    assert client.post("/try", content=bytes(MAX_BODY + 1)).status_code == 413

    def pieces() -> Iterator[bytes]:
        for _ in range(MAX_BODY // 2**20 + 2):
            yield bytes(2**20)

    kind = "multipart/form-data; boundary=x"
    answer = client.post("/try", content=pieces(), headers={"content-type": kind})
    assert answer.status_code in (400, 403, 413)
    assert client.post("/try", headers={"content-length": "many"}).status_code == 400


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "["},
        {"host": "[::1"},
        {"content-length": "\xb2"},
        {"content-length": "9" * 5000},
        {"origin": "http://[", "content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data"},
        {"content-type": "multipart/form-data; boundary="},
        {"cookie": "transom_session=\xe9.\xff"},
        {"x-csrf-token": "\xe9"},
    ],
)
def test_headers_that_are_none_are_no_error_of_the_server(
    client: TestClient, headers: dict[str, str]
) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    for path in ("/logout", "/try", "/jobs/x/cancel"):
        answer = client.post(path, content=b"x", headers=raw)
        assert 400 <= answer.status_code < 500, (path, answer.status_code)


def test_other_names_for_this_machine_are_refused(client: TestClient) -> None:
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 421
    assert client.get("/health", headers={"host": "127.0.0.1:8080"}).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/drawings/..%2f..%2fpyproject.toml",
        "/drawings/.hidden.webp",
        "/static/../server.py",
        "/static/%2e%2e/server.py",
        "/results/..%2fREADME",
        "/papers/..%2f..%2fetc",
        "/jobs/..%2f../events",
        "/jobs/x/picture.png",
    ],
)
def test_no_path_leads_out(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


# entries


def test_hostile_entries_stay_text_on_every_page(client: TestClient, shelf: Store) -> None:
    shelf.add(
        [
            Entry(
                title=HOSTILE,
                abstract=HOSTILE,
                authors=(HOSTILE,),
                author_count=1,
                organisation=HOSTILE,
                date=None,
                comments=1,
                votes=1,
                arxiv_id=None,
                repo="javascript:alert(1)",
                project="https://example.org/'onmouseover='alert(1)",
                slug=None,
            )
        ]
    )
    number = shelf.page()[0].id
    for path in ("/", f"/entries/{number}", "/search?q=alert", "/feed.atom"):
        text = client.get(path).text
        assert "<script>alert" not in text and "<img src=x" not in text, path
        assert 'href="javascript' not in text, path
        assert "'onmouseover='" not in text or path == "/feed.atom"  # there in double quotes
    hits = client.get("/api/search", params={"q": "alert"})
    assert hits.headers["content-type"].startswith("application/json")
    assert hits.json()["hits"][0]["title"] == HOSTILE


# who may come


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "gallery.example"])
def test_beyond_loopback_a_password_is_wanted(host: str) -> None:
    with pytest.raises(GalleryError, match="set a password"):
        check_binding(host, None)
    with pytest.raises(GalleryError, match="fewer than 8"):
        check_binding(host, "short")
    check_binding(host, "long enough")


def test_loopback_needs_none() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        assert is_loopback(host)
        check_binding(host, None)


def test_the_command_refuses_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from transom.gallery.gallery_commands import app

    monkeypatch.delenv("TRANSOM_GALLERY_PASSWORD", raising=False)
    answer = CliRunner().invoke(app, ["serve", "--host", "0.0.0.0"])
    assert isinstance(answer.exception, GalleryError)


@pytest.fixture
def guarded(shelf: Store, jobs: Jobs) -> Iterator[TestClient]:
    app = create_app(shelf, jobs=jobs, host="0.0.0.0", password="open sesame")
    with TestClient(app, base_url="http://gallery.example") as opened:
        yield opened


def enter(client: TestClient, password: str, next: str = "/") -> Any:
    form = client.get("/login").text
    found = re.search(r'name="csrf" value="([0-9a-f]+)"', form)
    assert found is not None
    data = {"password": password, "next": next, "csrf": found[1]}
    return client.post("/login", data=data, follow_redirects=False)


def test_without_the_password_nothing_is_seen(guarded: TestClient) -> None:
    for path in ("/", "/papers/tome", "/api/search?q=a", "/openapi.json", "/try", "/feed.atom"):
        assert guarded.get(path, headers={"accept": "*/*"}).status_code == 401, path
    answer = guarded.get("/results", headers={"accept": "text/html"}, follow_redirects=False)
    assert answer.status_code == 303 and answer.headers["location"] == "/login?next=/results"
    assert guarded.get("/static/gallery.css").status_code == 200


def test_with_the_password_everything_is(guarded: TestClient) -> None:
    assert enter(guarded, "wrong").status_code == 401
    answer = enter(guarded, "open sesame", "/results")
    assert answer.status_code == 303 and answer.headers["location"] == "/results"
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=lax" in cookie
    assert guarded.get("/papers/tome").status_code == 200


def test_guessing_is_slowed_down(guarded: TestClient) -> None:
    assert [enter(guarded, f"guess {i}").status_code for i in range(6)] == [401] * 5 + [429]


def test_cookies_cannot_be_forged() -> None:
    theirs, ours = Sessions("one"), Sessions("two", "open sesame")
    forged = theirs._signer.dumps({"id": "x", "in": True})
    assert ours.read({"transom_session": str(forged)}) == {}
    assert not ours.admits({}) and not ours.admits({"id": "x", "in": "yes"})


def test_after_the_login_nobody_is_sent_elsewhere() -> None:
    for address in (
        "https://evil.example",
        "//evil.example",
        "//[",
        "/\\evil.example",
        "javascript:x",
    ):
        assert local_path(address) == "/"
    assert local_path("/papers/tome?x=1") == "/papers/tome?x=1"
