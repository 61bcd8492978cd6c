"""A fault ends what it belongs to, and the server lives."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from served import job_events, load, served

from oar_scale.generation.continuous import ContinuousBatch, Progress
from oar_scale.generation.pretrained import Pretrained
from oar_scale.serve import worker

PROMPT = {"prompt": "a red apple"}


def test_scores_that_are_no_numbers_end_one_job(tmp_path: Path, gate: threading.Event) -> None:
    """Features near the end of float32 overflow in the model; the drawings beside them are not touched."""
    drawer = load(tmp_path, "features")
    with served(drawer) as server, server.http() as client:
        good, bad = (client.post("/api/jobs", json={"prompt": [[value] * 6], "seed": 1}).json()["id"] for value in (0.5, 3e38))
        gate.set()
        last = job_events(client, bad)[-1]
        assert last.kind == "error" and "not numbers (NaN)" in last.data["message"] and last.data["type"] == "server_error"
        assert job_events(client, good)[-1].kind == "done"
        assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("part", ["step", "add", "begin", "finished", "decode"])
def test_a_fault_anywhere_ends_the_job_alone(drawer: Pretrained, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    def broken(*arguments: object) -> list[Progress]:
        raise RuntimeError("out of memory at /secret/place")

    with served(drawer) as server, server.http() as client:
        with monkeypatch.context() as patch:
            if part in ("step", "add"):
                patch.setattr(ContinuousBatch, part, broken)
            elif part == "decode":
                patch.setattr(drawer.vq, part, broken)
            else:
                patch.setattr(worker, part, broken)
            answer = client.post("/v1/images/generations", json=PROMPT)
            assert answer.status_code == 500 and "secret" not in answer.text and answer.json()["error"]["type"] == "server_error"
            name = client.post("/api/jobs", json=PROMPT).json()["id"]
            assert job_events(client, name)[-1].kind == "error"
        assert client.post("/v1/images/generations", json=PROMPT).status_code == 200
        assert server.idle() and client.get("/healthz").status_code == 200


def test_a_thread_that_died_is_not_live(drawer: Pretrained) -> None:
    with served(drawer) as server, server.http() as client:
        assert client.get("/healthz/live").status_code == 200
        server.service.worker.close(60)
        for path in ("/healthz/live", "/healthz"):
            assert client.get(path).status_code == 503
        assert client.post("/api/jobs", json=PROMPT).json()["error"]["code"] == "not_ready"
