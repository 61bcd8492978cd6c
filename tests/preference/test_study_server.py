"""What the page asks ``oar study serve`` for, and what a tampered request gets."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from small_study import ServedStudy, open_png, rater, served_study

from oar_scale.cli import main
from oar_scale.errors import UserError
from oar_scale.preference.server import only_server
from oar_scale.preference.study import ANSWERS, MANIFEST

TOKEN = "a token of the tests"


def asked(server: ServedStudy, who: int = 1, **fields: Any) -> dict[str, Any]:
    return {"study": server.study.fingerprint, "rater": rater(who), **fields}


def test_a_session_over_http_and_no_arm_in_any_answer(server: ServedStudy) -> None:
    texts = []
    with server.http() as client:
        session = client.post("/api/session", json=asked(server)).json()
        assert (session["done"], session["total"], session["last"], len(session["next"])) == (0, 10, None, 2)
        while session["next"]:
            current = session["next"][0]
            comparison = server.sessions.comparisons[current["comparison"]]
            sides = comparison.pictures[::-1] if server.study.swapped(rater(1), comparison.id) else comparison.pictures
            assert (current["left"], current["right"]) == sides and comparison.caption in current["question"]
            for side in ("left", "right"):
                answer = client.get(f"/api/pictures/{current[side]}.png")
                assert answer.headers["content-type"] == "image/png" and open_png(answer.content).size == (8, 8)
            sent = client.post("/api/answers", json=asked(server, comparison=comparison.id, choice="left", ms=900))
            texts.append(sent.text)
            session = sent.json()
        texts.append(client.get("/api/study").text)
    assert session["done"] == 10
    assert not [text for text in texts for arm in server.study.arms if arm.name in text]


def test_tampered_requests_change_nothing(server: ServedStudy) -> None:
    with server.http() as client:
        first = client.post("/api/session", json=asked(server)).json()["next"][0]["comparison"]
        whole = asked(server, comparison=first, choice="left", ms=900)
        for change, status in (
            ({"study": "0" * 32}, 409),
            ({"study": 7}, 400),
            ({"rater": "../x"}, 400),
            ({"rater": rater(2)}, 404),
            ({"comparison": "f" * 32}, 404),
            ({"comparison": "x'; DROP TABLE answers; --"}, 400),
            ({"choice": "both"}, 400),
            ({"choice": None}, 400),
            ({"ms": -1}, 400),
            ({"ms": "900"}, 400),
            ({"ms": 10**30}, 400),
            ({"name": "somebody"}, 400),
        ):
            answer = client.post("/api/answers", json={**whole, **change})
            assert answer.status_code == status, (change, answer.text)
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert client.post("/api/answers", content=b"x" * 5000, headers={"Content-Type": "application/json"}).status_code == 413
        assert client.post("/api/answers", json=whole, headers={"Origin": "http://evil.example"}).status_code == 403
        assert client.get("/api/study", headers={"Host": "evil.example"}).status_code == 400
        for path in ("pictures/x.png", f"pictures/..%2F..%2F{MANIFEST}", f"pictures/%2e%2e/{ANSWERS}"):
            assert client.get(f"/api/{path}").status_code == 404
        for path in (f"/{MANIFEST}", f"/static/{MANIFEST}", "/static/study/..%2f..%2fstudy.py", f"/{ANSWERS}"):
            assert client.get(path).status_code == 404
        assert not server.answers.counts()
        assert client.post("/api/answers", json=whole).json()["done"] == 1


def test_only_the_token_opens_a_study(study_folder: Path) -> None:
    with served_study(study_folder, token=TOKEN) as server:
        fields = asked(server)
        for headers, status in (({}, 401), ({"Authorization": f"Bearer {TOKEN}"}, 200)):
            with server.http() as client:
                assert client.post("/api/session", json=fields, headers=headers).status_code == status
                assert client.get(f"/api/pictures/{min(server.study.pictures())}.png", headers=headers).status_code == status
                assert client.get("/").status_code == client.get("/static/study/study.js").status_code == 200


def test_the_command_keeps_answers_and_nothing_about_people(study_folder: Path) -> None:
    """The real program: it says its port, writes rows of seven numbers and words, and ends when it is told to."""
    command = [sys.executable, "-m", "oar_scale.cli", "study", "serve", str(study_folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        url = process.stdout.readline().split(" on ")[1].split(";")[0]
        with httpx.Client(
            base_url=url, timeout=60, trust_env=False, headers={"User-Agent": "tell-tale", "Cookie": "a=tell-tale"}
        ) as client:
            fingerprint = client.get("/api/study").json()["fingerprint"]
            fields = {"study": fingerprint, "rater": rater(1)}
            current = client.post("/api/session", json=fields).json()["next"][0]["comparison"]
            answer = client.post("/api/answers", json={**fields, "comparison": current, "choice": "tie", "ms": 1234})
            assert answer.json()["done"] == 1 and "set-cookie" not in answer.headers
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0 and process.stderr.read() == ""
    with sqlite3.connect(study_folder / ANSWERS) as connection:
        rows = connection.execute("SELECT * FROM answers").fetchall()
    connection.close()
    assert [(row[0], row[1], row[2], row[4], row[5]) for row in rows] == [(fingerprint, rater(1), current, "tie", 1234)]
    stored = b"".join(path.read_bytes() for path in study_folder.glob(f"{ANSWERS}*"))
    assert b"tell-tale" not in stored and b"127.0.0.1" not in stored


def test_a_second_server_is_refused_until_the_first_is_gone(study_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error names the process; a lock whose server was killed is none."""
    command = [sys.executable, "-m", "oar_scale.cli", "study", "serve", str(study_folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = process.stdout.readline().split(" on ")[1].split(";")[0].rpartition(":")[2]
        assert main(["study", "serve", str(study_folder), "--port", port]) == 2
        error = capsys.readouterr().err
        assert f"by process {process.pid} on {socket.gethostname()}." in error and error.count("\n") == 1
        process.kill()
        process.wait(60)
    with only_server(str(study_folder)), pytest.raises(UserError, match=rf"by process {os.getpid()} on"), only_server(str(study_folder)):
        pytest.fail("two servers at once")


def test_what_cannot_be_served_is_said(study_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        ([str(tmp_path), "--port", "0"], "no study is here"),
        ([str(study_folder), "--host", "0.0.0.0"], "OAR_SERVE_TOKEN"),
        ([str(study_folder), "--token", "short"], "at least 16"),
    ):
        assert main(["study", "serve", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_a_missing_package_names_the_extra_of_studies(
    package: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["study", "serve", "no/study"]) == 2
    assert "pip install 'oar_scale[study]'" in capsys.readouterr().err
