"""What the page asks ``oar serve`` for: jobs, their events, images."""

from __future__ import annotations

import base64
import json
import socket
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
from served import CAPTIONS, GRID, SIDE, Served, box_mask, job_events, load, open_png, picture, png, read_events, served
from waiting import wait_until

from oar_scale.generation.picture_files import read_record
from oar_scale.generation.pretrained import Pretrained
from oar_scale.text import clean_text

CELLS = GRID**2
PROMPTS = [
    "<script>alert(1)</script>",
    "ein roter Apfel \U0001f34e",
    "\u200f\u05ea\u05e4\u05d5\u05d7 \u05d0\u05d3\u05d5\u05dd",
    "\u7ea2\u82f9\u679c",
    "a\u0301\u0000\ud83d b",
    "'; DROP TABLE images; --",
]


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def ask(client: httpx.Client, **fields: object) -> str:
    answer = client.post("/api/jobs", json=fields)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def test_the_page_learns_what_is_served(server: Served) -> None:
    with server.http() as client:
        about = client.get("/api/model").json()
    assert (about["name"], about["prompt_kind"], about["image_size"], about["grid"]) == ("small", "captions", SIDE, GRID)
    assert {"confidence", "random", "halton", "raster"} <= set(about["orders"]) and "stored" not in about["orders"]
    assert about["defaults"] == {"guidance": 1.5, "temperature": 1, "top_k": 5, "top_p": 1, "order": "confidence", "steps": None}
    assert about["limits"] == {"prompt_characters": 4000, "images_per_request": 10, "upload_bytes": 10 << 20, "pixels": 16 << 20}


def test_events_tell_each_cell_in_its_order(server: Served, drawer: Pretrained) -> None:
    with server.http() as client:
        name = ask(client, prompt="a red apple", count=2, seed=3)
        events = job_events(client, name)
        kinds = [event.kind for event in events]
        assert kinds[0] == "queued" and kinds[1] == "start" and kinds[-1] == "done"
        assert events[1].data == {"cells": CELLS, "known": [[], []]}
        drawn = drawer.draw(["a red apple"] * 2, seed=3)
        for row, image in enumerate(events[-1].data["images"]):
            steps = [event.data for event in events if event.kind == "step" and event.data["image"] == row]
            assert [cell for step in steps for cell in step["cells"]] == image["order"] == drawn.order_BN[row].tolist()
            assert [step["placed"] for step in steps] == list(range(1, CELLS + 1)) and steps[0]["total"] == CELLS
            assert [score for step in steps for score in step["scores"]] == image["scores"]
            assert (image["seed"], image["number"], image["drawn"]) == (3, row, image["order"])
            fetched = client.get(image["url"])
            assert (np.asarray(open_png(fetched.content)) == np.asarray(drawer.sample(["a red apple"] * 2, seed=3)[row])).all()
        assert "preview" in kinds
        last = next(event for event in reversed(events) if event.kind == "preview")
        assert open_png(base64.b64decode(last.data["url"].partition(",")[2])).size == (SIDE, SIDE)


def test_an_edit_begins_with_its_known_cells(server: Served, drawer: Pretrained) -> None:
    image, box = picture(24, 18), (0, 0, 9, 9)
    urls = {"image": data_url(png(image)), "mask": data_url(png(box_mask(box, image.size)))}
    with server.http() as client:
        events = job_events(client, ask(client, kind="edit", prompt="a blue car", seed=2, order="spiral", **urls))
        edit = drawer.edit([image], [box], ["a blue car"], seed=2, order="spiral")[0]
        known = (~edit.squares[0].drawn_N).nonzero()[:, 0].tolist()
        (done,) = events[-1].data["images"]
        assert [event.data for event in events if event.kind == "start"] == [{"cells": CELLS, "known": [known]}]
        assert done["order"] == edit.squares[0].order_N.tolist() and sorted(done["drawn"] + known) == list(range(CELLS))
        data = client.get(done["url"]).content
    assert (np.asarray(open_png(data)) == np.asarray(edit.picture)).all()
    record = read_record(data)
    assert record is not None and record.kind == "edit" and record.edit == {"strength": 1.0, "feather": 0.0}


def test_strength_draws_a_share_of_the_whole_picture(server: Served, drawer: Pretrained) -> None:
    image = picture()
    with server.http() as client:
        name = ask(client, kind="edit", prompt="a blue car", seed=2, strength=0.4, image=data_url(png(image)))
        (done,) = job_events(client, name)[-1].data["images"]
        edit = drawer.edit([image], [(0, 0, SIDE, SIDE)], ["a blue car"], seed=2, strength=0.4)[0]
        assert len(done["drawn"]) == int(edit.squares[0].drawn_N.sum()) < CELLS
        assert (np.asarray(open_png(client.get(done["url"]).content)) == np.asarray(edit.picture)).all()


def test_events_go_on_behind_the_last_one_seen(server: Served) -> None:
    with server.http() as client:
        name = ask(client, prompt="a red apple")
        events = job_events(client, name)
        assert [event.id for event in events] == sorted({event.id for event in events})
        seen = events[4].id
        again = job_events(client, name, after=seen)
        assert again[-1] == events[-1] and all(event in events and event.id > seen for event in again)
        steps = [event for event in events if event.id > seen and event.kind == "step"]
        assert [event for event in again if event.kind == "step"] == steps and steps
        assert job_events(client, name, after=events[-1].id) == []
        assert job_events(client, name, after=10**9) == []


