"""Routes for trying: a picture goes in, methods are compared on it, and the result appears."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, HTTPException, Query, Request, UploadFile
from fastapi.responses import (
    FileResponse,
    HTMLResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.concurrency import run_in_threadpool

from transom.errors import GalleryError
from transom.gallery import trial
from transom.gallery.answers import page
from transom.gallery.charts import Chart, Drawn, Point, Series, draw
from transom.gallery.jobs import Job, Jobs
from transom.gallery.uploads import MAX_BYTES, MAX_PIXELS, read_picture

_BEAT = 10.0  # seconds after which a silent stream says that it is alive
_FIRST = ("evit", "pitome", "tome")  # chosen at first, where they are there


def trying_routes() -> APIRouter:
    """The routes; `app.state.jobs` does the work."""
    routes = APIRouter()
    routes.add_api_route("/try", form, methods=["GET"], response_class=HTMLResponse)
    routes.add_api_route("/try", begin, methods=["POST"], response_class=HTMLResponse)
    routes.add_api_route("/jobs/{identity}", show, methods=["GET"], response_class=HTMLResponse)
    routes.add_api_route("/jobs/{identity}/events", events, methods=["GET"])
    routes.add_api_route("/jobs/{identity}/cancel", cancel, methods=["POST"])
    routes.add_api_route("/jobs/{identity}/{name}", picture, methods=["GET"])
    return routes


def form(request: Request, method: Annotated[str, Query(max_length=80)] = "") -> HTMLResponse:
    """The form."""
    return _form(request, [method] if method in trial.methods() else [])


def _form(request: Request, chosen: list[str], status: int = 200, error: str = "") -> HTMLResponse:
    known = trial.methods()
    return page(
        request,
        "try.html.j2",
        status,
        here="try",
        models=trial.models(),
        methods=known,
        chosen=chosen or [slug for slug in _FIRST if slug in known],
        budgets=list(trial.BUDGETS),
        most=trial.MOST_METHODS,
        megabytes=MAX_BYTES // 2**20,
        megapixels=MAX_PIXELS // 10**6,
        error=error,
    )


async def begin(
    request: Request,
    picture: Annotated[UploadFile, File()],
    model: Annotated[str, Form(max_length=120)],
    method: Annotated[list[str], Form(max_length=16)],
    budget: Annotated[str, Form(max_length=20)] = "middle",
) -> Response:
    """Take the picture, and put the job into the queue."""
    jobs: Jobs = request.app.state.jobs
    data = await picture.read(MAX_BYTES + 1)
    try:
        await run_in_threadpool(trial.check, model, method, budget)
        image = await run_in_threadpool(read_picture, data)
        spec = {
            "model": model, "methods": list(dict.fromkeys(method)), "budget": budget,
            "picture": "picture.png",
        }  # fmt: skip
        job = await run_in_threadpool(
            jobs.submit, spec, lambda folder: image.save(folder / "picture.png")
        )
    except GalleryError as error:
        known = [slug for slug in method if slug in trial.methods()]
        return _form(request, known, 400, str(error))
    return RedirectResponse(f"/jobs/{job.id}", 303)


def show(request: Request, identity: str) -> HTMLResponse:
    """Progress of a job, or its result."""
    job = _job(request, identity)
    last = next((e for e in reversed(job.events) if "step" in e), None)
    ended = job.events[-1] if job.over and job.events else {}
    result: dict[str, Any] = ended.get("result", {})
    return page(
        request,
        "job.html.j2",
        here="try",
        job=job,
        last=last,
        says=ended.get("says", ""),
        result=result,
        drawn=_drawn(result["plot"]) if result else None,
    )


def _drawn(plot: dict[str, Any]) -> Drawn | None:
    """The comparison as a chart."""
    if len(plot["points"]) < 2:
        return None
    series = [
        Series(
            p["method"],
            [
                Point(
                    p["speedup"],
                    p["quality"],
                    f"{p['label']} {p['speedup']:.2f}×, {plot['quality']} {p['quality']:.4f}",
                    (p["spread"][0], p["spread"][1]) if p["spread"] else None,
                )
            ],
            quiet=p["method"] in ("plain", "random"),
        )
        for p in plot["points"]
    ]
    return draw(
        Chart(
            "Speed against fidelity",
            "measured speed-up (×)",
            plot["quality"],
            series,
            front=True,
            lower=plot["lower"],
        )
    )


async def events(request: Request, identity: str) -> Response:
    """What a job tells, as server-sent events; begins after the last one that was seen."""
    job = _job(request, identity)
    seen = request.headers.get("last-event-id", "")
    start = int(seen) + 1 if seen.isascii() and seen.isdigit() and len(seen) < 9 else 0
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(_stream(job, start), media_type="text/event-stream", headers=headers)


async def _stream(job: Job, start: int) -> AsyncIterator[str]:
    silent, at = 0.0, start
    while True:
        while at < len(job.events):
            told = {k: v for k, v in job.events[at].items() if k != "result"}
            yield f"id: {at}\ndata: {json.dumps(told)}\n\n"
            at, silent = at + 1, 0.0
        if job.over and at >= len(job.events):
            return
        await asyncio.sleep(0.1)
        silent += 0.1
        if silent > _BEAT:
            yield ": still here\n\n"
            silent = 0.0


def cancel(request: Request, identity: str) -> Response:
    """Stop a job."""
    job = _job(request, identity)
    jobs: Jobs = request.app.state.jobs
    jobs.cancel(job.id)
    return RedirectResponse(f"/jobs/{job.id}", 303)


def picture(request: Request, identity: str, name: str) -> Response:
    """A picture of a result, if the result names it."""
    job = _job(request, identity)
    if name == job.spec["picture"]:
        return FileResponse(job.folder / name, media_type="image/png")
    result = job.events[-1].get("result", {}) if job.over and job.events else {}
    known = {
        each["file"]
        for drawn in result.get("pictures", [])
        for each in (*drawn["frames"], *drawn["maps"])
    }
    if name not in known:
        raise HTTPException(404, "no picture of this job has that name")
    return FileResponse(
        job.folder / name,
        media_type="image/webp",
        headers={"cache-control": "private, max-age=600"},
    )


def _job(request: Request, identity: str) -> Job:
    jobs: Jobs = request.app.state.jobs
    job = jobs.get(identity)
    if job is None:
        raise HTTPException(404, "this job is not known, or its result was given up by now")
    return job
