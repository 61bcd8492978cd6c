"""What is too much for ``oar serve`` is refused or let go, and what it holds is bounded."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections import Counter

import httpx
import pytest
from served import Served, box_mask, job_events, picture, png, served
from waiting import wait_until

from oar_scale.generation.pretrained import Pretrained
from oar_scale.serve.jobs import Result, ResultStore

PROMPT = {"prompt": "a red apple"}


def begin(server: Served, path: str, kind: str, length: int) -> socket.socket:
    """A connection on which a request has begun."""
    connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n--x"
    connection.sendall(head.encode())
    return connection


def test_a_job_that_takes_too_long_is_stopped(drawer: Pretrained, gate: threading.Event) -> None:
    with served(drawer, slots=1, job_s=0.05) as server, server.http() as client:
        names = [client.post("/api/jobs", json=PROMPT).json()["id"] for _ in range(2)]
        for name in names:  # one that is drawn, and one that waits; also while a pass hangs
            last = job_events(client, name)[-1]
            assert last.kind == "error" and last.data["code"] == "timeout" and "0.05 s" in last.data["message"]
        assert client.post("/v1/images/generations", json=PROMPT).status_code == 504
        gate.set()
        wait_until(server.idle)


PART = b"GET /healthz HTTP/1.1\r\nHost: local"


@pytest.mark.parametrize("sent", [b"", PART, PART + b"host\r\n\r\n" + PART], ids=["nothing", "part", "whole-and-part"])
def test_connections_that_ask_nothing_are_closed(drawer: Pretrained, sent: bytes) -> None:
    with served(drawer, body_s=0.05) as server:
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=60) as connection:
            connection.sendall(sent)
            while connection.recv(1000):
                pass
        assert httpx.get(f"{server.url}/healthz", trust_env=False).status_code == 200


def test_event_streams_are_bounded(drawer: Pretrained, gate: threading.Event) -> None:
    with served(drawer, event_streams=1) as server, server.http() as client:
        name = client.post("/api/jobs", json=PROMPT).json()["id"]
        with client.stream("GET", f"/api/jobs/{name}/events"):
            for answer in (client.get(f"/api/jobs/{name}/events"), client.post("/v1/images/generations", json={**PROMPT, "stream": True})):
                assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
            gate.set()
        wait_until(lambda: server.service.streams == 0)
        assert job_events(client, name)[-1].kind == "done"


def test_the_oldest_results_go(server: Served) -> None:
    store = ResultStore(100)
    for number in range(7):
        store.add(Result(str(number), bytes(30), "1x1", {}))
    assert store.bytes <= 100 and store.get("6") and store.get("4")
    store.add(Result("large", bytes(1000), "1x1", {}))
    assert store.bytes == 1000 and store.get("large")


def test_the_events_of_old_jobs_go(drawer: Pretrained) -> None:
    with served(drawer, ended_jobs=2) as server, server.http() as client:
        names = []
        for _ in range(4):
            names.append(client.post("/api/jobs", json=PROMPT).json()["id"])
            assert job_events(client, names[-1])[-1].kind == "done"
        assert client.get(f"/api/jobs/{names[0]}/events").status_code == 404
        assert job_events(client, names[-1])[-1].kind == "done"


def test_pictures_of_waiting_jobs_are_bounded(drawer: Pretrained, gate: threading.Event) -> None:
    image, mask = png(picture(60, 60)), png(box_mask((0, 0, 30, 30), (60, 60), openai=True))
    with served(drawer, slots=1, queue_bytes=2 * len(image + mask) + 10) as server, server.http() as client:

        def edit() -> int:
            stream = {"stream": "true", **PROMPT}
            with client.stream("POST", "/v1/images/edits", data=stream, files={"image": image, "mask": mask}) as answer:
                return answer.status_code

        with client.stream("POST", "/v1/images/edits", data={**PROMPT, "stream": "true"}, files={"image": image, "mask": mask}) as one:
            with client.stream("POST", "/v1/images/edits", data={**PROMPT, "stream": "true"}, files={"image": image, "mask": mask}) as two:
                assert one.status_code == two.status_code == 200
                assert edit() == 429
            gate.set()
        wait_until(server.idle)
        assert edit() == 200


def test_bodies_that_are_read_together_are_bounded(drawer: Pretrained) -> None:
    large = {**PROMPT, "colour": "x" * 100_000}
    with served(drawer, bodies_bytes=1 << 20) as server, server.http() as client:
        with begin(server, "/api/jobs", "application/json", 1_000_000):
            wait_until(lambda: client.post("/api/jobs", json=large).status_code == 429)
            assert client.post("/api/jobs", json=PROMPT).status_code == 202
        wait_until(lambda: client.post("/api/jobs", json=large).status_code == 400)


def test_a_body_that_does_not_come_is_not_waited_for(drawer: Pretrained) -> None:
    with served(drawer, body_s=0.1) as server:
        for path, kind in (("/api/jobs", "application/json"), ("/v1/images/edits", "multipart/form-data; boundary=x")):
            with begin(server, path, kind, 100) as slow:
                assert b" 408 " in slow.recv(4096).split(b"\r\n")[0]


def test_a_thousand_requests_at_once_are_all_answered(drawer: Pretrained) -> None:
    body = json.dumps({**PROMPT, "steps": 1})
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    request = f"{head}\r\nConnection: close\r\n\r\n{body}".encode()

    async def ask(port: int) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        answer = await reader.read()
        writer.close()
        return int(answer.split(b" ", 2)[1])

    async def ask_all(port: int) -> Counter[int]:
        return Counter(await asyncio.gather(*(ask(port) for _ in range(1000))))

    with served(drawer, slots=8, queue_jobs=16) as server:
        counts = asyncio.run(ask_all(int(server.url.rpartition(":")[2])))
        assert set(counts) <= {200, 429} and counts[200] >= 16 and counts.total() == 1000
        wait_until(server.idle)
        with server.http() as client:
            assert client.get("/healthz").status_code == 200
            assert client.post("/v1/images/generations", json=PROMPT).status_code == 200
