"""What clients of OpenAI's API speak: ``/v1/models``, ``/v1/images/generations``, ``/v1/images/edits``.

Settings of ours go beside theirs (``extra_body`` in OpenAI's Python client). What a request leaves out is as the model's recipe says.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Literal

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.datastructures import FormData, UploadFile

from oar_scale.data.images import image_size
from oar_scale.serve.api_errors import ApiError, bad_request
from oar_scale.serve.guard import body_was_read
from oar_scale.serve.jobs import Job, Result
from oar_scale.serve.requests import DATA_URL, EditAsk, GenerationAsk
from oar_scale.serve.service import Service
from oar_scale.serve.streams import check_streams, stream
from oar_scale.serve.tasks import Task, prompt_kind
from oar_scale.serve.uploads import Upload, check_size

Ask = GenerationAsk | EditAsk
Kind = Literal["image_generation", "image_edit"]
_FIELDS = 64
_FILES = ("image", "image[]", "mask")
_USAGE = {"input_tokens": 0, "input_tokens_details": {"image_tokens": 0, "text_tokens": 0}, "output_tokens": 0, "total_tokens": 0}
"""Clients expect it. Nothing is counted here."""
_FORM: dict[str, object] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "allOf": [
                        EditAsk.model_json_schema(),
                        {
                            "type": "object",
                            "required": ["image"],
                            "properties": {
                                "image": {"type": "array", "items": {"type": "string", "format": "binary"}},
                                "mask": {"type": "string", "format": "binary"},
                            },
                        },
                    ]
                }
            }
        },
    }
}
_LARGE = 1 << 18
"""Bytes of images from which on they are put into base64 in another thread."""


def add_openai(app: FastAPI, service: Service) -> None:
    """Add OpenAI's part of the API."""
    api = APIRouter(prefix="/v1", tags=["OpenAI"])
    model = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "oar_scale"}

    @api.get("/models")
    async def models() -> dict[str, object]:
        """The one model that is served."""
        return {"object": "list", "data": [model]}

    @api.get("/models/{name:path}")
    async def one_model(name: str) -> dict[str, object]:
        """The model of this name."""
        _check_model(service, name)
        return model

    @api.post("/images/generations", response_class=Response)
    async def generations(asked: GenerationAsk, request: Request) -> Response:
        """Draw images from a prompt."""
        _check_model(service, asked.model)
        _check_size(asked, f"{service.planner.size}x{service.planner.size}")
        plan = partial(service.planner.sample, asked, asked.n or 1, _previews(asked))
        return await _answer(service, asked, request, plan, "image_generation")

    @api.post("/images/edits", response_class=Response, openapi_extra=_FORM)
    async def edits(request: Request) -> Response:
        """Draw the fully transparent parts of a mask anew, or of the images themselves."""
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise bad_request("an edit is sent as multipart/form-data, with its files")
        async with request.form(max_files=service.limits.images_per_request + 1, max_fields=_FIELDS) as form:
            asked, uploads = await _read_form(service, form)
        _check_model(service, asked.model)
        plan = partial(_plan_edit, service, asked, uploads)
        return await _answer(service, asked, request, plan, "image_edit")

    app.include_router(api)


async def _answer(service: Service, asked: Ask, request: Request, plan: Callable[[], Task], kind: Kind) -> Response:
    """Draw, and answer with the images, or with events on the way to them."""
    if asked.stream:
        if asked.response_format == "url":
            raise bad_request("response_format url comes without stream: a stream has its images in it", "response_format")
        check_streams(service)
        job, _ = await service.submit(plan, watched=True, keep=False)
        body_was_read(request.scope)
        return stream(_events(service, job, kind), service)
    by_url = asked.response_format == "url"
    job, _ = await service.submit(plan, watched=False, keep=by_url)
    body_was_read(request.scope)
    await service.outcome(job, request)
    base = str(request.base_url).rstrip("/") if by_url else None
    encode = partial(_images, job.results, base)
    large = base is None and sum(len(result.png) for result in job.results) > _LARGE
    return Response(await service.worker.aside(encode) if large else encode(), media_type="application/json")


