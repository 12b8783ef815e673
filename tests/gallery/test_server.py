"""The server: the same pages, search, an upload that becomes a result, and no 5xx for anybody."""

from __future__ import annotations

import datetime
import io
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server needs transom[gallery]")

from fastapi.testclient import TestClient
from PIL import Image

from transom import registry
from transom.cards import load_cards
from transom.gallery.feed import Entry
from transom.gallery.jobs import Jobs
from transom.gallery.results import results
from transom.gallery.server import create_app
from transom.gallery.store import Store, open_store


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("store")
    with open_store(f"sqlite:///{folder / 'gallery.sqlite'}") as opened:
        yield opened


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    made = Jobs(tmp_path_factory.mktemp("jobs"), "tests.gallery.chores:run")
    yield made
    made.close()


@pytest.fixture(scope="module")
def app(shelf: Store, jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Any:
    drawings = tmp_path_factory.mktemp("drawings")
    Image.new("RGB", (8, 8)).save(drawings / "tome-0.webp")
    (drawings / "tome-0.json").write_text("[]", encoding="utf-8")
    (drawings / "tome.json").write_text(
        json.dumps([["tome-0.webp", "drawn", [8, 8]]]), encoding="utf-8"
    )
    return create_app(shelf, jobs=jobs, drawings=drawings)


@pytest.fixture(scope="module")
def client(app: Any) -> Iterator[TestClient]:
    with TestClient(app, base_url="http://localhost") as opened:
        yield opened


def entry(title: str, day: str, **more: Any) -> Entry:
    given: dict[str, Any] = {
        "abstract": "", "authors": (), "author_count": None, "organisation": None, "comments": 0,
        "votes": 0, "arxiv_id": None, "repo": None, "project": None, "slug": None,
    }  # fmt: skip
    return Entry(title=title, date=datetime.date.fromisoformat(day), **{**given, **more})


def test_every_page_of_the_static_site_is_here_too(client: TestClient) -> None:
    for path in ("/", "/results", "/hosts", "/try", "/search", "/health", "/feed.atom"):
        assert client.get(path).status_code == 200, path
    for slug in ("tome", "fna", "rmt", next(s for s in load_cards() if s not in registry.rooms())):
        text = client.get(f"/papers/{slug}").text
        assert load_cards()[slug].title.split(":")[0] in text
    for name in results():
        assert client.get(f"/results/{name}").status_code == 200
        assert client.get(f"/results/{name}.csv").content == results()[name].path.read_bytes()
    assert client.get("/papers/tome.html", follow_redirects=False).headers["location"] == (
        "/papers/tome"
    )


def test_every_link_of_the_feed_leads_somewhere(client: TestClient) -> None:
    text = client.get("/").text
    for address in sorted(set(re.findall(r'(?:href|src)="(/[^"#]*)"', text)))[:40]:
        assert client.get(address).status_code == 200, address


def test_drawings_come_from_their_folder(client: TestClient) -> None:
    assert "/drawings/tome-0.webp" in client.get("/papers/tome").text
    assert client.get("/drawings/tome-0.webp").headers["content-type"] == "image/webp"
    assert client.get("/drawings/tome.json").status_code == 404


def titles(text: str) -> list[str]:
    return re.findall(r'<h3><a href="/(?:papers|entries)/([^"]+)"', text)


def test_the_feed_goes_on_over_pages_without_gap_or_repeat(tmp_path: Path, jobs: Jobs) -> None:
    with open_store(f"sqlite:///{tmp_path / 'feed.sqlite'}") as store:
        first = datetime.date(2021, 1, 1)
        store.add(
            entry(f"Paper number {i}", (first + datetime.timedelta(days=13 * i)).isoformat())
            for i in range(130)
        )
        card = load_cards()["tome"]
        store.add([entry(card.title, "2022-10-17", slug="tome", votes=7)])
        with TestClient(create_app(store, jobs=jobs), base_url="http://localhost") as client:
            seen, path = [], "/"
            while path:
                text = client.get(path).text
                seen += titles(text)
                found = re.search(r'rel="next" href="([^"]+)"', text)
                path = found[1].replace("&amp;", "&") if found else ""
            assert len(seen) == len(set(seen)) == 130 + len(load_cards())
            assert {slug for slug in seen if not slug.isdigit()} == load_cards().keys()
            assert "7 votes" in client.get("/?family=tokens").text


def test_filters_are_those_of_the_cards(client: TestClient) -> None:
    for name, has in (
        ("family=tokens", lambda slug: load_cards()[slug].family == "tokens"),
        ("status=runs", lambda slug: slug in registry.rooms()),
        ("status=coming", lambda slug: slug not in registry.rooms()),
        ("kind=backbone&status=runs", lambda slug: "backbone" in registry.rooms()[slug].kinds),
    ):
        shown = set(titles(client.get(f"/?{name}").text))
        wanted = {
            s for s in load_cards() if (s in registry.rooms() or "runs" not in name) and has(s)
        }
        assert shown == wanted, name
    assert titles(client.get("/?host=transformers-convnext").text) == []
    assert "tome" in titles(client.get("/?host=timm-vit").text)
    assert "dyvte" in titles(client.get("/?host=decoders").text)
    assert titles(client.get("/?host=no-such-host").text) == []


def test_search_finds_cards_and_entries(client: TestClient, shelf: Store) -> None:
    shelf.add([entry("Zebras merge their stripes", "2026-01-05", abstract="An animal study.")])
    hits = client.get("/api/search", params={"q": "token merging"}).json()["hits"]
    assert "/papers/tome" in [hit["href"] for hit in hits]
    found = client.get("/api/search", params={"q": "zebra"}).json()["hits"]
    assert found[0]["title"] == "Zebras merge their stripes"
    page = client.get(found[0]["href"]).text
    assert "An animal study." in page
    assert "Zebras merge" in client.get("/search", params={"q": "zebras"}).text
    assert client.get("/api/search", params={"q": "a" * 300}).status_code == 422
    for odd in ('"', "*", "a OR b)", "NEAR(", "'; drop table", "\x00", "état", "-", "ａ"):
        assert client.get("/api/search", params={"q": odd}).status_code == 200, odd


def test_an_entry_that_came_in_lately_is_new(client: TestClient, shelf: Store) -> None:
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    shelf.add([entry("Out this morning", today), entry("Out long ago", "2019-03-03")])
    text = client.get("/").text
    new = re.findall(r'<a href="/entries/\d+">([^<]+)</a> <span class="new">', text)
    assert "Out this morning" in new and "Out long ago" not in new


def test_a_paper_that_began_to_run_lately_is_new(tmp_path: Path, jobs: Jobs) -> None:
    with open_store(f"sqlite:///{tmp_path / 'began.sqlite'}") as store:
        store.sync_rooms([slug for slug in registry.rooms() if slug != "fna"])
        store.sync_rooms()
        with TestClient(create_app(store, jobs=jobs), base_url="http://localhost") as client:
            text = client.get("/").text
    new = re.findall(r'<a href="/papers/([^"]+)">[^<]+</a> <span class="new">', text)
    assert new == ["fna"]


def token(client: TestClient) -> str:
    found = re.search(r'name="csrf" value="([0-9a-f]+)"', client.get("/try").text)
    assert found is not None
    return found[1]


def upload(client: TestClient, model: str = "vit_tiny_patch16_224") -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), "navy").save(buffer, "PNG")
    answer = client.post(
        "/try",
        data={"model": model, "method": ["tome", "evit"], "budget": "mild", "csrf": token(client)},
        files={"picture": ("p.png", buffer.getvalue(), "image/png")},
        follow_redirects=False,
    )
    assert answer.status_code == 303, answer.text
    return str(answer.headers["location"])


