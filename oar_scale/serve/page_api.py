"""What the page speaks: ``/``, ``/api/model``, jobs with their events, images (see the package)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, FastAPI, Header, Response
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from fastapi.staticfiles import StaticFiles

from oar_scale.serve.api_errors import bad_request
from oar_scale.serve.jobs import Job
from oar_scale.serve.pictures import IMAGES
from oar_scale.serve.requests import EDIT_FIELDS, JobAsk, from_data_url
from oar_scale.serve.service import ModelInfo, Service
from oar_scale.serve.streams import check_streams, stream
from oar_scale.serve.tasks import Task
from oar_scale.serve.uploads import Upload, check_size

STATIC = Path(__file__).parent / "static"
PREVIEWS = 8
"""Of each image, while it is drawn."""


def add_page(app: FastAPI, service: Service) -> None:
    """Add the page's files and its part of the API."""
    api = APIRouter(tags=["page"])

    @api.get("/api/model")
    async def about() -> ModelInfo:
        """What is served: its prompts, its image size, its orders, its defaults, its limits."""
        return service.about()

    @api.post("/api/jobs", status_code=202)
    async def ask(asked: JobAsk) -> dict[str, str | int]:
        """Ask for images, or for parts of a picture to be drawn anew."""
        job, position = await service.submit(partial(_plan, service, asked), watched=True, keep=True)
        service.jobs.add(job)
        return {"id": job.id, "position": position}

    @api.get("/api/jobs/{name}/events", response_class=StreamingResponse)
    async def events(name: str, last_event_id: Annotated[int, Header(ge=-1)] = -1) -> StreamingResponse:
        """Server-sent events of a job, from its beginning, or from behind ``Last-Event-ID``."""
        job = service.jobs.get(name)
        check_streams(service)
        return stream(_lines(job, last_event_id), service)

    @api.delete("/api/jobs/{name}", status_code=204)
    async def cancel(name: str) -> Response:
        """Stop a job."""
        service.cancel(service.jobs.get(name))
        return Response(status_code=204)

    @api.get(IMAGES + "{name}.png", response_class=Response)
    async def image(name: str) -> Response:
        """A finished image, as PNG with a record of how it was drawn."""
        return Response(service.results.get(name), media_type="image/png", headers={"Cache-Control": "private, max-age=3600, immutable"})

    @api.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    app.include_router(api)
    app.mount("/static", StaticFiles(directory=STATIC, check_dir=False))


async def _lines(job: Job, after: int) -> AsyncIterator[bytes]:
    async for event in job.events(after):
        yield KEEPALIVE_COMMENT if event is None else format_sse_event(data_str=event.text, event=event.kind, id=str(event.id))


def _plan(service: Service, asked: JobAsk) -> Task:
    """Called in a thread of its own."""
    if asked.kind == "sample":
        if asked.image is not None or asked.mask is not None:
            raise bad_request("image and mask belong to edits: kind must be edit", "kind")
        for name in EDIT_FIELDS:
            if getattr(asked, name) != JobAsk.model_fields[name].default:
                raise bad_request(f"{name} belongs to edits: kind must be edit", name)
        return service.planner.sample(asked, asked.count, PREVIEWS)
    if asked.image is None:
        raise bad_request("an edit needs an image", "image")
    picture = from_data_url(asked.image, "image")
    mask = None if asked.mask is None else from_data_url(asked.mask, "mask")
    for data, name in ((picture, "image"), (mask, "mask")):
        check_size(data or b"", name, service.limits)
    upload = Upload(picture, mask, "white", "image", asked.strength < 1, service.limits, service.planner.size)
    return service.planner.edit(asked, [upload], asked.count, PREVIEWS)