def _images(results: Sequence[Result], base: str | None) -> bytes:
    """The answer, as JSON."""
    data = []
    for result in results:
        where = {"b64_json": base64.b64encode(result.png).decode()} if base is None else {"url": f"{base}{result.about['url']}"}
        data.append({**where, "seed": result.about["seed"], "number": result.about["number"]})
    body = {"created": int(time.time()), "data": data, "output_format": "png", "size": results[0].size}
    return json.dumps(body).encode()


async def _events(service: Service, job: Job, kind: Kind) -> AsyncIterator[bytes]:
    """The job's previews and images as OpenAI's events. The job ends where nobody reads on."""
    about = {"background": "auto", "output_format": "png", "quality": "auto"}
    square = f"{service.planner.size}x{service.planner.size}"
    parts: dict[object, int] = {}
    try:
        async for event in job.events():
            if event is None:
                yield KEEPALIVE_COMMENT
            elif event.kind == "preview":
                image = event.data["image"]
                index = parts[image] = parts.get(image, -1) + 1
                url = str(event.data["url"])
                yield _event(f"{kind}.partial_image", b64_json=url.removeprefix(DATA_URL), partial_image_index=index, size=square, **about)
            elif event.kind == "error":
                yield format_sse_event(event="error", data_str=json.dumps({"error": event.data}))
        for result in job.results:
            yield _event(
                f"{kind}.completed",
                b64_json=base64.b64encode(result.png).decode(),
                size=result.size,
                usage=_USAGE,
                seed=result.about["seed"],
                number=result.about["number"],
                **about,
            )
    finally:
        service.cancel(job)


def _event(kind: str, **data: object) -> bytes:
    return format_sse_event(event=kind, data_str=json.dumps({"type": kind, "created_at": int(time.time()), **data}))


async def _read_form(service: Service, form: FormData) -> tuple[EditAsk, list[Upload]]:
    """The fields and files of an edit. Raises ApiError and ValidationError for what they should not be."""
    fields: dict[str, object] = {name: value for name, value in form.items() if name not in _FILES}
    if prompt_kind(service.drawer.model.spec) == "features":
        try:
            fields["prompt"] = json.loads(str(fields.get("prompt")))
        except ValueError as error:
            raise bad_request("prompt must be the features of a caption as JSON", "prompt") from error
    asked = EditAsk.model_validate(fields)
    pictures = [await _file(service, each, "image") for name in ("image", "image[]") for each in form.getlist(name)]
    masks = [await _file(service, each, "mask") for each in form.getlist("mask")]
    if not pictures or len(masks) > 1:
        raise bad_request("image is missing" if not pictures else "there can be one mask", "mask" if pictures else "image")
    mask, everywhere = masks[0] if masks else None, asked.strength < 1
    names = ["image"] if len(pictures) == 1 else [f"image {number}" for number in range(1, len(pictures) + 1)]
    return asked, [
        Upload(picture, mask, "transparent", name, everywhere, service.limits, service.planner.size)
        for picture, name in zip(pictures, names, strict=True)
    ]


async def _file(service: Service, file: UploadFile | str, name: str) -> bytes:
    if isinstance(file, str):
        raise bad_request(f"{name} must be a file", name)
    data = await file.read()
    check_size(data, name, service.limits)
    return data


def _plan_edit(service: Service, asked: EditAsk, uploads: Sequence[Upload]) -> Task:
    """Called in a thread of its own."""
    task = service.planner.edit(asked, uploads, asked.n or 1, _previews(asked))
    for upload in uploads:
        width, height = image_size(upload.picture, upload.name)
        _check_size(asked, f"{width}x{height}")
    return task


def _check_model(service: Service, name: str | None) -> None:
    if name not in (None, service.name):
        raise ApiError(404, f"there is no model {name!r}; this server has {service.name!r}", param="model", code="model_not_found")


def _check_size(asked: Ask, size: str) -> None:
    if asked.size not in (None, "auto", size):
        raise bad_request(f"size {asked.size!r}: the images have {size} here (leave size out, or send auto)", "size")


def _previews(asked: Ask) -> int:
    if asked.partial_images and not asked.stream:
        raise bad_request("partial_images come with stream: true", "partial_images")
    return asked.partial_images or 0
