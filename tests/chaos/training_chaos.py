"""Training, disturbed: seeded trials that kill, starve, corrupt and resize a small run, and compare it with one that was left alone.

    python tests/chaos/training_chaos.py --trials 200 [--seed 0]          real processes, DeepSpeed over gloo, a folder or a real S3 server

A trial is a function of its number: a storage, then attempts at a stage of twelve steps, each with its disturbance, until one gets
through. On a sick node, all that a worker writes to its local disk fails for the whole attempt, or whatever it reads of checkpoints comes
to it wrong; an outage of S3 is longer than the patience of the stream. In every trial: the run ends; every step of every attempt has the
samples of the undisturbed run; the losses are those of the undisturbed run, bit for bit while neither the number of workers nor the ZeRO
stage changed, within 1e-5 otherwise; every checkpoint that is committed, and was not corrupted on purpose, can be read, and none is
withdrawn for what is wrong with a node or a connection; none that is not committed is ever used.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import conftest  # noqa: E402, F401 (a quiet environment on loopback)
from fault_proxy import ALL_METHODS, FaultProxy  # noqa: E402
from launcher import start_workers  # noqa: E402
from small_run import copy_run, prepare_small_run, pretraining, small_recipe  # noqa: E402

from oar_scale.observe.events import read_events  # noqa: E402
from oar_scale.run.context import Run  # noqa: E402
from oar_scale.storage import join, open_storage  # noqa: E402

STEPS, ATTEMPTS = 12, 8
HANGS_S = 300.0
"""Much longer than anything takes here, beside other work too."""
POINTS = ("step", "save", "deliver", "commit", "committed")
"""Where a rank can kill itself: after a step, before DeepSpeed writes, before a file goes to its place, before the manifest, after the
marker."""
KINDS = ("kill one", "kill all", "kill at random", "terminate", "corrupt", "disk full", "resize", "sick node", "outage")
PATIENCE_S, OUTAGE_S = 3.0, (8.0, 14.0)
"""How long the stream waits for the storage; and an outage's least and greatest length: more than that and a request's own repeats."""
WORLDS, ZERO_STAGES = (2, 3, 1), (1, 3, 2)


@dataclass
class Trial:
    """What happened."""

    number: int
    kinds: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What one attempt suffers; travels to its workers."""

    kind: str
    rank: int
    point: str
    count: int
    """At the how manieth time at that point."""


# -- in the workers ------------------------------------------------------------------------------------------------------------


