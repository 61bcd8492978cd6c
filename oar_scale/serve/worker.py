"""The one thread that the model runs in: it takes jobs from the queue into a running batch, and sends home what happens.

    event loop --submit--> queue --begin--> drawings --add--> ContinuousBatch --step--> cells --> events  --> event loop
                                                                             --done--> codes --decode--> pixels
                                                                      other threads:  pixels --PNG--> results --> event loop

Images of different jobs share each pass. A fault that one job causes ends that job; a fault of a whole pass ends those that took part.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from oar_scale.generation.continuous import ContinuousBatch, Progress
from oar_scale.generation.editing import decoded
from oar_scale.generation.pretrained import Pretrained
from oar_scale.serve.api_errors import ApiError, bad_request, full, of_exception
from oar_scale.serve.jobs import Data, Job, Kind
from oar_scale.serve.limits import Limits
from oar_scale.serve.metrics import ServeMetrics
from oar_scale.serve.pictures import Drawn, finished, preview
from oar_scale.serve.tasks import Start, Task, begin

log = logging.getLogger(__name__)

T = TypeVar("T")
ASIDE_THREADS = 2
"""Decode uploads and write PNGs."""
_IDLE_S = 0.5
GATHER_PASSES = 3
"""For so many passes those that follow images that have left are waited for: images that join together cost less than one by one."""


@dataclass
class _Image:
    """An image of a job that is being drawn."""

    job: Job
    row: int
    """Its place among the images of the job."""
    start: Start
    codes: list[int]
    """Of all cells, 0 where there is none yet."""
    order: list[int]
    """Cells placed so far, known ones first."""
    scores: list[float]
    due: list[int]
    """Numbers of placed cells at which a preview is due."""


@dataclass
class _Running:
    """A job whose images are waiting for slots, or have some."""

    job: Job
    coming: deque[_Image]
    left: int
    """Images whose codes are not all there."""


class Worker:
    """Runs the model; see the module. ``submit`` and ``stop`` are called in the event loop."""

    def __init__(self, drawer: Pretrained, slots: int, limits: Limits, metrics: ServeMetrics) -> None:
        self.drawer, self.slots, self.limits, self.metrics = drawer, slots, limits, metrics
        self._batch = ContinuousBatch(drawer.model, slots)
        self._images: dict[int, _Image] = {}
        self._running: list[_Running] = []
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._end = False
        self._news: list[Callable[[], None]] = []
        self._aside = ThreadPoolExecutor(ASIDE_THREADS, "pictures")
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._beat = time.monotonic()
        self._left, self._gather_until = 0, 0.0
        """Images that have left since others joined, and how long their followers are waited for."""
        self.upload_bytes = 0
        """Of the pictures of jobs that have not ended; counted in the event loop."""

    def start(self) -> None:
        """Begin to work; called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def aside(self, work: Callable[[], T]) -> T:
        """Do what takes time, and runs no network, in a thread of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._aside, work)

    def submit(self, job: Job) -> int:
        """Put a job into the queue.

        Returns:
            How many are before it.

        Raises:
            ApiError: the queue is full.
        """
        with self._changed:
            waiting = len(self._queue)
            if waiting >= self.limits.queue_jobs:
                raise full(f"{waiting} jobs are waiting already: try again later")
            if self.upload_bytes + job.upload_bytes > self.limits.queue_bytes:
                raise full(f"the pictures of waiting jobs take {self.upload_bytes} bytes already: try again later")
            self.upload_bytes += job.upload_bytes
            job.at_end = self._ended
            self._queue.append(job)
            self._changed.notify()
        return waiting

    def _ended(self, job: Job) -> None:
        """In the event loop: a job has ended."""
        self.upload_bytes -= job.upload_bytes
        how = "done" if job.error is None else job.error.code if job.error.code in ("cancelled", "timeout") else "error"
        self.metrics.jobs.labels(job.kind, how).inc()
        self.metrics.job_seconds.labels(job.kind).observe(time.monotonic() - job.asked)

    def stop_job(self, job: Job, why: ApiError) -> None:
        """End a job now. Its slots are free after the pass that is under way."""
        job.over = why
        job.fail(why)
        with self._changed:
            self._changed.notify()

    def close(self, wait_s: float) -> bool:
        """End the thread after the pass that is under way. Returns whether it has ended in time."""
        with self._changed:
            self._end = True
            self._changed.notify()
        self._thread.join(wait_s)
        self._aside.shutdown(wait=False, cancel_futures=True)
        return self.ended

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._queue)

    @property
    def busy(self) -> int:
        """Slots in use."""
        return len(self._images)

    @property
    def ended(self) -> bool:
        """Whether the thread draws no more."""
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """Whether the thread works, and is in no single pass for minutes."""
        return not self.ended and (not self._images or time.monotonic() - self._beat < self.limits.job_s)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._end or self._queue or self._running):
                    self._changed.wait(_IDLE_S)
                if self._end:
                    return
            self._beat = time.monotonic()
            try:
                self._drop()
                if not self._gathering():
                    self._admit()
                self._step()
            except Exception as error:
                self._lose_batch(error)
            self._send_news()

    def _drop(self) -> None:
        """Let go of jobs that are over."""
        with self._changed:
            gone = [job for job in self._queue if job.over is not None]
            for job in gone:
                self._queue.remove(job)
        if gone:
            self._tell_places()
        for name, image in list(self._images.items()):
            if image.job.over is not None:
                self._batch.remove(name)
                del self._images[name]
        self._running = [each for each in self._running if each.job.over is None]

    def _gathering(self) -> bool:
        """Whether newcomers wait for others. Where no image is being drawn, the thread does, too."""
        with self._changed:
            coming = sum(job.images for job in self._queue) + sum(len(each.coming) for each in self._running)
            wait_s = self._gather_until - time.monotonic()
            if self._left < 2 or coming >= self._left or wait_s <= 0:
                return False
            if not self._batch.busy and not self._end:
                self._changed.wait(wait_s)
        return True

    def _admit(self) -> None:
        """Fill free slots: with the next images of jobs that have begun, then with the next jobs."""
        self._left = 0
        while self._batch.free:
            running = next((each for each in self._running if each.coming), None)
            if running is not None:
                self._add(running.coming.popleft())
                continue
            with self._changed:
                if not self._queue:
                    return
                job = self._queue.popleft()
            self._tell_places()
            if job.over is None:
                self._begin(job)

    def _begin(self, job: Job) -> None:
        self.metrics.queue_seconds.observe(time.monotonic() - job.asked)
        try:
            starts = begin(self.drawer, job.task)
        except Exception as error:  # of this job alone
            self._fail(job, error)
            return
        cells = self.drawer.model.spec.cells
        self._tell(job, "start", {"cells": cells, "known": [sorted(start.known) for start in starts]})
        images = deque[_Image]()
        for row, start in enumerate(starts):
            codes = [0] * cells
            for cell, code in zip(start.known, start.codes, strict=True):
                codes[cell] = code
            known, previews = len(start.known), job.task.previews
            due = [known + (cells - known) * part // (previews + 1) for part in range(previews, 0, -1)]
            images.append(_Image(job, row, start, codes, list(start.known), [0.0] * known, due))
        self._running.append(_Running(job, images, len(images)))

    def _add(self, image: _Image) -> None:
        try:
            name = self._batch.add(image.start.drawing)
        except ValueError as error:
            self._fail(image.job, bad_request(str(error)))
        except Exception as error:  # of this job alone
            self._fail(image.job, error)
        else:
            self._images[name] = image

    def _step(self) -> None:
        if not self._batch.busy:
            return
        started = time.perf_counter()
        progress = self._batch.step()
        pass_s = time.perf_counter() - started
        self.metrics.pass_seconds.observe(pass_s)
        self.metrics.passes.inc()
        self.metrics.cells.inc(sum(len(each.cells) for each in progress))
        done, due = list[_Image](), list[_Image]()
        for each in progress:
            image = self._images[each.id]
            if each.done is not None or each.failed is not None:
                del self._images[each.id]
            if each.failed is not None:
                self._fail(image.job, each.failed)
            if image.job.over is not None:
                continue
            self._place(image, each)
            if each.done is not None:
                done.append(image)
            elif image.due and len(image.order) >= image.due[-1]:
                image.due = [place for place in image.due if place > len(image.order)]
                due.append(image)
        if done:
            self._left, self._gather_until = self._left + len(done), time.monotonic() + GATHER_PASSES * pass_s
        for work, images in ((self._preview, due), (self._decode, done)):
            try:
                work(images)
            except Exception as error:  # of these images alone
                for image in images:
                    self._fail(image.job, error)

    def _place(self, image: _Image, progress: Progress) -> None:
        for cell, code in zip(progress.cells, progress.codes, strict=True):
            image.codes[cell] = code
        image.order += progress.cells
        image.scores += progress.scores
        if image.job.watched:
            about = {"cells": progress.cells, "scores": progress.scores, "placed": len(image.order), "total": len(image.codes)}
            self._tell(image.job, "step", {"image": image.row, **about})

    def _preview(self, images: list[_Image]) -> None:
        if not images:
            return
        for image, image_3SS in zip(images, self._pixels(images), strict=True):
            placed_N = torch.zeros(len(image.codes), dtype=torch.bool)
            placed_N[image.order] = True
            self._tell(image.job, "preview", {"image": image.row, "url": preview(image_3SS, placed_N)})

    def _decode(self, images: list[_Image]) -> None:
        """Images whose codes are all there become pixels here, and PNGs in another thread."""
        if not images:
            return
        pixels = self._pixels(images)
        self._send_news()  # of the last cells, before the end
        for image, image_3SS in zip(images, pixels, strict=True):
            drawn = Drawn(image_3SS, image.row, image.start.drawing.number, image.order, image.scores, len(image.start.known))
            running = next(each for each in self._running if each.job is image.job)
            running.left -= 1
            if not running.left:
                self._running.remove(running)
            self._aside.submit(self._finish, image.job, image.job.task, drawn)

    def _pixels(self, images: list[_Image]) -> list[Tensor]:
        """The images' codes as pixels on the CPU, [3, S, S] each."""
        assert self.drawer.vq is not None, "the server checks it"
        device = images[0].start.drawing.condition_TD.device
        return list(decoded(self.drawer.vq, torch.tensor([image.codes for image in images], device=device)))

    def _finish(self, job: Job, task: Task, drawn: Drawn) -> None:
        """In a thread of its own: the PNG of an image."""
        try:
            result = finished(self.drawer, task, drawn)
        except Exception as error:
            job.over = of_exception(error)
            self._call(partial(job.fail, job.over))
        else:
            self.metrics.images.labels(task.kind).inc()
            self._call(partial(job.image_done, drawn.row, result))

    def _fail(self, job: Job, error: Exception) -> None:
        job.over = of_exception(error)
        self._news.append(partial(job.fail, job.over))

    def _lose_batch(self, error: Exception) -> None:
        """A pass has failed: the jobs that have begun end, and their slots are free."""
        for running in self._running:
            self._fail(running.job, error)
        for name in self._images:
            with suppress(KeyError):  # one that this pass has finished
                self._batch.remove(name)
        self._images.clear()

    def _tell(self, job: Job, kind: Kind, data: Data) -> None:
        if job.watched:
            self._news.append(partial(job.happened, kind, data))

    def _tell_places(self) -> None:
        for place, job in enumerate(list(self._queue)):
            self._tell(job, "queued", {"position": place})

    def _send_news(self) -> None:
        if self._news:
            news, self._news = self._news, []
            self._call(lambda: [each() for each in news])

    def _call(self, work: Callable[[], object]) -> None:
        """Do something in the event loop."""
        assert self._loop is not None, "jobs come after start()"
        with suppress(RuntimeError):  # it was closed: nobody waits any more
            self._loop.call_soon_threadsafe(work)
