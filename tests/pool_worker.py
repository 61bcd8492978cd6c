"""A worker for the tests of the pool: it writes a real order table for each shard, and dies, fails, hangs or waits as configured.

    TableWriter(output, log, faults={"00003.tar": "crash 1 half"})

``crash N PHASE`` kills the process once, at the shard's N-th write to the storage (0: its claim, 1: the draft of its entry, 2: the Parquet,
3: the entry in the ledger), PHASE being ``before`` it, ``half`` way through its bytes, or ``after`` it.
"""

from __future__ import annotations

import os
import signal
import socket
import time
import urllib.parse
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from crc32c import crc32c

from oar_scale.errors import UserError
from oar_scale.orders.order_table import OrderTable, order_bytes, table_name
from oar_scale.shard_pool import OnStep, ShardOutput, ShardResult, Worker
from oar_scale.storage import join, open_storage

if TYPE_CHECKING:
    from oar_scale.shard_pool.extraction_pool import ExtractionJob  # brings torch, which the stand-in does without

ROWS, CELLS = 40, 16
WRITES, PHASES = ("claim", "draft", "table", "entry"), ("before", "half", "after")


@dataclass
class TableWriter:
    """See the top of this file.

    Attributes:
        log: a local folder. ``tries.log`` gets a line "SHARD PID" at each try, ``pids.log`` one "PID" for each process.
        seconds: how long a shard takes, by the clock.
        faults: by shard: ``fail``, ``broken``, ``die``, or, once only, ``hang``, ``die once``, ``crash N PHASE``, or ``wait`` for a file
            "go on" in the log's folder.
    """

    output: str
    log: str
    seconds: float = 0.0
    faults: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        note_process(self.log)
        self._crash: tuple[int, str] | None = None
        if any(fault.startswith("crash") for fault in self.faults.values()):
            self._intercept_writes()

    def run(self, shard: str, on_step: OnStep) -> ShardOutput:
        note_try(self.log, shard)
        fault = self.faults.get(shard, "")
        if fault == "fail":
            raise RuntimeError("the accelerator caught fire")
        if fault == "broken":
            raise UserError(f"{shard}: sample 'cat' has no caption")
        if fault == "die" or (fault == "die once" and self._first(shard)):
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang" and self._first(shard):
            time.sleep(3600)
        if fault == "wait" and self._first(shard):
            while not Path(self.log, "go on").exists():
                time.sleep(0.02)
        time.sleep(self.seconds)
        data = order_bytes(table_of(shard))
        return ShardOutput(join(self.output, table_name(shard)), data, {"images": ROWS}, {"crc32c": crc32c(data)})

    def _first(self, shard: str) -> bool:
        """Whether this is the first time that somebody asks about this shard."""
        try:
            Path(self.log, f"{shard}.struck").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _intercept_writes(self) -> None:
        storage = type(open_storage(self.output))
        write, counts = storage.write, dict.fromkeys(self.faults, 0)

        def dying(self_: Any, uri: str, data: bytes, **conditions: Any) -> bool:
            shard = next((name for name in self.faults if name.removesuffix(".tar") in uri), None)
            fault = self.faults[shard].split() if shard else [""]
            if shard is None or fault[0] != "crash" or counts[shard] != int(fault[1]) or not self._first(shard):
                if shard:
                    counts[shard] += 1
                return bool(write(self_, uri, data, **conditions))
            if fault[2] == "half":
                _half_a_write(uri, data)
            elif fault[2] == "after":
                write(self_, uri, data, **conditions)
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

        storage.write = dying  # type: ignore[method-assign, assignment]


@dataclass
class OnRayNodes(TableWriter):
    """Hosts are Ray's nodes, by their addresses, though all are on this machine. On ``sick`` every shard fails with what a user can fix."""

    sick: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        import ray

        self.address = str(ray.util.get_node_ip_address())
        socket.gethostname = lambda: self.address  # of this process, which is an actor's

    def run(self, shard: str, on_step: OnStep) -> ShardOutput:
        if self.address == self.sick:
            note_try(self.log, shard)
            raise UserError(f"{shard}: the credentials of {self.address} have expired")
        return super().run(shard, on_step)


def table_of(shard: str) -> OrderTable:
    """A function of the shard's name, with orders that are permutations."""
    dice = np.random.default_rng(zlib.crc32(shard.encode()))
    order_SN = np.stack([dice.permutation(CELLS) for _ in range(ROWS)]).astype(np.uint16)
    keys = [f"{shard}-{row}" for row in range(ROWS)]
    return OrderTable(keys, [0] * ROWS, order_SN, dice.random((ROWS, CELLS), dtype=np.float32), "stand-in", "stand-in")


class NotedExtraction:
    """The real worker, with the notes that :class:`TableWriter` takes."""

    def __init__(self, job: ExtractionJob, log: str) -> None:
        note_process(log)
        self.log, self.worker = log, job.make_worker()

    def run(self, shard: str, on_step: OnStep) -> ShardOutput:
        note_try(self.log, shard)
        return self.worker.run(shard, on_step)


def write_output(worker: Worker, shard: str) -> ShardResult:
    """Do a shard without a pool, and write what it makes; return its result."""
    output = worker.run(shard, lambda: None)
    open_storage(output.uri).write(output.uri, output.data)
    return output.result


def note_process(log: str) -> None:
    Path(log).mkdir(parents=True, exist_ok=True)
    _append(Path(log, "pids.log"), f"{os.getpid()} {psutil.Process().create_time()}")


def note_try(log: str, shard: str) -> None:
    _append(Path(log, "tries.log"), f"{shard} {os.getpid()}")


def tries(log: Path | str) -> list[str]:
    """The shard of each try, in order."""
    path = Path(log, "tries.log")
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def pids(log: Path | str) -> list[int]:
    """Of all processes that ever had a worker, oldest first."""
    path = Path(log, "pids.log")
    return [int(line.split()[0]) for line in path.read_text().splitlines()] if path.exists() else []


def living(log: Path | str) -> list[psutil.Process]:
    """Those of these processes that still run; another one of the same number is none of them."""
    path, processes = Path(log, "pids.log"), []
    for line in path.read_text().splitlines() if path.exists() else []:
        pid, started = line.split()
        with suppress(psutil.Error):
            process = psutil.Process(int(pid))
            if abs(process.create_time() - float(started)) < 0.1 and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
    return processes


def _append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(f"{line}\n")


def _half_a_write(uri: str, data: bytes) -> None:
    """What is on the disk, or on its way to the server, when a process dies in the middle of a write."""
    if not uri.startswith("s3://"):
        folder, name = os.path.split(uri)
        os.makedirs(folder, exist_ok=True)
        Path(folder, f".{name}.0123456789ab.tmp").write_bytes(data[: len(data) // 2])
        return
    from oar_scale.storage.s3_client import client, split

    bucket, key = split(uri)
    url = urllib.parse.urlsplit(client().generate_presigned_url("put_object", Params={"Bucket": bucket, "Key": key}))
    with socket.create_connection((url.hostname or "", url.port or 80)) as server:
        head = f"PUT {url.path}?{url.query} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Length: {len(data)}\r\n\r\n"
        server.sendall(head.encode() + data[: len(data) // 2])
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