def worker(job: Any, plan: Plan, seen: str) -> None:
    """The real worker, with a record of its samples and a way to die at a point of the plan."""
    from oar_scale.distributed.checkpoints import deepspeed_files, layout, saver
    from oar_scale.distributed.deepspeed_engine import DeepSpeedEngine
    from oar_scale.distributed.worker import train
    from oar_scale.errors import Requeue

    rank = int(os.environ["RANK"])
    with open(f"{seen}.log", "a") as log:  # what the dying say is kept with the trial
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if plan.kind == "sick node" and rank == plan.rank % int(os.environ["WORLD_SIZE"]):
        fall_sick(plan)
    passed: Counter[str] = Counter()

    def at(point: str) -> None:
        passed[point] += 1
        if plan.point != point or passed[point] != plan.count or rank != plan.rank % int(os.environ["WORLD_SIZE"]):
            return
        if plan.kind in ("kill one", "kill all", "corrupt", "resize"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif plan.kind == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        elif plan.kind == "disk full":
            fill_disk()

    one_step, save, deliver, commit = DeepSpeedEngine.train_step, deepspeed_files.save_shards, saver._deliver, layout.commit

    def recorded(engine: Any, batch: Any, lr: float, seeds: Any) -> Any:
        result = one_step(engine, batch, lr, seeds)
        descriptor = os.open(f"{seen}-{rank}", os.O_APPEND | os.O_CREAT | os.O_WRONLY)
        os.write(descriptor, (json.dumps([batch.step, batch.uid_b.tolist()]) + "\n").encode())
        os.close(descriptor)
        at("step")
        return result

    def saving(*arguments: Any) -> Any:
        at("save")
        saved = save(*arguments)
        if plan.kind == "disk full":  # there is disk space again
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        return saved

    def delivering(*arguments: Any) -> None:
        at("deliver")
        deliver(*arguments)

    def committing(*arguments: Any) -> None:
        at("commit")
        commit(*arguments)
        at("committed")

    DeepSpeedEngine.train_step = recorded  # type: ignore[method-assign]
    deepspeed_files.save_shards, saver._deliver, layout.commit = saving, delivering, committing  # type: ignore[assignment]
    try:
        train(job)
    except Requeue:
        sys.exit(75)


def fill_disk() -> None:
    """A file may grow no further: what a full disk or a quota does, for this process alone. Python ignores the signal."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))


def fall_sick(plan: Plan) -> None:
    """A disk that takes nothing, or memory that changes what is read of checkpoints, until the process ends."""
    from oar_scale.distributed.checkpoints import fetch

    if plan.count % 2 and int(os.environ["RANK"]):  # rank 0 also writes the events, by which a trial is judged
        fill_disk()
        return
    whole = fetch.crc32c
    fetch.crc32c = lambda data, crc=0: whole(data, crc) ^ 1  # type: ignore[assignment]


# -- the trial -----------------------------------------------------------------------------------------------------------------


class Ground:
    """A run that is ready to be trained, and what it does when nobody disturbs it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.run = prepare_small_run(small_recipe(join(folder, "prepared"), **changes(2, 2)))
        self.losses: dict[tuple[int, int], dict[int, float]] = {}
        self.samples: dict[int, list[int]] = {}

    def undisturbed(self, world: int, zero_stage: int) -> dict[int, float]:
        """The losses by step; made at first use."""
        if (world, zero_stage) not in self.losses:
            folder = join(self.folder, f"undisturbed-{world}-{zero_stage}")
            run = copy_run(self.run, folder, **changes(world, zero_stage))
            codes = attempt(run, Plan("none", 0, "", 0), join(folder, "seen"), world, None)
            assert codes == [0] * world, f"the undisturbed run ended with {codes}"
            self.losses[world, zero_stage] = losses(run)
            samples = seen_samples([join(folder, "seen")])
            assert (sorted(samples) == list(range(STEPS)) and not self.samples) or samples == {k: [v] for k, v in self.samples.items()}
            self.samples = {step: attempts[0] for step, attempts in samples.items()}
        return self.losses[world, zero_stage]


def changes(world: int, zero_stage: int) -> dict[str, Any]:
    """The recipe of a trial, but for its places."""
    return {
        "storage": {"patience_s": PATIENCE_S},
        "data": {"canonical_streams": 6},
        "model": {"dropout": 0.1},
        "parallel": {"workers": world, "zero_stage": zero_stage, "micro_batch": 2, "precision": "fp32", "hang_timeout_s": 120},
        "pretrain": {"steps": STEPS, "global_batch": 12, "checkpoint_every": 3, "evaluate_every": 100, "log_every": 1},
        "finetune": {"global_batch": 12},
    }


def attempt(
    run: Run, plan: Plan, seen: str, world: int, kill_after_s: float | None, meanwhile: Callable[[], None] | None = None
) -> list[int | None]:
    """Start the workers, let the plan happen, and ``meanwhile`` what happens outside of them; their exit codes."""
    workers = start_workers(worker, world, pretraining(run), plan, seen)
    if meanwhile is not None:
        meanwhile()
    began, victim = time.monotonic(), plan.rank % world
    until = began + (kill_after_s if kill_after_s is not None else HANGS_S)
    while alive := [each.sentinel for each in workers if each.is_alive()]:
        wait(alive, max(until - time.monotonic(), 0))
        died = any(each.exitcode not in (None, 0, 75) for each in workers)
        if died or (kill_after_s is not None and time.monotonic() - began > kill_after_s):
            if not died:
                workers[victim].kill()
            if plan.kind != "kill one":
                for each in workers:
                    each.kill()
            break
        assert time.monotonic() - began < HANGS_S, f"nothing moves: {plan}"
    for each in workers:
        each.join(HANGS_S)
        if each.is_alive():  # a peer's death has to end the others by itself
            each.kill()
            raise AssertionError(f"a worker outlived the death of another one by {HANGS_S} s: {plan}")
    return [each.exitcode for each in workers]


def run_trial(ground: Ground, number: int, seed: int, s3: tuple[str, FaultProxy] | None) -> Trial:
    """One trial.

    Raises:
        AssertionError: something that must hold does not; says what.
    """
    dice = random.Random(f"{seed}-{number}")
    trial, began = Trial(number), time.monotonic()
    folder = tempfile.mkdtemp(prefix=f"trial-{number}-", dir=ground.folder)
    root: str | None = None
    if s3 is not None and dice.random() < 0.4:
        root = join(s3[0], f"trial-{seed}-{number}")
        if dice.random() < 0.6:
            s3[1].spoil_all(0.2)
            trial.kinds["S3 fails 20 % of calls"] += 1
        trial.kinds["on S3"] += 1
    try:
        _attempts(ground, trial, dice, folder, root, s3[1] if s3 is not None and root is not None else None)
    finally:
        if s3 is not None:
            s3[1].spoil_all(0)
    trial.seconds = time.monotonic() - began
    shutil.rmtree(folder)
    return trial


def outage(proxy: FaultProxy, begins_s: float, lasts_s: float, failing: bool) -> None:
    """Let nothing through to S3 for a while, some time after the workers were started."""
    time.sleep(begins_s)
    proxy.spoil({"refused": 1.0}, methods=ALL_METHODS)
    time.sleep(lasts_s)
    proxy.spoil_all(0.2 if failing else 0.0)


def _attempts(ground: Ground, trial: Trial, dice: random.Random, folder: str, root: str | None, proxy: FaultProxy | None) -> None:
    world, zero_stage = dice.choice(WORLDS), dice.choice(ZERO_STAGES)
    shapes, first = [(world, zero_stage)], ground.undisturbed(world, zero_stage)
    corrupted: dict[str, bytes | None] = {}
    seen: list[str] = []
    for number in range(ATTEMPTS):
        last = number == ATTEMPTS - 1
        kinds = [each for each in KINDS if proxy is not None or each != "outage"]
        kind = "none" if last or (number >= 2 and dice.random() < 0.6) else dice.choice(kinds)
        run = copy_run(ground.run, folder, root, **changes(world, zero_stage))
        before, damaged, files_before = committed(run), still_damaged(corrupted), len(event_files(run))
        plan = Plan(kind, dice.randrange(3), dice.choice(POINTS), dice.randint(1, 4))
        seen.append(join(folder, f"seen-{number}"))
        meanwhile = None
        if kind == "outage" and proxy is not None:
            failing = bool(trial.kinds["S3 fails 20 % of calls"])
            begins_s, lasts_s = dice.uniform(0, 6), dice.uniform(*OUTAGE_S)
            shutil.rmtree(pretraining(run).cache, ignore_errors=True)  # what lies there needs no storage
            meanwhile = partial(outage, proxy, begins_s, lasts_s, failing)
        codes = attempt(run, plan, seen[-1], world, dice.uniform(0.5, 6) if kind == "kill at random" else None, meanwhile)
        trial.attempts += 1
        trial.kinds[kind] += 1
        check_resumed(event_files(run)[files_before:], before, number, damaged)
        check_committed(run, still_damaged(corrupted))
        if kind in ("sick node", "outage"):
            check_not_withdrawn(run, before - damaged)
        if codes == [0] * world and open_storage(run.at()).exists(run.model_uri("any_order")):
            break
        if kind == "corrupt":
            corrupted |= corrupt(dice, committed(run) - still_damaged(corrupted))
        if kind == "resize":
            world, zero_stage = dice.choice(WORLDS), dice.choice(ZERO_STAGES)
        shapes.append((world, zero_stage))
    else:
        raise AssertionError(f"trial {trial.number}: not done after {ATTEMPTS} attempts")
    check_samples(ground, seen)
    values = losses(run)
    assert sorted(values) == list(range(1, STEPS + 1)), sorted(values)
    same = len(set(shapes)) == 1
    worst = max(abs(values[step] - first[step]) for step in values)
    assert worst == 0 if same else worst < 1e-5, f"trial {trial.number}: losses differ by {worst}; workers and stages: {shapes}"


def check_samples(ground: Ground, seen: Sequence[str]) -> None:
    """Every step that any attempt completed on all ranks had the samples of the undisturbed run."""
    for step, attempts in seen_samples(seen).items():
        for samples in attempts:
            assert samples == ground.samples[step], f"step {step}: other samples"


def seen_samples(prefixes: Sequence[str]) -> dict[int, list[list[int]]]:
    """The samples of each step, once for each attempt that recorded all of them."""
    steps: dict[int, list[list[int]]] = {}
    for prefix in prefixes:
        mine: dict[int, list[int]] = {}
        for path in sorted(Path(prefix).parent.glob(f"{Path(prefix).name}-*")):
            for line in path.read_text().splitlines():
                step, uids = json.loads(line)
                mine.setdefault(step, []).extend(uids)
        for step, uids in mine.items():
            if len(uids) == 12:
                steps.setdefault(step, []).append(sorted(uids))
    return steps


def losses(run: Run) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in read_events(run.events, "pretrain") if event["kind"] == "train"}


