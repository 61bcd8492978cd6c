"""The pool, disturbed: seeded trials in which actors, nodes, drivers and storage fail, compared with what nobody disturbed.

    python tests/chaos/extraction_chaos.py --trials 100 [--seed 0] [--first 0]

The worker is a stand-in that sleeps and then writes a real order table; ``emoji_chaos.py`` has the real one. Real processes: a Ray
cluster of two node processes that lives through all trials (the second one is killed and started again), drivers that are started
and killed, job arrays without Ray, a folder or a real S3 server behind a proxy that fails 20 % of all calls. A trial is a function
of its number. In every trial: the pool ends; every shard is in the ledger, once, and its table is byte for byte that of the
undisturbed run; a shard with a broken sample is named while the others are done; nothing else lies where tables are looked for.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import conftest  # noqa: E402, F401 (a quiet environment on loopback)
import psutil  # noqa: E402
from fault_proxy import ALL_METHODS, FaultProxy  # noqa: E402
from pool_worker import PHASES, WRITES, TableWriter, living, table_of, tries  # noqa: E402

from oar_scale.data.pool import ArrayTask, Ledger, Timing, run_pool  # noqa: E402
from oar_scale.errors import Requeue, UserError  # noqa: E402
from oar_scale.orders.table import table_name, write_orders  # noqa: E402
from oar_scale.storage import join, open_storage  # noqa: E402

SHARDS = [f"{index:05d}.tar" for index in range(12)]
WORK_S = 0.15
SCENARIOS = ("actor", "write", "node", "driver", "terminate", "two pools", "array", "array node")
QUICK = ("write", "array", "array node")
"""Those that need no Ray."""
ATTEMPTS = 12
S3_FAULTS = {"503": 0.08, "slow down": 0.04, "refused": 0.04, "unanswered": 0.04}


# -- a driver, which is a process of its own -------------------------------------------------------------------------------------


def drive(told: dict[str, Any]) -> int:
    """Run a pool as ``told``; prints how it ended."""
    make = partial(TableWriter, told["output"], told["log"], WORK_S, told["faults"])
    array = ArrayTask(*told["array"]) if told["array"] else None
    timing = Timing(beat_s=0.3, lease_s=4.0, look_s=0.3, grace_s=3.0, patience_s=60)
    events: Counter[str] = Counter()
    try:
        report = run_pool(
            make,
            SHARDS,
            join(told["output"], "ledger"),
            actors=told["actors"],
            array=array,
            timing=timing,
            what={"what": "chaos"},
            on_event=lambda kind, _: events.update([kind]),
        )
    except Requeue:
        return 75
    done = {"done": report.done, "poison": report.poison, "events": events, "elsewhere": report.elsewhere}
    print(json.dumps(done), flush=True)
    return 0


class Driver:
    """A driver of a trial, and all processes it started, as a node has them."""

    def __init__(self, told: dict[str, Any], ray: str | None, script: str = __file__) -> None:
        environment = dict(os.environ) | ({"RAY_ADDRESS": ray} if ray else {})
        command = [sys.executable, script, "--drive", json.dumps(told)]
        self.errors = open(Path(told["log"], f"driver-{time.monotonic_ns()}.err"), "w+")  # noqa: SIM115 (closed by end())
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": self.errors, "text": True}
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def kill_group(self) -> None:
        if self.running:  # or its number may be another's by now
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self, timeout_s: float = 240) -> tuple[int, Any]:
        """Exit code, and what it reported."""
        output, _ = self.process.communicate(timeout=timeout_s)
        self.errors.seek(0)
        said = self.errors.read()
        self.errors.close()
        assert self.process.returncode in (0, 75, -signal.SIGKILL), f"exit code {self.process.returncode}: {said[-3000:]}"
        return self.process.returncode, json.loads(output.splitlines()[-1]) if self.process.returncode == 0 else None


# -- a cluster of two node processes ---------------------------------------------------------------------------------------------


class Cluster:
    """A Ray head and a second node, both on loopback, with two cores each as Ray counts."""

    def __init__(self, folder: str) -> None:
        self.folder = tempfile.mkdtemp(prefix="oar-cr-", dir="/tmp")  # short: the paths of sockets may have 107 bytes
        self.log = open(Path(folder, "ray.log"), "ab")  # noqa: SIM115 (closed by close())
        port = _free_port()
        self.address = f"127.0.0.2:{port}"
        self.environment = dict(os.environ) | {
            "RAY_health_check_initial_delay_ms": "0",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "3000",
            "RAY_health_check_failure_threshold": "3",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        head = ["--head", "--node-ip-address=127.0.0.2", f"--port={port}", f"--temp-dir={self.folder}", "--include-dashboard=false"]
        self.head = self._start(*head)
        _wait(lambda: _listens(port), 60, "the Ray head does not answer")
        self.node: subprocess.Popen[bytes] | None = None
        import ray

        ray.init(self.address, log_to_driver=False, configure_logging=False, _node_ip_address="127.0.0.2")
        self.ready()

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = ["ray", "start", "--block", "--num-cpus=2", "--object-store-memory=80000000", "--disable-usage-stats", *arguments]
        command[0] = str(Path(sys.executable).with_name("ray"))
        return subprocess.Popen(command, env=self.environment, stdout=self.log, stderr=self.log, start_new_session=True)

    def ready(self) -> None:
        """Start the second node where it is not there, and wait for it."""
        import ray

        if self.node is None:
            self.node = self._start(f"--address={self.address}", "--node-ip-address=127.0.0.3")
        _wait(lambda: sum(each["Alive"] for each in ray.nodes()) == 2, 90, "the second node does not join")

    def kill_node(self) -> None:
        """As if its machine had lost power."""
        assert self.node is not None
        _kill_tree(self.node.pid)
        self.node.wait()
        self.node = None

    def close(self) -> None:
        import ray

        ray.shutdown()
        for process in (self.node, self.head):
            if process is not None:
                _kill_tree(process.pid)
                process.wait()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _kill_tree(pid: int) -> None:
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in [*root.children(recursive=True), root]:
            with suppress(psutil.Error):
                process.kill()


def _free_port() -> int:
    import socket

    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.2", 0))
            if not 10002 <= (port := int(probe.getsockname()[1])) <= 19999:  # Ray's workers take these
                return port


def _listens(port: int) -> bool:
    import socket

    with suppress(OSError), socket.create_connection(("127.0.0.2", port), timeout=1):
        return True
    return False


def _wait(condition: Callable[[], bool], timeout_s: float, problem: str) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, problem
        time.sleep(0.02)


# -- a trial -----------------------------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """One trial, and what happened in it."""

    number: int
    scenario: str
    dice: random.Random
    output: str
    log: str
    faults: dict[str, str] = field(default_factory=dict)
    happened: Counter[str] = field(default_factory=Counter)

    def told(self, actors: int = 2, array: tuple[int, int] | None = None) -> dict[str, Any]:
        return {"output": self.output, "log": self.log, "faults": self.faults, "actors": actors, "array": array}


def plan(number: int, seed: int, folder: str, s3_root: str, scenarios: tuple[str, ...]) -> Trial:
    dice = random.Random(f"{seed}-{number}")
    scenario = scenarios[number % len(scenarios)]
    log = str(Path(folder, f"log-{number}"))
    Path(log).mkdir()
    remote = dice.random() < 0.4
    trial = Trial(number, scenario, dice, join(s3_root if remote else folder, f"out-{seed}-{number}"), log)
    trial.happened["on S3" if remote else "on a folder"] += 1
    victims = dice.sample(SHARDS, 4)
    if scenario == "write" or dice.random() < 0.3:
        for shard in victims[: 3 if scenario == "write" else 1]:
            write, phase = dice.randrange(len(WRITES)), dice.choice(PHASES)
            trial.faults[shard] = f"crash {write} {phase}"
    if dice.random() < 0.2:
        trial.faults[victims[3]] = "broken"
    return trial


def run_trial(trial: Trial, cluster: Cluster | None) -> None:
    """Let it happen, then see that it left no trace."""
    array = trial.scenario.startswith("array")
    for attempt in range(ATTEMPTS):
        if array or (trial.scenario == "write" and cluster is None):
            drivers = [Driver(trial.told(array=(index, 3)), None) for index in range(3)]
        else:
            assert cluster is not None
            cluster.ready()
            drivers = [Driver(trial.told(4 if trial.scenario == "node" else 2), cluster.address)]
            if trial.scenario == "two pools":
                time.sleep(trial.dice.uniform(0, 2))
                drivers.append(Driver(trial.told(), cluster.address))
        if attempt < 3:
            disturb(trial, drivers, cluster)
        ends = [driver.end() for driver in drivers]
        trial.happened["drivers"] += len(drivers)
        finished = [report for code, report in ends if code == 0]
        if finished:
            break
    else:
        raise AssertionError(f"not done after {ATTEMPTS} attempts")
    for report in finished:
        trial.happened.update({f"event {kind}": count for kind, count in report["events"].items()})
        check_report(trial, report)
    for shard, fault in trial.faults.items():
        kind, *point = fault.split()
        if kind == "crash" and Path(trial.log, f"{shard}.struck").exists():
            trial.happened[f"killed {'inside' if point[1] == 'half' else point[1]} the {WRITES[int(point[0])]}"] += 1
    if "broken" in trial.faults.values():  # mended: the same command again
        trial.happened["broken sample"] += 1
        trial.faults.clear()
        code, report = Driver(trial.told(array=(0, 1)), None).end()
        assert code == 0 and not report["poison"]
    check_output(trial)
    trial.happened["tries"] += len(tries(trial.log))
    trial.happened["tries beyond one a shard"] += len(tries(trial.log)) - len(SHARDS)


def disturb(trial: Trial, drivers: list[Driver], cluster: Cluster | None) -> None:
    dice = trial.dice
    for _ in range(dice.randint(1, 3) if trial.scenario == "actor" else 1):
        after_tries(trial.log, dice.randint(1, 4), drivers)
        time.sleep(dice.uniform(0, 2 * WORK_S))
        if not any(driver.running for driver in drivers):
            return
        victim = dice.choice(drivers)
        match trial.scenario:
            case "actor":
                trial.happened["actors killed"] += kill_an_actor(trial.log, dice)
            case "node" if cluster is not None:
                cluster.kill_node()
                trial.happened["nodes killed"] += 1
            case "driver" | "two pools":
                if trial.scenario == "driver" or dice.random() < 0.5:
                    victim.kill_group()
                    trial.happened["drivers killed"] += 1
            case "terminate":
                victim.process.send_signal(dice.choice((signal.SIGTERM, signal.SIGUSR1)))
                trial.happened["drivers asked to stop"] += 1
            case "array":
                victim.process.kill()
                trial.happened["array tasks killed"] += 1
            case "array node":
                for driver in dice.sample(drivers, dice.randint(1, 3)):
                    driver.kill_group()
                    trial.happened["array tasks killed with their node"] += 1


def after_tries(log: str, more: int, drivers: list[Driver]) -> None:
    """Wait for so many more tries of shards; not longer than the drivers run."""
    wanted = len(tries(log)) + more
    _wait(lambda: len(tries(log)) >= wanted or not any(driver.running for driver in drivers), 180, "no shard is tried")


def kill_an_actor(log: str, dice: random.Random) -> int:
    """How many were killed: one, or none if none is alive."""
    alive = living(log)
    if alive:
        with suppress(psutil.NoSuchProcess):
            dice.choice(alive).kill()
    return min(1, len(alive))


def check_report(trial: Trial, report: dict[str, Any]) -> None:
    broken = [shard for shard, fault in trial.faults.items() if fault == "broken"]
    assert sorted(report["poison"]) == broken, f"poison: {report['poison']}"
    assert list(report["done"]) == [shard for shard in SHARDS if shard not in broken]
    assert all("no caption" in error for error in report["poison"].values())


def check_output(trial: Trial) -> None:
    """Every shard once, the bytes of a calm run, and nothing that does not belong there."""
    ledger = Ledger(join(trial.output, "ledger"))
    assert ledger.done() == set(SHARDS), "the ledger has other shards"
    assert not ledger.claims(), f"claims are left: {ledger.claims()}"
    assert not ledger.poison(), f"poison is left: {ledger.poison()}"
    storage = open_storage(trial.output)
    names = {uri.removeprefix(f"{trial.output}/") for uri in storage.list(trial.output)}
    expected = {table_name(shard) for shard in SHARDS}
    assert {name for name in names if "/" not in name} == expected, names
    assert {name.split("/")[0] for name in names if "/" in name} == {"ledger", "ledger-pool"}, names
    for shard in SHARDS:
        uri = join(trial.output, table_name(shard))
        assert storage.read(uri) == calm(shard), f"{uri} differs from an undisturbed run's"
    for entry in ledger.entries(SHARDS).values():
        assert entry.work.keys() == {"actor", "host", "holder", "attempt", "seconds", "finished"}


def calm(shard: str) -> bytes:
    """The table of a shard as one process writes it that nobody disturbs."""
    with tempfile.TemporaryDirectory() as folder:
        write_orders(join(folder, "calm.parquet"), table_of(shard))
        return Path(folder, "calm.parquet").read_bytes()


def run_trials(numbers: range, seed: int, folder: str, scenarios: tuple[str, ...] = SCENARIOS, failing: float = 0.7) -> Counter[str]:
    """Run trials; returns what happened in all of them.

    Args:
        failing: share of the trials on S3 whose server fails 20 % of all calls.

    Raises:
        AssertionError: a trial failed; its folder and log are left where they are.
    """
    total: Counter[str] = Counter()
    with s3_with_faults(folder) as (s3_root, proxy):
        cluster = Cluster(folder) if set(scenarios) - set(QUICK) else None
        try:
            for number in numbers:
                began = time.monotonic()
                trial = plan(number, seed, folder, s3_root, scenarios)
                if trial.output.startswith("s3://") and trial.dice.random() < failing:
                    proxy.spoil(S3_FAULTS, methods=ALL_METHODS)
                    trial.happened["S3 failing 20 %"] += 1
                try:
                    run_trial(trial, cluster)
                except Exception as error:
                    raise AssertionError(f"trial {number} ({trial.scenario}, {trial.output}, {trial.faults}): {error}") from error
                finally:
                    total["calls to S3 that failed"] += sum(proxy.injected.values())
                    proxy.reset(seed=number)
                total.update({f"trial: {trial.scenario}": 1} | trial.happened)
                what = ", ".join(f"{name} {count}" for name, count in sorted(trial.happened.items()))
                print(f"trial {number}: {trial.scenario}, {time.monotonic() - began:.0f} s: {what}", flush=True)
        finally:
            if cluster is not None:
                cluster.close()
    return total


@contextmanager
def s3_with_faults(folder: str) -> Iterator[tuple[str, FaultProxy]]:
    """A root on a real S3 server, and the proxy before it; the AWS variables point there."""
    from cluster.dev import s3

    server = s3.up(join(folder, "s3"), s3.free_port(), "chaos")
    proxy = FaultProxy(server.port)
    before = dict(os.environ)
    os.environ |= server.env | {"AWS_ENDPOINT_URL": proxy.url}
    try:
        yield "s3://chaos/run", proxy
    finally:
        proxy.close()
        s3.down(join(folder, "s3"))
        os.environ.clear()
        os.environ |= before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        try:
            return drive(json.loads(arguments.drive))
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
    folder, began = tempfile.mkdtemp(prefix="oar-pool-chaos-"), time.monotonic()
    numbers = range(arguments.first, arguments.first + arguments.trials)
    try:
        total = run_trials(numbers, arguments.seed, folder, tuple(arguments.scenarios.split(",")))
    except AssertionError as error:
        print(f"FAILED, everything is in {folder}: {error}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    print(
        f"\n{arguments.trials} trials, seed {arguments.seed}, {time.monotonic() - began:.0f} s: every shard once, every byte as undisturbed"
    )
    for name, count in sorted(total.items()):
        print(f"  {count:6} {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
