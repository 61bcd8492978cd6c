"""What requests share: the model and its worker, the jobs and their results."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import Request
from pydantic import BaseModel

from oar_scale.generation.pretrained import Pretrained
from oar_scale.model.spec import ClassSpec
from oar_scale.serve.api_errors import ApiError, full
from oar_scale.serve.jobs import Job, JobTable, ResultStore
from oar_scale.serve.limits import Limits
from oar_scale.serve.metrics import ServeMetrics
from oar_scale.serve.tasks import Planner, PromptKind, Task, prompt_kind, usable_orders
from oar_scale.serve.worker import Worker

_LOOK_S = 0.5
_END_S = 5.0
_RESTART_S = 10.0


class ModelDefaults(BaseModel):
    """Settings of the model's own recipe."""

    guidance: float
    temperature: float
    top_k: int
    top_p: float
    order: str
    steps: int | None


class ModelLimits(BaseModel):
    """Those that a client should know."""

    prompt_characters: int
    images_per_request: int
    upload_bytes: int
    pixels: int


class ModelInfo(BaseModel):
    """``GET /api/model``."""

    name: str
    prompt_kind: PromptKind
    classes: int | None
    image_size: int
    grid: int
    orders: list[str]
    edits: bool
    defaults: ModelDefaults
    limits: ModelLimits


class Service:
    """One served model."""

    def __init__(self, drawer: Pretrained, name: str, slots: int, limits: Limits) -> None:
        """``drawer`` has an image tokenizer and a prompt encoder; ``name`` is that of the model for clients."""
        self.drawer, self.name, self.limits = drawer, name, limits
        self.orders = usable_orders(drawer)
        _ = drawer.ids  # reads all of the model's file, once
        self.planner = Planner(drawer, limits, self.orders)
        self.metrics = ServeMetrics()
        self.worker = Worker(drawer, slots, limits, self.metrics)
        self.jobs, self.results = JobTable(limits), ResultStore(limits.results_bytes)
        self.streams = 0
        self.stopping = False
        self._unfinished: set[Job] = set()
        show = self.metrics.show
        show("queue_length", "Jobs waiting for a slot.", lambda: self.worker.waiting)
        show("busy_slots", "Slots in use.", lambda: self.worker.busy)
        show("slots", "Slots of the batch.", lambda: slots)
        show("event_streams", "Event streams that are open.", lambda: self.streams)
        show("result_bytes", "Bytes of the images that can be fetched.", lambda: self.results.bytes)
        show("upload_bytes", "Bytes of the pictures of jobs that have not ended.", lambda: self.worker.upload_bytes)

    def about(self) -> ModelInfo:
        """What the page needs to know of the model."""
        spec, defaults, limits = self.drawer.model.spec, self.drawer.settings(), self.limits
        return ModelInfo(
            name=self.name,
            prompt_kind=prompt_kind(spec),
            classes=spec.condition.classes if isinstance(spec.condition, ClassSpec) else None,
            image_size=self.planner.size,
            grid=spec.grid,
            orders=self.orders,
            edits=spec.layout != "raster",
            defaults=ModelDefaults(
                guidance=defaults.guidance,
                temperature=defaults.temperature,
                top_k=defaults.top_k,
                top_p=defaults.top_p,
                order=self.planner.default_order,
                steps=defaults.steps,
            ),
            limits=ModelLimits(
                prompt_characters=limits.prompt_characters,
                images_per_request=limits.images_per_request,
                upload_bytes=limits.upload_bytes,
                pixels=limits.pixels,
            ),
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While requests are served."""
        self.worker.start()
        looking = asyncio.create_task(self._look_after())
        try:
            yield
        finally:
            looking.cancel()
            self._stop_all()
            await asyncio.to_thread(self.worker.close, _END_S)

    async def submit(self, plan: Callable[[], Task], *, watched: bool, keep: bool) -> tuple[Job, int]:
        """Put what a request asks for into the queue.

        Args:
            plan: makes the task; called in a thread of its own.
            watched: somebody reads the job's events.
            keep: its images can be fetched later.

        Returns:
            The job, and how many are before it.

        Raises:
            ApiError, UserError: as ``plan``; the queue is full, or the server is being stopped.
        """
        if self.stopping:
            raise _stopped()
        if self.worker.ended:
            raise ApiError(503, "the thread that draws has ended: the server has to be started again", code="not_ready")
        if self.worker.waiting >= self.limits.queue_jobs:  # before a picture is decoded in vain
            raise full(f"{self.worker.waiting} jobs are waiting already: try again later")
        task = await self.worker.aside(plan)
        job = Job(task, self.limits, watched=watched, store=self.results if keep else None)
        position = self.worker.submit(job)
        self._unfinished.add(job)
        job.happened("queued", {"position": position})
        return job, position

    async def outcome(self, job: Job, request: Request) -> None:
        """Wait for a job's end; it is stopped where the client does not wait any more. Raises the ApiError that it ended with."""
        waiting = {asyncio.create_task(job.wait()), asyncio.create_task(_left(request))}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waiting:
                each.cancel()
            self.cancel(job)
        await job.wait()

    def cancel(self, job: Job) -> None:
        """Stop a job, if it has not ended."""
        if not job.ended:
            self.worker.stop_job(job, ApiError(499, "the client cancelled it, or went away", code="cancelled"))

    async def drain(self) -> None:
        """Take no more jobs, give the others time to end, and stop those that have not."""
        self.stopping = True
        end = asyncio.get_running_loop().time() + self.limits.drain_s
        while self._still_unfinished() and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.05)
        self._stop_all()

    def _stop_all(self) -> None:
        self.stopping = True
        for job in self._still_unfinished():
            self.worker.stop_job(job, _stopped())

    def _still_unfinished(self) -> set[Job]:
        self._unfinished = {job for job in self._unfinished if not job.ended}
        return self._unfinished

    async def _look_after(self) -> None:
        """Stop jobs that take too long, or that nobody waits for. Here and not in the worker, where a pass may hang."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for job in self._still_unfinished():
                if job.abandoned(self.limits):
                    self.cancel(job)
                elif time.monotonic() > job.deadline:
                    text = f"the job took longer than {self.limits.job_s:g} s, waiting included"
                    self.worker.stop_job(job, ApiError(504, text, code="timeout"))


def _stopped() -> ApiError:
    return ApiError(503, "the server is being stopped", code="server_stopped", retry_after_s=_RESTART_S)


async def _left(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
