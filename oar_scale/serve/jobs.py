"""Jobs: what a request draws, and what of it has happened so far.

    queued --> start --> step ... preview ... --> done | error

All of a job but :attr:`Job.over` is read and changed where requests are served (the event loop); the worker sends it what happens.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from oar_scale.serve.api_errors import ApiError
from oar_scale.serve.limits import Limits
from oar_scale.serve.tasks import Task

Kind = Literal["queued", "start", "step", "preview", "done", "error"]
Data = Mapping[str, object]
_KEEP_ALIVE_S = 15.0


@dataclass(frozen=True)
class Event:
    """Something that happened."""

    id: int
    kind: Kind
    data: Data

    @property
    def text(self) -> str:
        """Its data as JSON."""
        return json.dumps(self.data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


@dataclass(frozen=True)
class Result:
    """An image that is finished."""

    id: str
    """Under which it can be fetched."""
    png: bytes
    size: str
    """Of the picture, as in 32x32."""
    about: Data
    """What the event ``done`` says of it."""


class ResultStore:
    """Finished images, the newest ones, up to a number of bytes."""

    def __init__(self, limit: int) -> None:
        self._pngs: OrderedDict[str, bytes] = OrderedDict()
        self._limit = limit
        self.bytes = 0

    def add(self, result: Result) -> None:
        """Keep an image; the oldest go."""
        self._pngs[result.id] = result.png
        self.bytes += len(result.png)
        while self.bytes > self._limit and len(self._pngs) > 1:
            _, png = self._pngs.popitem(last=False)
            self.bytes -= len(png)

    def get(self, name: str) -> bytes:
        """The PNG. Raises ApiError where it is not there, or not any more."""
        if name not in self._pngs:
            raise ApiError(404, f"there is no image {name!r}: the oldest ones are not kept", code="image_not_found")
        return self._pngs[name]


class Job:
    """One request: its task, its events, and its end."""

    def __init__(self, task: Task, limits: Limits, *, watched: bool, store: ResultStore | None = None) -> None:
        """Args:
        watched: somebody reads its events. Else they are not kept, but for the last.
        store: where its images go.
        """
        self.id, self.task, self.watched, self.store = secrets.token_urlsafe(12), task, watched, store
        self.images, self.kind = task.images, task.kind
        self.asked = time.monotonic()
        self.deadline = self.asked + limits.job_s
        self.over: ApiError | None = None
        """Why the worker is to stop it. Set in one thread, read in another."""
        self.results: list[Result] = []
        self.error: ApiError | None = None
        self.readers, self.last_read = 0, self.asked
        self.upload_bytes = sum(upload.bytes for upload in task.uploads)
        self.at_end: Callable[[Job], None] = lambda job: None
        """Called when it has ended."""
        self._done: dict[int, Result] = {}
        self._events: list[Event | None] = []
        self._previews: dict[object, int] = {}
        self._next = asyncio.Event()
        self._ended = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether it is done, or has failed."""
        return self._ended.is_set()

    def happened(self, kind: Kind, data: Data) -> None:
        """Note down an event. Of previews and places in the queue the last one is kept."""
        if self.ended:
            return
        if self.watched or kind in ("done", "error"):
            event = Event(len(self._events), kind, data)
            replaced = (kind, data.get("image")) if kind in ("queued", "preview") else None
            if replaced is not None:
                before = self._previews.get(replaced)
                if before is not None:
                    self._events[before] = None
                self._previews[replaced] = event.id
            self._events.append(event)
            waiting, self._next = self._next, asyncio.Event()
            waiting.set()
        if kind in ("done", "error"):
            self.task = replace(self.task, uploads=(), shown=())  # their memory is wanted elsewhere
            self._ended.set()
            self.at_end(self)

    def image_done(self, row: int, result: Result) -> None:
        """One of its images is finished; with the last one the job is done."""
        self._done[row] = result
        if len(self._done) < self.images or self.ended:
            return
        results = [self._done.pop(row) for row in range(self.images)]
        if self.store is not None:
            for each in results:
                self.store.add(each)
        if self.store is None or not self.watched:  # else they are fetched from the store
            self.results = results
        self.happened("done", {"images": [each.about for each in results]})

    def fail(self, error: ApiError) -> None:
        """It has failed, or was stopped."""
        if not self.ended:
            self.error = error
            self.happened("error", error.body)

    async def wait(self) -> list[Result]:
        """Its images, once it is done. Raises the ApiError that it ended with."""
        await self._ended.wait()
        if self.error is not None:
            raise self.error
        return self.results

    async def events(self, after: int = -1) -> AsyncIterator[Event | None]:
        """The events behind number ``after``, to the end; None where nothing has happened for a while."""
        self.readers += 1
        at = after + 1
        try:
            while True:
                while at < len(self._events):
                    event, at = self._events[at], at + 1
                    if event is not None:
                        yield event
                if self.ended:
                    return
                try:
                    await asyncio.wait_for(self._next.wait(), _KEEP_ALIVE_S)
                except TimeoutError:
                    yield None
        finally:
            self.readers -= 1
            self.last_read = time.monotonic()

    def abandoned(self, limits: Limits) -> bool:
        """Whether somebody was to read its events, and nobody has for long."""
        return self.watched and not self.ended and not self.readers and time.monotonic() - self.last_read > limits.abandoned_s


class JobTable:
    """The jobs whose events can be read, by their names: all that have not ended, and the last ones that have."""

    def __init__(self, limits: Limits) -> None:
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._limits = limits

    def add(self, job: Job) -> None:
        """Note down a job; the oldest that have ended are forgotten."""
        self._jobs[job.id] = job
        ended = [each for each in self._jobs.values() if each.ended]
        for each in ended[: max(0, len(ended) - self._limits.ended_jobs)]:
            del self._jobs[each.id]

    def get(self, name: str) -> Job:
        """Raises ApiError where there is none."""
        if name not in self._jobs:
            raise ApiError(404, f"there is no job {name!r}: it ended some time ago, or never was", code="job_not_found")
        return self._jobs[name]

    def unfinished(self) -> list[Job]:
        """Those that have not ended."""
        return [job for job in self._jobs.values() if not job.ended]
