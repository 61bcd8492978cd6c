"""What people send by mistake or on purpose: one clear error each, and the server goes on."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from foreign_shards import bomb
from PIL import Image
from served import SIDE, Served, box_mask, picture, png

PROMPT = {"prompt": "a red apple"}
WHOLE = (0, 0, SIDE, SIDE)


def data_url(image: Image.Image | bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image if isinstance(image, bytes) else png(image)).decode()}"


def check_refused(answer: Any, status: int, *says: str) -> None:
    error = answer.json()["error"]
    assert answer.status_code == status, answer.text
    assert set(error) == {"message", "type", "param", "code"} and error["type"]
    for words in says:
        assert words in error["message"], error["message"]


JOBS: dict[str, tuple[dict[str, Any], str]] = {
    "no-prompt": ({"prompt": None}, "prompt"),
    "empty": ({"prompt": " \n"}, "prompt is empty"),
    "long": ({"prompt": "\U0001f34e" * 10_000}, "10000 characters"),
    "list": ({"prompt": ["a"]}, "prompt"),
    "number": ({"prompt": 3}, "caption"),
    "true": ({"prompt": True}, "prompt"),
    "count-0": ({"count": 0}, "count"),
    "count-many": ({"count": 1000}, "the limit is 10"),
    "kind": ({"kind": "video"}, "kind"),
    "guidance-huge": ({"guidance": 1e308}, "guidance"),
    "temperature-tiny": ({"temperature": 1e-300}, "temperature"),
    "unknown": ({"colour": "red"}, "colour"),
    "guidance": ({"guidance": -1}, "guidance"),
    "text": ({"guidance": "much"}, "guidance"),
    "steps": ({"steps": 0}, "steps"),
    "order": ({"order": "<b>"}, "<b>"),
    "stored": ({"order": "stored"}, "halton"),
    "no-image": ({"kind": "edit"}, "needs an image"),
    "sample-image": ({"image": "data:,"}, "edit"),
    "sample-strength": ({"strength": 0.5}, "strength belongs to edits"),
    "sample-feather": ({"feather": 2}, "feather belongs to edits"),
}
IMAGES: dict[str, tuple[Any, Any, str]] = {
    "no-url": ("file:///etc/passwd", None, "data URL"),
    "damaged": ("data:image/png;base64,%%%", None, "base64"),
    "nothing": ("data:image/png;base64,", None, "cannot be read"),
    "text": (data_url(b"hello"), None, "cannot be read"),
    "cut": (data_url(png(picture(64, 64))[:500]), None, "cannot be read"),
    "huge": (data_url(bomb(20_000, 20_000)), None, "too many pixels, the limit is 16777216"),
    "no-mask": (data_url(picture()), None, "nothing says what is to be drawn"),
    "mask-size": (data_url(picture()), data_url(box_mask((0, 0, 5, 5), (20, 20))), "20 x 20"),
    "mask-huge": (data_url(picture()), data_url(bomb(20_000, 20_000)), "too many pixels, the limit is 16777216"),
    "mask-mode": (data_url(picture()), data_url(picture(seed=1)), "colours"),
    "mask-alpha": (data_url(picture()), data_url(box_mask((0, 0, 5, 5), openai=True)), "transparent"),
    "mask-empty": (data_url(picture()), data_url(Image.new("L", (SIDE, SIDE))), "nothing is marked"),
    "mask-full": (data_url(picture()), data_url(box_mask(WHOLE)), "whole picture"),
    "pixel-full": (data_url(picture(1, 1)), data_url(box_mask((0, 0, 1, 1), (1, 1))), "whole picture"),
    "pixel-empty": (data_url(picture(1, 1)), data_url(Image.new("L", (1, 1))), "nothing is marked"),
}


@pytest.mark.parametrize(("fields", "says"), JOBS.values(), ids=JOBS)
def test_jobs_that_cannot_be(server: Served, fields: dict[str, Any], says: str) -> None:
    with server.http() as client:
        check_refused(client.post("/api/jobs", json={**PROMPT, **fields}), 400, says)


@pytest.mark.parametrize(("image", "mask", "says"), IMAGES.values(), ids=IMAGES)
def test_pictures_that_cannot_be_edited(server: Served, image: str, mask: str | None, says: str) -> None:
    with server.http() as client:
        check_refused(client.post("/api/jobs", json={**PROMPT, "kind": "edit", "image": image, "mask": mask}), 400, says)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("{", "no JSON"),
        ("", "request"),
        ("[]", "request"),
        ('{"prompt": "x", "guidance": NaN}', "guidance"),
        ('{"prompt": "x", "temperature": Infinity}', "temperature"),
        ('{"prompt": "x", "seed": 1e400}', "seed"),
        ("[" * 100_000, "request"),
        ("\udcff".encode("utf-8", "surrogateescape"), "request"),
    ],
    ids=["cut", "nothing", "list", "nan", "infinity", "overflow", "deep", "bytes"],
)
def test_bodies_that_are_no_request(server: Served, body: str | bytes, says: str) -> None:
    with server.http() as client:
        for path in ("/api/jobs", "/v1/images/generations"):
            check_refused(client.post(path, content=body, headers={"Content-Type": "application/json"}), 400, says)


@pytest.mark.parametrize(
    ("files", "fields", "says"),
    [
        ({}, {}, "image is missing"),
        ({"image": png(picture())}, {}, "nothing says what is to be drawn"),
        ({"image": png(picture()), "mask": png(box_mask((0, 0, 4, 4)))}, {}, "nothing is marked"),
        ({"image": png(picture()), "mask": png(box_mask((0, 0, 4, 4), (9, 9), openai=True))}, {}, "9 x 9"),
        ({"image": png(picture()), "mask": png(box_mask(WHOLE, openai=True))}, {}, "whole picture"),
        ({"image": bomb(20_000, 20_000)}, {}, "too many pixels, the limit is 16777216"),
        ({"image": png(picture()), "mask": png(box_mask((0, 0, 4, 4), openai=True))}, {"size": "1024x1024"}, "12x12"),
        ({"image": png(picture())}, {"strength": "0"}, "strength"),
        ({"image": png(picture())}, {"n": "11", "strength": "0.5"}, "the limit is 10"),
    ],
    ids=["nothing", "no-mask", "opaque-mask", "mask-size", "full-mask", "huge", "size", "strength", "many"],
)
def test_edits_that_cannot_be(server: Served, files: dict[str, bytes], fields: dict[str, str], says: str) -> None:
    with server.http() as client:
        sent = files or {"unknown": b""}
        check_refused(client.post("/v1/images/edits", data={**PROMPT, **fields}, files=sent), 400, says if files else "")


def test_an_edit_is_sent_as_a_form_with_files(server: Served) -> None:
    with server.http() as client:
        check_refused(client.post("/v1/images/edits", json=PROMPT), 400, "multipart/form-data")
        check_refused(client.post("/v1/images/edits", data={**PROMPT, "image": "x"}, files={"mask": b"x"}), 400, "file")
        broken = {"Content-Type": "multipart/form-data; boundary=x"}
        check_refused(client.post("/v1/images/edits", content=b"--x\r\nrubbish", headers=broken), 400)


def test_a_stream_gives_no_addresses(server: Served) -> None:
    with server.http() as client:
        asked = {**PROMPT, "stream": True, "response_format": "url"}
        check_refused(client.post("/v1/images/generations", json=asked), 400, "response_format url comes without stream")


def test_one_pixel_can_be_drawn_anew(server: Served) -> None:
    fields = {"kind": "edit", "image": data_url(picture(1, 1)), "strength": 0.5}
    with server.http() as client:
        assert client.post("/api/jobs", json={**PROMPT, **fields}).status_code == 202


@pytest.mark.parametrize("path", ["/api/jobs/none/events", "/api/images/none.png", "/nowhere", "/v1/nowhere", "/static/../app.py"])
def test_what_is_not_there_says_so(server: Served, path: str) -> None:
    with server.http() as client:
        check_refused(client.get(path), 404)
        check_refused(client.patch("/v1/models"), 405)


def test_large_requests_are_refused_before_they_are_read(server: Served) -> None:
    with server.http() as client:
        check_refused(client.post("/api/jobs", content=iter([b" " * (1 << 20)] * 40), headers={"Content-Type": "application/json"}), 413)
        large = data_url(bytes(11 << 20))
        check_refused(client.post("/api/jobs", json={**PROMPT, "kind": "edit", "image": large}), 413, "image has", "10485760")
        check_refused(client.post("/v1/images/edits", data=PROMPT, files={"image": bytes(11 << 20)}), 413, "image has")


def test_a_form_with_many_fields_is_refused(server: Served) -> None:
    with server.http() as client:
        fields = {f"field{number}": "x" for number in range(200)}
        check_refused(client.post("/v1/images/edits", data=fields, files={"image": png(picture())}), 400, "fields")


def test_the_description_of_the_api_names_its_parts(server: Served) -> None:
    with server.http() as client:
        paths = json.loads(client.get("/openapi.json").text)["paths"]
        assert {"/api/jobs", "/api/model", "/v1/images/generations", "/v1/images/edits", "/healthz", "/metrics"} <= set(paths)
        for path in ("/docs", "/redoc"):
            check_refused(client.get(path), 404)
