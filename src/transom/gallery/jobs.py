"""Jobs in a process of their own: one at a time, cancellable, limited in time and memory.

The process is kept between jobs, so that libraries load once; it is ended, and started anew for the
next job, when a job is cancelled, takes too long or grows too large.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import os
import queue
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import psutil

from transom.errors import GalleryError, TransomError

logger = logging.getLogger(__name__)

State = Literal["waiting", "running", "done", "failed", "cancelled"]
OVER: tuple[State, ...] = ("done", "failed", "cancelled")
Emit = Callable[[dict[str, Any]], None]
WAITING = 8  # jobs that may wait
KEPT = 24  # finished jobs whose results are kept
_LOOK = 0.1  # seconds between looks at time, memory and wishes
_START = 120.0  # seconds in which a process has to start; libraries are large


@dataclass
class Job:
    """One job.

    Attributes:
        id: not to be guessed; whoever knows it may see the job.
        spec: what is to be done, plain values.
        folder: of its results.
        state: where it stands.
        events: everything that was told, in order; the last one of a finished job says how it
            ended.
        wanted: False once it is cancelled.
    """

    id: str
    spec: dict[str, Any]
    folder: Path
    state: State = "waiting"
    events: list[dict[str, Any]] = field(default_factory=list)
    wanted: bool = True

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.state in OVER


class Jobs:
    """A queue and the process behind it.

    Args:
        folder: for results; one folder a job is made in it.
        target: "module:function" that does a job: (spec, folder, emit) -> result, plain values.
        time_limit: seconds of one job.
        memory_limit: bytes of the process.
    """

    def __init__(
        self,
        folder: Path,
        target: str = "transom.gallery.trial:run",
        *,
        time_limit: float = 180.0,
        memory_limit: int = 6 * 2**30,
    ) -> None:
        self.folder, self.target = folder, target
        self.time_limit, self.memory_limit = time_limit, memory_limit
        self._jobs: dict[str, Job] = {}
        self._queue: queue.Queue[Job | None] = queue.Queue()
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._thread = threading.Thread(target=self._serve, name="gallery-jobs", daemon=True)
        self._closing = False
        self._thread.start()

    def submit(self, spec: dict[str, Any], prepare: Callable[[Path], None] | None = None) -> Job:
        """Put a job at the end of the queue.

        Args:
            spec: plain values for the target.
            prepare: puts files into the job's folder before it starts.

        Raises:
            GalleryError: too many jobs wait.
        """
        with self._lock:
            waiting = sum(job.state == "waiting" for job in self._jobs.values())
            if waiting >= WAITING:
                raise GalleryError(f"{waiting} jobs wait already; try again in a few minutes")
            identity = secrets.token_urlsafe(12)
            job = Job(identity, spec, self.folder / identity)
            job.folder.mkdir(parents=True)
            self._jobs[identity] = job
        if prepare is not None:
            try:
                prepare(job.folder)
            except BaseException:
                self._forget(job)
                raise
        self._tell(job, state="waiting", ahead=waiting)
        self._queue.put(job)
        self._evict()
        return job

    def get(self, identity: str) -> Job | None:
        """The job with this id, if it is still known."""
        return self._jobs.get(identity)

    def cancel(self, identity: str) -> None:
        """Stop a job that waits or runs; nothing happens to one that is over."""
        job = self._jobs.get(identity)
        if job is None or job.over:
            return
        job.wanted = False
        if job.state == "waiting":
            self._end(job, "cancelled", "cancelled before it began")

    def close(self) -> None:
        """End the process and every job."""
        self._closing = True
        for job in list(self._jobs.values()):
            self.cancel(job.id)
        self._queue.put(None)
        self._thread.join(timeout=10)
        self._stop()

    def _serve(self) -> None:
        while (job := self._queue.get()) is not None:
            if job.over:
                continue
            try:
                self._do(job)
            except Exception:
                logger.exception("job %s", job.id)
                self._end(job, "failed", "something went wrong here; it is in the log")
                self._stop()

    def _do(self, job: Job) -> None:
        if self._worker is None or not self._worker.process.is_alive():
            self._worker = _Worker(self.target)
        worker = self._worker
        job.state = "running"
        self._tell(job, state="running")
        worker.pipe.send((job.spec, str(job.folder)))
        began = time.monotonic()
        while True:
            reason: tuple[State, Any] | None = None
            if worker.pipe.poll(_LOOK):
                try:
                    kind, content = worker.pipe.recv()
                except (EOFError, OSError):
                    kind, content = "failed", "the process ended without an answer"
                    self._stop()
                if kind == "ready":  # what it took to start is not the job's time
                    worker.ready, began = True, time.monotonic()
                elif kind == "event":
                    self._tell(job, **content)
                else:
                    self._end(job, "done" if kind == "done" else "failed", content)
                    return
            else:
                reason = self._reason(job, worker, time.monotonic() - began)
            if reason is not None:
                self._stop()
                self._end(job, *reason)
                return

    def _reason(self, job: Job, worker: _Worker, seconds: float) -> tuple[State, str] | None:
        """Why a running job has to stop now."""
        if not job.wanted or self._closing:
            return "cancelled", "cancelled"
        if seconds > (self.time_limit if worker.ready else max(_START, self.time_limit)):
            return "failed", f"it took longer than {self.time_limit:g} seconds and was stopped"
        if worker.memory() > self.memory_limit:
            limit = self.memory_limit / 2**30
            return "failed", f"it needed more than {limit:.2g} GiB of memory and was stopped"
        if not worker.process.is_alive() and not worker.pipe.poll():
            return "failed", "the process ended without an answer"
        return None

    def _end(self, job: Job, state: State, says: Any) -> None:
        result = says if isinstance(says, dict) else {}
        job.state = state
        self._tell(job, state=state, **({"result": result} if result else {"says": str(says)}))

    def _tell(self, job: Job, **event: Any) -> None:
        job.events.append({"number": len(job.events), **event})

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.stop()
            self._worker = None

    def _evict(self) -> None:
        over = [job for job in self._jobs.values() if job.over]
        for job in over[: max(0, len(over) - KEPT)]:
            self._forget(job)

    def _forget(self, job: Job) -> None:
        self._jobs.pop(job.id, None)
        shutil.rmtree(job.folder, ignore_errors=True)


class _Worker:
    """The process, and the pipe to it."""

    def __init__(self, target: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, target), daemon=True)
        self.ready = False
        self.process.start()
        theirs.close()

    def memory(self) -> int:
        """Bytes that the process and its children hold."""
        with contextlib.suppress(psutil.Error):
            own = psutil.Process(self.process.pid)
            return sum(p.memory_info().rss for p in (own, *own.children(recursive=True)))
        return 0

    def stop(self) -> None:
        """End it at once; a job may be deep inside a library."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
        self.process.kill()
        self.process.join(timeout=5)
        self.pipe.close()


def _work(pipe: Connection, target: str) -> None:
    """What the process does: jobs, until nobody is there any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides when to end
    with contextlib.suppress(OSError, AttributeError):
        os.nice(5)
    module, _, name = target.partition(":")
    run = getattr(importlib.import_module(module), name)
    pipe.send(("ready", None))
    while True:
        try:
            spec, folder = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            result = run(spec, Path(folder), lambda event: pipe.send(("event", event)))
            pipe.send(("done", result))
        except TransomError as error:
            pipe.send(("failed", str(error)))
        except MemoryError:
            pipe.send(("failed", "there was not enough memory"))
        except Exception as error:
            logger.exception("job failed")
            pipe.send(("failed", f"{type(error).__name__}: {str(error)[:300]}"))
