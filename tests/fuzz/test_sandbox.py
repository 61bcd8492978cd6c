"""The sandbox of the fuzz tests notices what a command must not do."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import sandbox


def write_outside() -> None:
    Path("../outside").touch()


def rename_outside() -> None:
    Path("inside").touch()
    os.rename("inside", "../outside")


def start_a_program() -> None:
    subprocess.run(["true"], check=True)


def connect() -> None:
    client = socket.socket()
    client.close()  # so that nothing is sent; the audit event comes first
    with suppress(OSError):
        client.connect(("192.0.2.1", 9))


def flood() -> None:
    print("x" * (sandbox.TERMINAL_CHARS + 1))


def write_inside() -> None:
    Path("inside").write_text("harmless")


@pytest.mark.parametrize("offence", [write_outside, rename_outside, start_a_program, connect, flood])
def test_an_offence_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offence: Callable[[], None]) -> None:
    monkeypatch.setattr(sandbox, "main", lambda arguments: offence() or 0)
    (tmp_path / "folder").mkdir()
    with pytest.raises(AssertionError):
        sandbox.oar(tmp_path / "folder", "status")


def test_what_lies_in_the_folder_is_no_offence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "main", lambda arguments: write_inside() or 0)
    assert sandbox.oar(tmp_path, "status") == (0, "")


def test_a_hang_uses_up_its_processor_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(arguments: tuple[str, ...]) -> int:
        while True:
            pass

    monkeypatch.setattr(sandbox, "main", hang)
    monkeypatch.setattr(sandbox, "CPU_S", 0.2)
    with pytest.raises(sandbox.Hang):
        sandbox.oar(tmp_path, "status")
