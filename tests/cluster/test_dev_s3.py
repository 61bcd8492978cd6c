"""The development S3 server: started once, found again, stopped without losing data."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.dev import s3
from oar_scale.storage import open_storage

SCRIPT = str(Path(s3.__file__))


def test_s3_comes_up_once_and_keeps_its_objects_when_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, port = str(tmp_path), s3.free_port()
    server = s3.up(folder, port)
    try:
        assert s3.up(folder, port) == server == s3.running(folder)
        with pytest.raises(RuntimeError, match=f"already runs on port {port}"):
            s3.up(folder, port + 10)
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        open_storage("s3://oar/kept").write("s3://oar/kept", b"data")

        os.kill(server.pid, signal.SIGKILL)
        os.waitpid(server.pid, 0)
        assert s3.running(folder) is None
        restarted = s3.up(folder, port)
        assert restarted.pid != server.pid
        assert open_storage("s3://oar/kept").read("s3://oar/kept") == b"data"
    finally:
        assert s3.down(folder)
    assert s3.running(folder) is None
    assert not s3.down(folder)


@pytest.mark.s3
def test_the_script_prints_lines_for_a_shell(tmp_path: Path) -> None:
    port = s3.free_port()
    arguments = [sys.executable, SCRIPT, "--dir", str(tmp_path), "--port", str(port)]
    try:
        printed = subprocess.run([*arguments, "up"], check=True, capture_output=True, text=True).stdout
        assert f"export AWS_ENDPOINT_URL=http://127.0.0.1:{port}\n" in printed
        assert subprocess.run([*arguments, "env"], check=True, capture_output=True, text=True).stdout == printed
    finally:
        subprocess.run([*arguments, "down"], check=True)
    failed = subprocess.run([*arguments, "env"], capture_output=True, text=True)
    assert failed.returncode == 1 and "start it with `up`" in failed.stderr
