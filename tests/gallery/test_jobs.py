"""Jobs run one at a time in a process, can be cancelled, and are stopped at their limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from transom.errors import GalleryError
from transom.gallery import trial
from transom.gallery.jobs import WAITING, Job, Jobs

SLOW = pytest.mark.slow  # every process takes seconds to start
TARGET = "tests.gallery.chores:run"


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Jobs]]:
    made: list[Jobs] = []

    def build(**limits: Any) -> Jobs:
        made.append(Jobs(tmp_path, TARGET, **limits))
        return made[-1]

    yield build
    for jobs in made:
        jobs.close()


def wait(job: Job, until: Callable[[Job], bool] = lambda job: job.over, seconds: float = 60) -> Job:
    end = time.monotonic() + seconds
    while not until(job):
        assert time.monotonic() < end, job.events
        time.sleep(0.02)
    return job


def process(job: Job) -> int:
    return next(e["process"] for e in job.events if "process" in e)


def test_a_job_tells_what_it_does_and_ends_with_its_result(make: Callable[..., Jobs]) -> None:
    jobs = make()
    job = wait(jobs.submit({"budget": "mild"}))
    assert job.state == "done"
    assert [e["number"] for e in job.events] == list(range(len(job.events)))
    assert [e["step"] for e in job.events if "step" in e] == ["begun", "half"]
    assert job.events[-1]["result"]["budget"] == "mild"
    assert (job.folder / "plain.webp").is_file()


def test_one_job_at_a_time_in_one_process_that_is_kept(make: Callable[..., Jobs]) -> None:
    jobs = make()
    first, second = jobs.submit({}), jobs.submit({})
    wait(second)
    assert first.state == second.state == "done"
    assert process(first) == process(second)


@pytest.mark.parametrize(
    ("chore", "limits", "says"),
    [
        ("slow", {"time_limit": 1.0}, "longer than 1 seconds"),
        ("dying", {}, "ended without an answer"),
        pytest.param("greedy", {"memory_limit": 3 * 2**29}, "GiB of memory", marks=SLOW),
        pytest.param("refusing", {}, "this model is not taken", marks=SLOW),
        pytest.param("broken", {}, "ValueError: a bug", marks=SLOW),
    ],
)
def test_a_job_that_goes_wrong_fails_alone(
    make: Callable[..., Jobs], chore: str, limits: dict[str, Any], says: str
) -> None:
    jobs = make(**limits)
    job = wait(jobs.submit({"model": chore}))
    assert job.state == "failed" and says in job.events[-1]["says"]
    assert wait(jobs.submit({})).state == "done"  # the next one is served


def test_a_running_job_is_cancelled_and_its_process_is_gone(make: Callable[..., Jobs]) -> None:
    jobs = make()
    job = jobs.submit({"model": "slow"})
    wait(job, lambda job: any("process" in e for e in job.events))
    number = process(job)
    jobs.cancel(job.id)
    assert wait(job, seconds=10).state == "cancelled"
    assert not psutil.pid_exists(number)


def test_a_waiting_job_is_cancelled_without_ever_running(make: Callable[..., Jobs]) -> None:
    jobs = make()
    running, waiting = jobs.submit({"model": "slow"}), jobs.submit({})
    jobs.cancel(waiting.id)
    assert waiting.state == "cancelled" and not any("step" in e for e in waiting.events)
    jobs.cancel(running.id)
    assert wait(running).state == "cancelled"


def test_the_queue_is_not_endless(make: Callable[..., Jobs]) -> None:
    jobs = make()
    running = jobs.submit({"model": "slow"})
    wait(running, lambda job: job.state == "running")
    for _ in range(WAITING):
        jobs.submit({})
    with pytest.raises(GalleryError, match="wait already"):
        jobs.submit({})


def test_a_job_that_cannot_be_prepared_leaves_nothing(
    make: Callable[..., Jobs], tmp_path: Path
) -> None:
    def broken(folder: Path) -> None:
        raise GalleryError("no room")

    with pytest.raises(GalleryError, match="no room"):
        make().submit({}, broken)
    assert list(tmp_path.iterdir()) == []


def test_closing_ends_the_process(make: Callable[..., Jobs]) -> None:
    jobs = make()
    job = jobs.submit({"model": "slow"})
    wait(job, lambda job: any("process" in e for e in job.events))
    jobs.close()
    assert job.state == "cancelled" and not psutil.pid_exists(process(job))


@pytest.mark.parametrize(
    ("model", "methods", "budget", "says"),
    [
        ("hf-hub:someone/something", ["tome"], "mild", "there is no model"),
        ("/etc/passwd", ["tome"], "mild", "there is no model"),
        ("saliency", ["tome", "none-such"], "mild", "none of them"),
        ("saliency", [], "mild", "choose one to"),
        ("saliency", ["tome"], "cheap", "expected mild"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_a_process_is_asked(
    model: str, methods: list[str], budget: str, says: str
) -> None:
    known = {"saliency": "", **trial.models()}
    assert model in known or "/" in model
    with pytest.raises(GalleryError, match=says):
        trial.check(model if model != "saliency" else "vit_tiny_patch16_224", methods, budget)


def test_a_comparison_on_a_small_model(tmp_path: Path) -> None:
    from PIL import Image

    picture = Image.linear_gradient("L").convert("RGB")
    picture.save(tmp_path / "picture.png")
    told: list[dict[str, Any]] = []
    spec = {
        "model": "transom/digits-vit", "methods": ["tome", "evit"], "budget": "strong",
        "picture": "picture.png",
    }  # fmt: skip
    found = trial.run(spec, tmp_path, told.append)
    assert [p["method"] for p in found["pictures"]] == ["plain", "tome", "evit"]
    assert [row[0][0] for row in found["table"]["rows"]] == ["plain", "tome", "evit"]
    tome = found["pictures"][1]
    assert len(tome["frames"]) == 4 and len(tome["maps"]) == 1
    files = [f["file"] for p in found["pictures"] for f in (*p["frames"], *p["maps"])]
    assert all((tmp_path / file).stat().st_size > 100 for file in files)
    assert [e["done"] for e in told] == sorted(e["done"] for e in told)
    assert told[-1]["done"] == told[-1]["total"]