def test_upload_progress_result(client: TestClient) -> None:
    place = upload(client)
    told = []
    with client.stream("GET", f"{place}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith("data: "):
                told.append(json.loads(line[6:]))
    assert [e["step"] for e in told if "step" in e] == ["begun", "half"]
    assert told[-1]["state"] == "done" and "result" not in told[-1]
    text = client.get(place).text
    assert "What the methods did to your picture" in text
    picture = re.search(rf'src="({re.escape(place)}/plain\.webp)"', text)
    assert picture is not None and client.get(picture[1]).headers["content-type"] == "image/webp"
    assert client.get(f"{place}/picture.png").status_code == 200
    assert client.get(f"{place}/result.json").status_code == 404


def test_a_stream_goes_on_where_it_was_broken_off(client: TestClient) -> None:
    place = upload(client)
    whole = client.get(f"{place}/events").text
    rest = client.get(f"{place}/events", headers={"last-event-id": "1"}).text
    assert whole.count("id: ") - rest.count("id: ") == 2 and whole.endswith(rest)


def test_a_job_is_cancelled_by_its_button(client: TestClient, jobs: Jobs) -> None:
    place = upload(client)
    job = jobs.submit({"model": "slow", "methods": ["tome"], "budget": "mild", "picture": "p"})
    assert "Cancel" in client.get(f"/jobs/{job.id}").text
    client.post(f"/jobs/{job.id}/cancel", data={"csrf": token(client)})
    end = time.monotonic() + 60
    while not job.over and time.monotonic() < end:
        time.sleep(0.05)
    assert job.state == "cancelled"
    assert "Cancelled" in client.get(f"/jobs/{job.id}").text and place


def test_errors_are_pages_for_people_and_json_for_programs(client: TestClient) -> None:
    page = client.get("/papers/none", headers={"accept": "text/html"})
    assert page.status_code == 404 and "<h1>Nothing is here</h1>" in page.text
    assert client.get("/papers/none").json() == {"detail": "no paper has this name here"}
    assert client.get("/entries/123456").status_code == 404
    assert client.get("/?before=0").status_code == 422
    assert client.get("/?before=4000").status_code == 404


def test_generated_requests_find_no_error_of_the_server(app: Any) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="generates the requests")
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers={"host": "localhost"})
    headers = {"host": "localhost"}
    with TestClient(app, base_url="http://localhost") as client:
        # behind the check of the token too: half of the requests carry a good one
        good = {"x-csrf-token": token(client)}
        good["cookie"] = f"transom_session={client.cookies['transom_session']}"
    seen: dict[int, int] = {}

    for operation in schema.get_all_operations():

        @settings(
            max_examples=8,
            deadline=None,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.ok().as_strategy())
        def call(case: Any) -> None:
            for extra in ({}, good):
                answer = case.call(headers={**headers, **extra})
                seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
                assert answer.status_code < 500, (case.path, answer.status_code, answer.text[:300])

        call()
    assert seen.get(200, 0) > 20 and seen.get(403, 0) > 5, seen