def test_a_cancelled_job_says_so_and_frees_its_slots(drawer: Pretrained, gate: threading.Event) -> None:
    with served(drawer, slots=2) as server, server.http() as client:
        names = [ask(client, prompt="a red apple", count=2) for _ in range(2)]
        wait_until(lambda: server.service.worker.busy == 2)
        for name in names:
            assert client.delete(f"/api/jobs/{name}").status_code == 204
            last = job_events(client, name)[-1]
            assert last.kind == "error" and last.data["code"] == "cancelled"
        gate.set()
        wait_until(server.idle)
        assert job_events(client, ask(client, prompt="a red apple"))[-1].kind == "done"


def test_places_in_the_queue_are_told_as_it_moves(drawer: Pretrained, gate: threading.Event) -> None:
    with served(drawer, slots=1) as server, server.http() as client:
        ask(client, prompt="a red apple")
        wait_until(lambda: server.service.worker.busy)
        second, third = (client.post("/api/jobs", json={"prompt": "a red apple"}).json() for _ in range(2))
        assert (second["position"], third["position"]) == (0, 1)
        with client.stream("GET", f"/api/jobs/{third['id']}/events") as response:
            events = read_events(response)
            assert next(events).data == {"position": 1}
            gate.set()
            assert next(events).data == {"position": 0}
            assert list(events)[-1].kind == "done"


def test_a_job_whose_reader_went_away_ends(drawer: Pretrained, gate: threading.Event) -> None:
    with served(drawer, slots=1, abandoned_s=0.1) as server, server.http() as client:
        name = ask(client, prompt="a red apple")
        with client.stream("GET", f"/api/jobs/{name}/events") as response:
            next(read_events(response))
        wait_until(lambda: server.service.jobs.get(name).ended)
        gate.set()
        wait_until(server.idle)
        assert job_events(client, name)[-1].data["code"] == "cancelled"


def test_a_request_whose_client_went_away_ends(drawer: Pretrained, gate: threading.Event) -> None:
    with served(drawer, slots=1) as server:
        body = json.dumps({"prompt": "a red apple", "n": 10})
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
            head = (
                f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            )
            connection.sendall(f"{head}\r\n\r\n{body}".encode())
            wait_until(lambda: not server.idle())
        gate.set()
        wait_until(lambda: 'how="cancelled"' in httpx.get(f"{server.url}/metrics", trust_env=False).text)
        wait_until(server.idle)


@pytest.mark.parametrize("prompt", PROMPTS, ids=["markup", "emoji", "right-to-left", "chinese", "odd", "sql"])
def test_prompts_of_any_script_are_drawn_and_come_back(server: Served, prompt: str) -> None:
    with server.http() as client:
        answer = client.post("/api/jobs", content=json.dumps({"prompt": prompt}), headers={"Content-Type": "application/json"})
        done = job_events(client, answer.json()["id"])[-1]
        assert done.kind == "done"
        record = read_record(client.get(done.data["images"][0]["url"]).content)
    assert record is not None and record.prompt == clean_text(prompt)


@pytest.mark.parametrize(
    ("kind", "prompt", "bad"), [("classes", 3, "ten"), ("classes", "3", 10), ("features", [[0.5] * 6, [1.0] * 6], [[0.5] * 5])]
)
def test_classes_and_features_are_prompts_too(tmp_path: Path, kind: str, prompt: object, bad: object) -> None:
    drawer = load(tmp_path, kind)
    with served(drawer) as server, server.http() as client:
        about = client.get("/api/model").json()
        assert about["prompt_kind"] == kind and about["classes"] == (10 if kind == "classes" else None)
        (done,) = job_events(client, ask(client, prompt=prompt, seed=1))[-1].data["images"]
        given = np.asarray(prompt, dtype=np.float32) if isinstance(prompt, list) else prompt
        drawn = np.asarray(open_png(client.get(done["url"]).content))
        assert (drawn == np.asarray(drawer.sample([given], seed=1)[0])).all()
        refused = client.post("/v1/images/generations", json={"prompt": bad})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt"


def test_a_raster_model_draws_but_does_not_edit(tmp_path: Path) -> None:
    with served(load(tmp_path, layout="raster")) as server, server.http() as client:
        about = client.get("/api/model").json()
        assert about["orders"] == ["raster"] and not about["edits"]
        assert job_events(client, ask(client, prompt=CAPTIONS[0]))[-1].kind == "done"
        refused = client.post("/api/jobs", json={"kind": "edit", "prompt": "x", "image": data_url(png(picture()))})
        assert refused.status_code == 400 and "raster" in refused.json()["error"]["message"]


def test_health_and_metrics_tell_what_was_drawn(server: Served) -> None:
    with server.http() as client:
        before = _value(client, 'oar_serve_images_total{kind="sample"}')
        assert job_events(client, ask(client, prompt="a red apple", count=3))[-1].kind == "done"
        assert client.get("/healthz").json() == {"live": True, "ready": True}
        assert _value(client, 'oar_serve_images_total{kind="sample"}') == before + 3
        for name in ("passes_total", "queue_length", "busy_slots", "slots", 'job_seconds_count{kind="sample"}', "queue_seconds_count"):
            assert _value(client, f"oar_serve_{name}") >= 0
        assert _value(client, "process_resident_memory_bytes") > 1e6


def _value(client: httpx.Client, name: str) -> float:
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name + " ")]
    return float(lines[0].split()[-1]) if lines else 0.0
