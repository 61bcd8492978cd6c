"""A Ray to work with: the cluster that ``RAY_ADDRESS`` names, or a private one that lives as long as the ``with`` block.

The private one is quiet and closed: loopback addresses, a token that only its own processes know, a folder that only its user can enter,
no dashboard, no usage statistics, and nothing left afterwards, also where SIGTERM ends the process before Ray has started. Workers can
import whatever this process can, so that a source checkout works as well as an installed package.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

from oar_scale.errors import UserError
from oar_scale.runtime.gpu_settings import SETTINGS, gpu_settings

_OBJECT_STORE_BYTES = 80 * 2**20
"""Nothing large goes through it; Ray wants 75 MB at least."""
_STARTS = 4
"""Attempts to start a private Ray on an overloaded machine."""
_TOO_SLOW = ("timed out during startup", "Failed to connect to GCS")
"""What Ray says there, by the process that was too slow."""
_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""Ray Train's: off in a private Ray, whose only node nobody takes away."""
_ANSWER_S = 10.0
_ROUNDS = 10
_PARTING_S = 10.0
"""For workers that are still at something; Ray's own notice in a second or two that it is gone."""


@contextmanager
def ray_session(cpus: int, gpus: int = 0, least_gpus: int | None = None) -> Iterator[None]:
    """Connect to Ray; inside another session, use that one.

    Args:
        cpus: cores a private Ray may hand out; what it counts, not what the machine has.
        gpus: GPUs, which it has to have.
        least_gpus: where fewer would do, how few; a private Ray then hands out those that there are. Default: none but ``gpus``.

    Raises:
        UserError: nobody answers at ``RAY_ADDRESS``, or the private one did not start, or this machine does not have so many GPUs.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    path = os.pathsep.join(path for path in sys.path if os.path.exists(path))
    settings = {name: os.environ[name] for name in SETTINGS if name in os.environ}  # a cluster's nodes have been started without them
    variables = {"PYTHONPATH": path, **settings, **gpu_settings(os.environ)}
    with _environment({"RAY_USAGE_STATS_ENABLED": "0"}):
        if "RAY_ADDRESS" in os.environ:
            _check_address(os.environ["RAY_ADDRESS"])
            ray.init(log_to_driver=False, configure_logging=False, runtime_env={"env_vars": variables})
            try:
                yield
            finally:
                ray.shutdown()
            return
        if gpus:
            gpus = _gpus_here(gpus, gpus if least_gpus is None else least_gpus)
        _choose_token()
        watcher = {_WATCHER: os.environ.get(_WATCHER, "0")}
        with _exit_on_sigterm(), _private_folder() as folder, _environment(watcher):
            try:
                _start(cpus, gpus, folder, variables)
                yield
            finally:
                _end(folder)


@contextmanager
def _private_folder() -> Iterator[str]:
    """A folder that nobody else can enter: Ray makes its own, and all sockets in it, with mode 0777. Short, since a socket's path may have
    107 bytes."""
    folder = f"/tmp/oar-ray-{secrets.token_hex(6)}"  # known before it is made, so that a signal comes at no wrong moment
    try:
        os.mkdir(folder, 0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM, which would end the process at once, end it by an exception, so that everything is cleared away."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        if ours and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _leave(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not disturb the clearing away
    sys.exit(128 + number)


def _check_address(address: str) -> None:
    """Ray itself would wait minutes for a head that is not there, and then end the process."""
    host, colon, port = address.rpartition("//")[2].partition("/")[0].rpartition(":")
    if not colon or not port.isdecimal():
        return  # "auto" and the like: a file on this machine holds the address
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except OSError as error:
        raise UserError(
            f"RAY_ADDRESS={address}: no Ray answers there ({error}).\n"
            "Start it, correct the address, or unset RAY_ADDRESS to work with a private Ray on this machine."
        ) from error


def _gpus_here(gpus: int, least: int) -> int:
    """So many GPUs, or as many as there are. Raises UserError where these are too few: Ray would hand out numbers of GPUs that are not
    there, and the workers would fail on them one attempt after the other."""
    import torch

    there = torch.cuda.device_count()
    if least > there:
        raise UserError(
            f"the recipe needs {least} GPUs (parallel.workers x parallel.gpus_per_worker), and this machine has {there}.\n"
            "Lower parallel.workers, set parallel.gpus_per_worker to 0 to work on the CPU, or name a cluster's Ray in RAY_ADDRESS."
        )
    return min(gpus, there)


def _start(cpus: int, gpus: int, folder: str, variables: dict[str, str]) -> None:
    """Its workers inherit the environment variables. (As a ``runtime_env`` they would cost each worker a second import of Ray, and those
    that Ray starts ahead would be of no use.)"""
    import ray

    for attempt in range(1, _STARTS + 1):
        try:
            with _environment(variables):
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    num_gpus=gpus,
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    configure_logging=False,
                    _node_ip_address="127.0.0.2" if sys.platform == "linux" else None,  # Ray replaces 127.0.0.1 by a public address
                    _temp_dir=os.path.join(folder, str(attempt)),
                )
            return
        except Exception as error:  # Ray has no class of its own for "my processes took longer than 30 s", and no setting for it
            if any(text in str(error) for text in _TOO_SLOW) and attempt < _STARTS:
                _end(folder)
                continue
            raise UserError(
                f"Ray did not start: {error}\n"
                "On an overloaded machine it may take longer than Ray waits: run the command again, finished work is kept."
            ) from error


def _end(folder: str) -> None:
    """End the private Ray with its workers. ``ray.shutdown`` alone does not wait for them, and a GPU's memory is theirs until they go; nor
    does it end a Ray that was interrupted as it started."""
    import ray

    if not ray.is_initialized():
        for _ in range(_ROUNDS):  # a daemon that is killed may just have started another
            if not (daemons := _daemons_of(folder)):
                break
            _kill(daemons)
            _left(daemons)
        return
    workers: list[psutil.Process] = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # it has ended since
            workers += child.children(recursive=True) if child.name() == "raylet" else []
    ray.shutdown()
    _kill(_left(workers))
    _left(workers)


def _daemons_of(folder: str) -> list[psutil.Process]:
    """The living processes of the Ray in this folder, which nobody else has: they name it in their command, or are children of such."""
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended since, or is another user's
            command = " ".join(process.cmdline())
            if folder in command and "/ray/" in command and _lives(process):
                found |= {process, *process.children(recursive=True)}
    return [process for process in found if _lives(process)]


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _left(processes: list[psutil.Process]) -> list[psutil.Process]:
    """The processes that still live after a while; returns at once when all are gone."""
    deadline = time.monotonic() + _PARTING_S
    while (alive := [process for process in processes if _lives(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive


def _lives(process: psutil.Process) -> bool:
    """A zombie does not: containers without an init keep them, and ``psutil.wait_procs`` would wait for them in vain."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _choose_token() -> None:
    """Give a private Ray a token of its own, or it would leave one in the user's home directory.

    Ray turns token authentication on by itself where ``RAY_AUTH_MODE`` is unset. It reads the token once in the life of a
    process, so the variable stays: the next session must use the same.
    """
    if "RAY_AUTH_MODE" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)  # it recommends what was just done


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