def committed(run: Run) -> set[str]:
    from oar_scale.distributed.checkpoints.layout import checkpoint_locations

    return {location.uri for location in checkpoint_locations(pretraining(run).checkpoints) if location.committed}


def event_files(run: Run) -> list[str]:
    """Of the attempts that came as far as to have one, oldest first."""
    from oar_scale.observe.events import attempts

    return [path for _, path in attempts(run.events, "pretrain")]


def check_resumed(files: Sequence[str], before: set[str], number: int, corrupted: set[str]) -> None:
    """The attempt whose events these are started from something that was committed before it, and whole."""
    from oar_scale.observe.events import _read_file

    for event in (event for path in files for event in _read_file(path)):
        if event["kind"] == "resumed":
            assert event["uri"] in before, f"attempt {number} used {event['uri']}, which was not committed"
            assert event["uri"] not in corrupted, f"attempt {number} used {event['uri']}, which was damaged"


def check_committed(run: Run, corrupted: set[str]) -> None:
    """Whatever is committed, and was not damaged on purpose, can be read."""
    from oar_scale.distributed.checkpoints.fetch import check
    from oar_scale.distributed.checkpoints.layout import DamagedCheckpoint, read_checkpoint

    for uri in committed(run) - corrupted:
        try:
            checkpoint = read_checkpoint(uri)
            for name in checkpoint.files:
                check(checkpoint, name)
        except DamagedCheckpoint as fault:
            raise AssertionError(f"{uri} is committed, and {fault}") from fault


