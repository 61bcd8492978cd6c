"""A private Ray: closed while it runs, gone afterwards."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
import torch
from second_user import as_second_user
from waiting import wait_until

import oar_scale
from oar_scale.errors import UserError
from oar_scale.runtime import ray_session as ray_session_module
from oar_scale.runtime.ray_session import ray_session

SOURCE = str(Path(oar_scale.__file__).parent.parent)

PROGRAM = """
import json, os, subprocess, sys
from contextlib import suppress
import psutil
from oar_scale.runtime import ray_session as module
from oar_scale.runtime.ray_session import ray_session
from oar_scale.runtime.program import program_exit

notice, kill = 3.0, psutil.Process.kill
module._PARTING_S = notice

def patient_kill(process):
    module._PARTING_S = 600.0  # what was killed is gone when the machine gets round to it
    kill(process)

psutil.Process.kill = patient_kill

def inside():
    import oar_scale, ray
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)  # as a data loader that does not notice
    pids, runtime_env = [os.getpid(), os.getppid(), child.pid], dict(ray.get_runtime_context().runtime_env)
    has = {name: os.environ[name] for name in ("PYTHONPATH", "PYTORCH_ALLOC_CONF")}
    return {"package": oar_scale.__file__, "pids": pids, "runtime_env": runtime_env, "has": has}

sys.path.insert(0, sys.argv[1])  # of this process alone
before = dict(os.environ)
with ray_session(cpus=1):
    import ray
    with ray_session(cpus=1):  # inside another one: the same Ray
        found = ray.get(ray.remote(inside).remote())
    still_there = ray.is_initialized()
    node = ray.nodes()[0]["NodeManagerAddress"]
module._PARTING_S = notice
with ray_session(cpus=1):  # a second one in the same process
    again = ray.get(ray.remote(inside).remote())
left = []
for pid in found["pids"] + again["pids"]:
    with suppress(psutil.NoSuchProcess):
        left += [pid] if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE else []
changed = [name for name in ("PYTHONPATH", "PYTORCH_ALLOC_CONF", "RAY_USAGE_STATS_ENABLED") if before.get(name) != os.environ.get(name)]
again = {"node": node, "still_there": still_there, "after": ray.is_initialized(), "changed": changed}
print(json.dumps({**again, "first": found, "left": left}))
with program_exit():
    sys.exit(0)
"""


def test_a_private_ray_works_anywhere_and_leaves_nothing(tmp_path: Path) -> None:
    """From a source checkout, in any folder; no process and no token is left behind."""
    source = str(Path(oar_scale.__file__).parent.parent)
    hidden = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": source}
    (tmp_path / "own").mkdir()
    environment.pop("PYTORCH_ALLOC_CONF", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "own")], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    output = json.loads(done.stdout.splitlines()[-1])
    assert (output["still_there"], output["after"]) == (True, False)
    assert output["first"]["package"] == oar_scale.__file__
    assert str(tmp_path / "own") in output["first"]["has"]["PYTHONPATH"].split(os.pathsep)
    assert output["first"]["has"]["PYTORCH_ALLOC_CONF"] == "expandable_segments:True" and not output["changed"]
    assert output["first"]["runtime_env"] == {}  # which would cost each worker a second import of Ray
    assert sys.platform != "linux" or output["node"] == "127.0.0.2"
    assert not output["left"], "a worker, its child or the raylet"
    assert not (tmp_path / ".ray").exists()  # no token was left in the home directory


STARTING = """
import sys, threading
import psutil
from oar_scale.runtime import ray_session as module
from oar_scale.runtime.program import program_exit

start = module._start

def announced(cpus, gpus, folder, variables):
    if sys.argv[1] == "before Ray":
        print(folder, flush=True)
        sys.stdin.read()
    threading.Thread(target=announce, args=(folder,), daemon=True).start()
    start(cpus, gpus, folder, variables)

