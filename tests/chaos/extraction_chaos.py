"""The pool, disturbed: seeded trials in which actors, nodes, drivers and storage fail, compared with what nobody disturbed.

    python tests/chaos/extraction_chaos.py --trials 100 [--seed 0] [--first 0]

The worker is a stand-in that sleeps and then writes a real order table; ``emoji_chaos.py`` has the real one. Real processes: a Ray
cluster of two node processes that lives through all trials (the second one is killed and started again), drivers that are started
and killed, job arrays without Ray, a folder or a real S3 server behind a proxy that fails 20 % of all calls. A trial is a function
of its number. In every trial: the pool ends; every shard is in the ledger, once, and its table is byte for byte that of the
undisturbed run; a shard with a broken sample is named while the others are done; nothing else lies where tables are looked for. On a
sick node every shard fails with an error that a user can fix: no shard may be given up for that. An outage of the storage, as pools begin
and in their midst, lasts longer than whatever is tried again inside a read or a write.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pool_chaos import PATIENCE_S, Cluster, Driver, after_tries, begin, fail_a_fifth, kill_an_actor, refuse_all, s3_with_faults
from pool_worker import PHASES, WRITES, OnRayNodes, TableWriter, table_of, tries

from oar_scale.errors import Requeue, UserError
from oar_scale.orders.order_table import table_name, write_orders
from oar_scale.runtime.program import program_exit
from oar_scale.runtime.retry import retry_transient
from oar_scale.shard_pool import ArrayTask, Ledger, Timing, run_pool
from oar_scale.storage import join, open_storage

if TYPE_CHECKING:
    from fault_proxy import FaultProxy

SHARDS = [f"{index:05d}.tar" for index in range(12)]
WORK_S = 0.15
SCENARIOS = ("actor", "write", "node", "driver", "terminate", "two pools", "array", "array node", "sick node", "outage")
QUICK = ("write", "array", "array node", "outage")
"""Those that need no Ray."""
ATTEMPTS = 12


def drive(settings: dict[str, Any]) -> int:
    """Run a pool with ``settings``; prints how it ended."""
    begin(settings)
    worker = partial(OnRayNodes, sick=settings["sick"]) if settings["sick"] else TableWriter
    make = partial(worker, settings["output"], settings["log"], WORK_S, settings["faults"])
    array = ArrayTask(*settings["array"]) if settings["array"] else None
    timing = Timing(heartbeat_s=0.3, lease_s=4.0, poll_s=0.3, grace_s=3.0, patience_s=PATIENCE_S)
    events: Counter[str] = Counter()
    try:
        report = run_pool(
            make,
            SHARDS,
            join(settings["output"], "ledger"),
            actors=settings["actors"],
            array=array,
            timing=timing,
            config={"what": "chaos"},
            on_event=lambda kind, _: events.update([kind]),
        )
    except Requeue:
        return 75
    done = {"done": report.done, "poison": report.poison, "events": events, "elsewhere": report.done_elsewhere}
    print(json.dumps(done), flush=True)
    return 0


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
    held: str = ""
    """A shard that waits for the first disturbance, so that no pool ends before it, however late that comes."""
    happened: Counter[str] = field(default_factory=Counter)
    sick: str = ""
    """The address of a node of Ray."""
    failing: bool = False
    """The server fails a fifth of all calls."""

    @property
    def go_on(self) -> Path:
        """There as soon as it need wait no more."""
        return Path(self.log, "go on")

    def driver_settings(self, actors: int = 2, array: tuple[int, int] | None = None) -> dict[str, Any]:
        given = {"output": self.output, "log": self.log, "faults": self.faults, "sick": self.sick}
        return {**given, "actors": actors, "array": array}


def plan(number: int, seed: int, folder: str, s3_root: str, scenarios: tuple[str, ...]) -> Trial:
    dice = random.Random(f"{seed}-{number}")
    scenario = scenarios[number % len(scenarios)]
    log = str(Path(folder, f"log-{number}"))
    Path(log).mkdir()
    remote = dice.random() < 0.4 or scenario == "outage"
    trial = Trial(number, scenario, dice, join(s3_root if remote else folder, f"out-{seed}-{number}"), log)
    trial.happened["on S3" if remote else "on a folder"] += 1
    victims = dice.sample(SHARDS, 4)
    if scenario == "write" or dice.random() < 0.3:
        for shard in victims[: 3 if scenario == "write" else 1]:
            write, phase = dice.randrange(len(WRITES)), dice.choice(PHASES)
            trial.faults[shard] = f"crash {write} {phase}"
    if dice.random() < 0.2 and scenario != "sick node":  # its error would be that of either
        trial.faults[victims[3]] = "broken"
    trial.held = max(set(SHARDS) - set(victims))
    trial.faults[trial.held] = "wait"
    return trial


def run_trial(trial: Trial, cluster: Cluster | None, proxy: FaultProxy, disturbances: int) -> None:
    """Let it happen, in so many attempts at most, then see that it left no trace."""
    array = trial.scenario in ("array", "array node", "outage")
    for attempt in range(ATTEMPTS):
        if trial.scenario == "outage" and attempt == 0:
            refuse_all(proxy)
        if array or (trial.scenario == "write" and cluster is None):
            drivers = [Driver(__file__, trial.driver_settings(array=(index, 3)), {}) for index in range(3)]
        else:
            assert cluster is not None
            cluster.ready()
            if trial.scenario == "sick node":
                trial.sick = trial.dice.choice(cluster.ray.living).address
            actors = 4 if trial.scenario in ("node", "sick node") else 2
            drivers = [Driver(__file__, trial.driver_settings(actors), cluster.ray.env)]
            if trial.scenario == "two pools":
                time.sleep(trial.dice.uniform(0, 2))
                drivers.append(Driver(__file__, trial.driver_settings(), cluster.ray.env))
        if attempt < disturbances:
            if trial.scenario == "outage" and attempt == 0:
                sit_out(trial, drivers, proxy)
            disturb(trial, drivers, cluster, proxy)
            trial.go_on.touch()
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
    if "broken" in trial.faults.values():  # fixed: the same command again
        trial.happened["broken sample"] += 1
        trial.faults.clear()
        code, report = Driver(__file__, trial.driver_settings(array=(0, 1)), {}).end()
        assert code == 0 and not report["poison"]
    check_output(trial)
    trial.happened["tries"] += len(tries(trial.log))
    trial.happened["tries beyond one a shard"] += len(tries(trial.log)) - len(SHARDS)


def sit_out(trial: Trial, drivers: list[Driver], proxy: FaultProxy) -> None:
    """End an outage once every pool has given up a call and everything that is tried again inside it, and some time after."""
    before, began = [driver.waits() for driver in drivers], time.monotonic()
    refuse_all(proxy)
    while any(driver.running and driver.waits() == waits for driver, waits in zip(drivers, before, strict=True)):
        assert time.monotonic() - began < PATIENCE_S, "a pool does not notice that its storage is gone"
        time.sleep(0.05)
    time.sleep(trial.dice.uniform(0, 6))  # leases expire after 4
    trial.happened["outages"] += 1
    fail_a_fifth(proxy) if trial.failing else proxy.spoil({})


def disturb(trial: Trial, drivers: list[Driver], cluster: Cluster | None, proxy: FaultProxy) -> None:
    dice = trial.dice
    for _ in range(dice.randint(1, 3) if trial.scenario == "actor" else 1):
        # While a shard is held, all that are not may have been tried already.
        after_tries(trial.log, dice.randint(1, 4), drivers, quiet_s=PATIENCE_S if trial.go_on.exists() else 3.0)
        time.sleep(dice.uniform(0, 2 * WORK_S))
        if not any(driver.running for driver in drivers):
            return
        victim = dice.choice(drivers)
        match trial.scenario:
            case "actor":
                while not (hit := kill_an_actor(trial.log, dice)) and any(driver.running for driver in drivers):
                    time.sleep(0.02)  # until the next one has been hired
                trial.happened["actors killed"] += hit
            case "node" if cluster is not None:
                cluster.kill_node()
                trial.happened["nodes killed"] += 1
            case "outage":
                sit_out(trial, drivers, proxy)
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
                for driver in {*dice.sample(drivers, dice.randint(1, 3)), *at_the_held_shard(trial, drivers)}:
                    driver.kill_group()
                    trial.happened["array tasks killed with their node"] += 1


def at_the_held_shard(trial: Trial, drivers: list[Driver]) -> list[Driver]:
    """The task that is at the shard that waits, which surely leaves a claim behind when it is killed; none if nothing waits any more."""
    while not trial.go_on.exists() and any(driver.running for driver in drivers):
        claim = retry_transient(Ledger(join(trial.output, "ledger")).claims, PATIENCE_S).get(trial.held)
        if claim is not None and Path(trial.log, f"{trial.held}.struck").exists():
            return [driver for driver in drivers if claim.holder.rsplit("-", 2)[1] == str(driver.process.pid)]
        time.sleep(0.02)
    return []


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


def run_trials(
    numbers: range, seed: int, folder: str, scenarios: tuple[str, ...] = SCENARIOS, failing: float = 0.7, disturbances: int = 3
) -> Counter[str]:
    """Run trials; returns what happened in all of them.

    Args:
        failing: share of the trials on S3 whose server fails 20 % of all calls.
        disturbances: number of a trial's attempts that are disturbed, where the first ones do not end it.

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
                    fail_a_fifth(proxy)
                    trial.failing = True
                    trial.happened["S3 failing 20 %"] += 1
                try:
                    run_trial(trial, cluster, proxy, disturbances)
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
    with program_exit():
        sys.exit(main())
