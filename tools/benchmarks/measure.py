"""Measurements that can be trusted on a shared machine: fresh processes in alternation, medians, and each process its own peak.

The parent imports no torch: a child's peak memory then is what the child did.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import resource
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Lock
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from oar_scale.errors import UserError
from oar_scale.runtime.program import USERS_FAULT

if TYPE_CHECKING:
    from oar_scale.config.schema import Layout
    from oar_scale.model import ModelSpec

MIB = 2**20
LAYOUTS = ("instructed", "dual", "decoupled", "grouped")
"""Those that place cells in any order."""
CLASSES = 1000


def benchmark_spec(size: str | None, layout: Layout) -> ModelSpec:
    """The model that is measured: 16 x 16 cells of 16,384 codes and 1,000 classes, in a layout.

    Args:
        size: one of recipes/base; None: dim 384, 6 layers, 6 heads.
    """
    from oar_scale.config.loading import load_recipe
    from oar_scale.config.schema import ModelConfig
    from oar_scale.model import ModelSpec
    from oar_scale.model.spec import ClassSpec

    chosen: dict[str, Any] = {"dim": 384, "layers": 6, "heads": 6}
    if size:
        base = Path(__file__).resolve().parents[2] / "recipes" / "base" / f"model-{size}.yaml"
        chosen = load_recipe(str(base), ["name=benchmark"]).model.model_dump(exclude_unset=True)
    config = ModelConfig.model_validate({**chosen, "layout": layout})  # a layout has widths and norms of its own
    return ModelSpec.from_recipe(config, vocab_size=16384, grid=16, condition=ClassSpec(classes=CLASSES))


def in_fresh_process(script: str, arguments: Sequence[str], threads: int, limit_s: float | None = None) -> dict[str, Any]:
    """Run a script that prints one JSON object as its last line, with so many threads; returns the object.

    Raises:
        SystemExit: it failed, or took longer than ``limit_s``: then it is killed, with all processes that it started.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command, name = [sys.executable, script, *arguments], f"{Path(script).name} {' '.join(arguments)}"
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=limit_s is not None) as process:
        try:
            output, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"{name} took longer than {limit_s:.0f} s") from None
        finally:
            if process.poll() is None and limit_s is not None:  # its session is another, which Ctrl-C does not reach
                os.killpg(process.pid, signal.SIGKILL)
            elif process.poll() is None:
                process.kill()
    if process.returncode == USERS_FAULT:  # which it has said
        raise SystemExit(USERS_FAULT)
    if process.returncode:
        raise SystemExit(f"{name} failed with exit code {process.returncode}")
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def run_ranks(function: Callable[..., None], world: int, *arguments: Any) -> None:
    """Run ``function(rank, *arguments)`` to its end in ``world`` fresh processes with the environment that torch.distributed reads.

    Raises:
        UserError: a rank raised it. All ranks are ended then: others would wait for that one, or say that it has gone.
        SystemExit: a rank failed otherwise, and has said how.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    heard, says = context.Pipe(duplex=False)
    told = Told(says, context.Lock())
    workers = [context.Process(target=_rank, args=(rank, world, port, told, function, arguments)) for rank in range(world)]
    for worker in workers:
        worker.start()
    says.close()
    with heard, suppress(EOFError):  # which says that all ranks have ended
        error = UserError(heard.recv())
        for worker in workers:
            worker.kill()
            worker.join()
        raise error
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit("a worker failed")


class Told(NamedTuple):
    """How a rank tells its parent of an error: the first that has one keeps the lock, so that one is told."""

    parent: Connection
    first: Lock


def _rank(rank: int, world: int, port: int, told: Told, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    try:
        function(rank, *arguments)
    except UserError as error:
        if told.first.acquire(block=False):
            told.parent.send(str(error))
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()  # which ends this process: were this one to end first, ranks that wait for it would fail with errors of their own


def alternate(cases: Sequence[str], rounds: int, run: Callable[[str], dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Run every case once a round, forwards and backwards alternating, so that other load of the machine affects all of them.

    Raises:
        UserError: no round.
    """
    if rounds < 1:
        raise UserError(f"--rounds {rounds}: nothing would be measured. Give 1 or more.")
    results: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
    for number in range(rounds):
        for case in cases if number % 2 == 0 else reversed(cases):
            print(f"round {number + 1} of {rounds}: {case}", file=sys.stderr, flush=True)
            results[case].append(run(case))
    return results


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over the rounds of ours / theirs."""
    return statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))


class Meter:
    """Seconds of each step, and the most memory that was in use since the meter was made, in MiB above what was in use then.

    ``cpu_seconds`` are those that this process computed, all threads together: with one thread, other programs do not add to them.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.before = self._most()

    def time(self, step: Callable[[], object]) -> None:
        self._wait()
        start, cpu_start = time.perf_counter(), time.process_time()
        step()
        self._wait()
        self.seconds.append(time.perf_counter() - start)
        self.cpu_seconds.append(time.process_time() - cpu_start)

    def peak(self) -> float:
        return self._most() - self.before

    def _wait(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.synchronize()

    def _most(self) -> float:
        if self.cuda:
            import torch

            return float(torch.cuda.max_memory_allocated() / MIB)
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def machine(device: str, threads: int) -> str:
    """The machine the figures were measured on, in one line without names or dates."""
    import torch

    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    cores = f"{os.cpu_count()} cores" if os.cpu_count() != 1 else "1 core"
    return f"{name}, {cores} ({threads} threads used), {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if os.path.exists(path) else []


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