def check_not_withdrawn(run: Run, before: set[str]) -> None:
    """What one worker could not read is still committed, or has given way to newer ones."""
    left = committed(run)
    lost = {uri for uri in before - left if not left or uri > max(left)}
    assert not lost, f"withdrawn, although nothing is wrong with it: {lost}"


def corrupt(dice: random.Random, whole: set[str]) -> dict[str, bytes | None]:
    """Damage a file of the newest checkpoint, the way disks do; not of the only one, without which the stage rightly refuses to resume.

    Returns:
        Its URI, and its marker as it is now.
    """
    from oar_scale.distributed.checkpoints.layout import MANIFEST, MARKER, read_checkpoint

    if len(whole) < 2:
        return {}
    newest = max(whole)
    storage, folder = open_storage(newest), read_checkpoint(newest).folder
    victim = dice.choice([join(newest, MARKER), join(folder, MANIFEST), *(join(folder, name) for name in read_checkpoint(newest).files)])
    data = bytearray(storage.read(victim))
    how = dice.choice(("flip", "cut", "lose"))
    if how == "flip":
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        storage.write(victim, bytes(data))
    elif how == "cut":
        storage.write(victim, bytes(data[: len(data) // 2]))
    else:
        storage.delete(victim)
    return {newest: marker_of(newest)}


def marker_of(uri: str) -> bytes | None:
    from oar_scale.distributed.checkpoints.layout import MARKER

    storage = open_storage(uri)
    return storage.read(join(uri, MARKER)) if storage.exists(join(uri, MARKER)) else None


def still_damaged(corrupted: dict[str, bytes | None]) -> set[str]:
    """Those whose step has not been done and committed again since."""
    return {uri for uri, marker in corrupted.items() if marker_of(uri) == marker}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="oar-chaos-")
    failed = _all_trials(arguments, folder)
    if not failed:
        shutil.rmtree(folder)
    return failed


def _all_trials(arguments: argparse.Namespace, folder: str) -> int:
    from cluster.dev import s3

    server = s3.up(join(folder, "s3"), s3.free_port(), "chaos")
    os.environ |= server.env
    proxy = FaultProxy(server.port)
    os.environ["AWS_ENDPOINT_URL"] = proxy.url
    total: Counter[str] = Counter()
    began, attempts_made, failed = time.monotonic(), 0, 0
    try:
        ground = Ground(folder)
        for number in range(arguments.first, arguments.first + arguments.trials):
            try:
                trial = run_trial(ground, number, arguments.seed, ("s3://chaos/run", proxy))
            except AssertionError as error:
                failed += 1
                print(f"trial {number}: FAILED, see its folder {folder}/trial-{number}-*: {error}", flush=True)
                continue
            total += trial.kinds
            attempts_made += trial.attempts
            kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(trial.kinds.items()) if kind != "none")
            print(f"trial {number}: {trial.attempts} attempts, {trial.seconds:.0f} s: {kinds}", flush=True)
    finally:
        s3.down(join(folder, "s3"))
    seconds = time.monotonic() - began
    print(f"{arguments.trials} trials, {attempts_made} attempts, {seconds:.0f} s, {failed} failed; {dict(sorted(total.items()))}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