def announce(folder):
    while not any(child.name() == sys.argv[1] for child in psutil.Process().children()):
        pass
    print(folder, flush=True)

module._start = announced
with program_exit(), module.ray_session(cpus=1):
    sys.stdin.read()
"""


@pytest.mark.ray
@pytest.mark.parametrize("moment", ["before Ray", "gcs_server", "raylet"])
def test_sigterm_while_a_private_ray_starts_leaves_nothing(moment: str, tmp_path: Path) -> None:
    """Neither folder nor process, whenever it comes: before Ray has its own handler, and while its daemons come up."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"PYTHONPATH": SOURCE}
    command = [sys.executable, "-c", STARTING, moment]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    folder = "/".join(process.stdout.readline().strip().split("/")[:3])
    assert re.fullmatch(r"/tmp/oar-ray-\w+", folder) and os.path.isdir(folder)
    process.terminate()
    assert process.wait() not in (0, None)
    process.stdin.close()
    assert not os.path.exists(folder)
    wait_until(lambda: not working_in(folder))
    assert not os.path.exists(folder), "a daemon has made it again"


def working_in(folder: str) -> list[psutil.Process]:
    """The processes that have the folder in their command line."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            found += [process] if any(folder in word for word in process.cmdline()) else []
    return found


def test_nobody_else_can_enter_a_private_ray() -> None:
    """Ray gives its folder and its sockets mode 0777; the folder around them lets nobody in, and its name cannot be guessed."""
    with ray_session_module._private_folder() as first, ray_session_module._private_folder() as second:
        os.makedirs(os.path.join(first, "r"))
        os.chmod(os.path.join(first, "r"), 0o777)
        assert first != second and stat.S_IMODE(os.stat(first).st_mode) == 0o700
        looked = as_second_user(["ls", os.path.join(first, "r")])
        assert looked.returncode != 0 and "Permission denied" in looked.stderr
        assert as_second_user(["touch", os.path.join(first, "r", "socket")]).returncode != 0
    assert not os.path.exists(first)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_no_ray_answers_is_named_at_once(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.2", 0))  # bound, but nobody listens
        address = f"{scheme}127.0.0.2:{unused.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was called, which waits for minutes"))
        with pytest.raises(UserError, match=rf"RAY_ADDRESS={address}: no Ray answers there"), ray_session(cpus=1):
            pass


def test_gpus_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is started; as many as there are would be started, which this machine cannot show."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray was started"))
    with pytest.raises(UserError, match=r"needs 16 GPUs .* this machine has 8\.") as caught, ray_session(cpus=16, gpus=16):
        pass
    assert "parallel.gpus_per_worker to 0" in str(caught.value) and "RAY_ADDRESS" in str(caught.value)
    with pytest.raises(UserError, match=r"needs 12 GPUs .* this machine has 8\."), ray_session(cpus=16, gpus=16, least_gpus=12):
        pass


def test_an_elastic_run_takes_the_gpus_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(ray_session_module, "_start", lambda cpus, gpus, *_: started.append(gpus))
    for most, least in ((16, 4), (4, 2), (8, None)):
        with ray_session(cpus=16, gpus=most, least_gpus=least):
            pass
    assert started == [8, 4, 8]


def test_a_private_ray_that_starts_too_slowly_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray waits 30 s for its own processes, which an overloaded machine may take longer for."""
    folders: list[str] = []
    errors = ["The current node timed out during startup.", "System error: Failed to connect to GCS. Please check if it is running."]

    def start(*, _temp_dir: str, **_: object) -> None:
        folders.append(_temp_dir)
        if errors:
            raise RuntimeError(errors.pop())

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", start)
    with ray_session(1):
        assert len(set(folders)) == 3  # nothing of an attempt is in the next one's way

    monkeypatch.setattr(ray, "init", lambda **_: 1 / 0)
    with pytest.raises(UserError, match="Ray did not start: division by zero"), ray_session(1):
        pass
