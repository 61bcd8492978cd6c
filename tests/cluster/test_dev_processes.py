"""What the development services share: ports that are free for whoever listens on all addresses, and processes known again."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.dev import processes

ROOT = Path(__file__).resolve().parents[2]


def test_a_port_used_on_another_loopback_address_is_taken() -> None:
    with socket.create_server(("127.0.0.3", 0)) as other:
        port = other.getsockname()[1]
        assert processes.ports_in_use([port]) == [port]
        with pytest.raises(RuntimeError, match=f"no free ports from {port} to {port}"):
            processes.free_port(range(port, port + 1), lambda first: [first])


def test_a_free_port_has_all_that_it_needs() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = processes.free_port(range(port - 2, port + 10, 2), lambda first: [first, first + 2])
        assert result not in (port - 2, port)


def test_a_port_that_was_given_out_is_given_to_nobody_else() -> None:
    port = processes.free_port(range(17000, 17600), lambda first: [first])
    ask = f"from cluster.dev.processes import free_port; free_port(range({port}, {port + 1}), lambda first: [first])"
    other = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True)
    assert f"no free ports from {port} to {port}" in other.stderr


def test_a_process_is_identified_by_its_start_time() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    created = processes.process_start(process.pid)
    identified = processes.find_process(process.pid, created)
    assert identified is not None and identified.pid == process.pid
    assert processes.find_process(process.pid, created - 1) is None, "another process that had this number"
    process.communicate(b"\n")
    assert processes.find_process(process.pid, created) is None


def test_the_end_of_a_log_or_that_it_is_missing_is_returned(tmp_path: object) -> None:
    log = f"{tmp_path}/log"
    with open(log, "w") as file:
        file.writelines(f"line {i}\n" for i in range(30))
    assert processes.last_lines(log, 2) == "line 28\nline 29"
    assert "No such file" in processes.last_lines(f"{log}.none")
