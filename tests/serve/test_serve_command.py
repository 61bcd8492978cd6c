"""``oar serve`` as a program: ports, tokens, signals, missing packages."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from served import read_events, served, small_run
from waiting import wait_until

from oar_scale.cli import main
from oar_scale.generation.pretrained import Pretrained

PROMPT = {"prompt": "a red apple"}


def test_it_says_its_port_and_ends_with_its_jobs(tmp_path: Path) -> None:
    """Beside other processes a job may take longer than it is given; then it is told so."""
    run = small_run(tmp_path / "run")
    command = [sys.executable, "-m", "oar_scale.cli", "serve", run, "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        url = process.stdout.readline().split(" on ")[1].split()[0]
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            assert client.get("/api/model").json()["name"] == "run"
            name = client.post("/api/jobs", json={**PROMPT, "count": 10}).json()["id"]
            with client.stream("GET", f"/api/jobs/{name}/events") as response:
                events = read_events(response)
                next(events)
                process.send_signal(signal.SIGTERM)
                last = list(events)[-1]
                assert last.kind == "done" or last.data["code"] == "server_stopped"
        assert process.wait(60) == 0
        assert "stopping" in process.stdout.read() and process.stderr.read() == ""


def test_while_it_stops_it_takes_no_jobs(drawer: Pretrained, gate: threading.Event) -> None:
    with served(drawer, slots=1) as server, server.http() as client:
        name = client.post("/api/jobs", json=PROMPT).json()["id"]
        with client.stream("GET", f"/api/jobs/{name}/events") as response:
            events = read_events(response)
            next(events)
            server.server.handle_exit(signal.SIGTERM, None)
            wait_until(lambda: server.service.stopping)
            assert httpx.get(f"{server.url}/healthz", trust_env=False).json() == {"live": True, "ready": False}
            refused = httpx.post(f"{server.url}/v1/images/generations", json=PROMPT, trust_env=False)
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "server_stopped"
            gate.set()
            assert list(events)[-1].kind == "done"


def test_jobs_that_do_not_end_in_time_are_told(drawer: Pretrained, gate: threading.Event) -> None:
    with served(drawer, slots=1, drain_s=0.1) as server, server.http() as client:
        names = [client.post("/api/jobs", json=PROMPT).json()["id"] for _ in range(2)]
        with client.stream("GET", f"/api/jobs/{names[1]}/events") as response:
            events = read_events(response)
            next(events)
            server.server.handle_exit(signal.SIGTERM, None)
            last = list(events)[-1]
        assert last.kind == "error" and last.data["code"] == "server_stopped"
        gate.set()


def test_a_taken_port_is_said_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main(["serve", "no/such/model", "--port", port]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and port in error and "--port" in error and "no/such/model" not in error


def test_other_addresses_want_a_token(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OAR_SERVE_TOKEN", raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        assert main(["serve", "no/such/model", "--host", host, "--port", "0"]) == 2
        assert "OAR_SERVE_TOKEN" in capsys.readouterr().err
    assert main(["serve", "no/such/model", "--host", "0.0.0.0", "--port", "0", "--token", "short"]) == 2
    assert "at least 16" in capsys.readouterr().err
    monkeypatch.setenv("OAR_SERVE_TOKEN", "a token of the tests")
    assert main(["serve", "no/such/model", "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "no/such/model" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "python_multipart"])
def test_a_missing_package_names_the_extra(package: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["serve", "no/such/model"]) == 2
    assert "pip install 'oar_scale[serve]'" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = small_run(tmp_path / "run")
    assert main(["serve", f"{run}/models/ordered.safetensors", "--port", "0"]) == 2
    assert "image tokenizer" in capsys.readouterr().err


def test_slots_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", small_run(tmp_path / "run"), "--port", "0", "--slots", "10000000000"]) == 2
    assert re.search(
        r"--slots 10000000000: their KV cache takes [0-9.]+ GiB, and [0-9.]+ GiB are free: take fewer", capsys.readouterr().err
    )
