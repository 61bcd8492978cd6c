"""What disks, networks, storages and kill -9 do to checkpoints: training continues, and only whole checkpoints are ever used."""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from launcher import run_workers, start_workers
from small_run import prepare_small_run, pretraining
from small_training import Trainer, note, noted, rooted, tiny_recipe, training, with_stage

from oar_scale.distributed.checkpoints import Saver, committed_steps, fetch, restore
from oar_scale.distributed.checkpoints.layout import Checkpoint, DamagedCheckpoint, checkpoint_locations
from oar_scale.errors import Unreachable, UserError
from oar_scale.runtime.retry import retry_transient
from oar_scale.storage import join, open_storage
from oar_scale.training.job import TrainingJob


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    return with_stage(pretraining(prepare_small_run(tiny_recipe(str(tmp_path_factory.mktemp("faults") / "run")))), 2)


def saved_steps(saver: Saver, train: Trainer, steps: range) -> list[dict[str, Any]]:
    """Train to each of the steps and save there, waiting for it."""
    outcomes = []
    for step in steps:
        train.losses(step - 1, step)
        saver.save(train.engine, step, {"step": step})
        outcomes += [vars(outcome) for outcome in saver.finish(60)]
    return outcomes


# -- saving -----------------------------------------------------------------------------------------------------------------


def save_on_bad_disks(job: TrainingJob, out: str) -> None:
    rank = int(os.environ["RANK"])
    with training(job, 6) as trainer:
        train, saver = trainer(job), Saver(job)
        outcomes = saved_steps(saver, train, range(1, 2))
        if rank == 1:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        outcomes += saved_steps(saver, train, range(2, 3))
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        nowhere = job.recipe.storage.model_copy(update={"scratch_dir": "/dev/null/scratch"})
        elsewhere = replace(job, recipe=job.recipe.model_copy(update={"storage": nowhere})) if rank == 0 else job
        outcomes += saved_steps(Saver(elsewhere), train, range(3, 4))
        outcomes += saved_steps(saver, train, range(4, 5))
        note(out, "disks", {"outcomes": outcomes, "loss": train.losses(4, 6)})


def test_a_full_disk_of_one_rank_costs_only_that_checkpoint(job: TrainingJob, tmp_path: Path) -> None:
    """So does a disk that cannot be written."""
    here = replace(job, root=rooted(job, "disks"), local=str(tmp_path / "local"))
    run_workers(save_on_bad_disks, 2, here, str(tmp_path))
    faults = {outcome["step"]: outcome["fault"] for outcome in noted(str(tmp_path), "disks")["outcomes"]}
    assert faults[1] is None and faults[4] is None
    assert re.search(r"optim_states\.pt: File too large", faults[2]), faults[2]
    assert re.search(r"/dev/null/scratch.*: Not a directory", faults[3]), faults[3]
    locations = checkpoint_locations(here.checkpoints)
    assert [(location.step, len(location.saves)) for location in locations] == [(1, 1), (4, 1)], "left-overs of the saves that failed"
    assert sorted(os.listdir(here.checkpoints)) == ["step-00000001", "step-00000004"]
    assert os.listdir(here.scratch) == []


def save_slowly(job: TrainingJob, out: str) -> None:
    """Saves, the first of which has a rank whose files move slowly, the second one whose file does not move; rank 0 has no such file."""
    from oar_scale.distributed.checkpoints import saver

    deliver, beats, steady = saver._deliver, [], [True, False]

    def slow(path: str, uri: str, moved: Callable[[int], object]) -> None:
        if os.environ["RANK"] == "1":
            moving = steady.pop(0) if steady else None
            for _ in range(20 if moving is not None else 0):
                time.sleep(0.2)
                if moving:
                    moved(1)
        deliver(path, uri, moved)

    saver._deliver, saver._LOOK_S = slow, 0.3
    with training(job, 6) as trainer:
        train, counts = trainer(job), []
        ours = Saver(job, beats.append)
        for step in range(1, 4):
            before = len(beats)
            ours.save(train.engine, step, {})
            counts.append(len(beats) - before)
        note(out, "beats", counts)
        note(out, "faults", [vars(outcome)["fault"] for outcome in ours.finish(60)])


def test_workers_that_wait_for_an_upload_do_not_hang_while_it_moves(job: TrainingJob, tmp_path: Path) -> None:
    """Whichever worker it is of: the others have nothing to do meanwhile, and would be ended after parallel.hang_timeout_s."""
    run_workers(save_slowly, 2, replace(job, root=rooted(job, "slow"), local=str(tmp_path / "local")), str(tmp_path))
    none, moving, still = noted(str(tmp_path), "beats")
    assert none == 0 and moving >= 5 and 1 <= still <= 3, (none, moving, still)
    assert noted(str(tmp_path), "faults") == [None, None, None]


def save_while_s3_is_down(job: TrainingJob, out: str) -> None:
    server = os.environ["AWS_ENDPOINT_URL"]
    with training(job, 6) as trainer, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        impatient = job.recipe.model_copy(update={"storage": job.recipe.storage.model_copy(update={"patience_s": 0.0})})
        there = replace(job, root=os.environ["CHECKPOINT_ROOT"], recipe=impatient)
        train, saver = trainer(job), Saver(there)
        outcomes = saved_steps(saver, train, range(1, 2))
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{taken.getsockname()[1]}"
        train.losses(1, 2)
        saver.save(train.engine, 2, {})
        went_on = train.losses(2, 3)
        saver.save(train.engine, 3, {})
        before = train.digest()
        outcomes += [vars(outcome) for outcome in saver.outcomes()]
        try:
            restore(train.engine, there)
            outage = ""
        except UserError as error:
            outage = str(error)
        os.environ["AWS_ENDPOINT_URL"] = server
        outcomes += [vars(outcome) for outcome in saver.finish(60)]
        expected = train.losses(3, 5)
        restored = restore(train.engine, there)
        note(
            out, "s3", {"outcomes": outcomes, "went_on": went_on, "outage": outage, "same": train.digest() == before, "step": restored.step}
        )
        note(out, "s3 losses", [expected, train.losses(3, 5)])
        restore_on_two_hosts(trainer(with_stage(there, 3)), with_stage(there, 3), before, out)


def restore_on_two_hosts(train: Trainer, there: TrainingJob, expected: dict[str, int], out: str) -> None:
    """Convert with a disk for each rank that the other does not see: once with a mistake that has to be noticed, once without."""
    from oar_scale.distributed.checkpoints.live import LiveState

    rank = os.environ["RANK"]
    socket.gethostname = lambda: f"host{rank}"
    elsewhere = replace(there, local=join(there.local, f"host{rank}"))
    put = LiveState.put
    LiveState.put = lambda self, name, what, whole: put(self, name, what, whole + 1e-9 * (what == "ema" and name.endswith("null_rows")))
    try:
        restore(train.engine, elsewhere)
    except RuntimeError as error:
        note(out, "unfaithful", str(error))
    LiveState.put = put
    restored = restore(train.engine, elsewhere)
    note(out, "hosts", {"converted": restored.converted, "same": train.digest() == expected, "left": os.listdir(elsewhere.scratch)})


def test_an_s3_that_is_down_costs_one_checkpoint(job: TrainingJob, tmp_path: Path, s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next save waits for it."""
    root = f"{s3_root}/down"
    monkeypatch.setenv("CHECKPOINT_ROOT", root)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    open_storage(root).upload(join(job.root, "tokens", "train", "manifest.json"), join(root, "tokens", "train", "manifest.json"))
    run_workers(save_while_s3_is_down, 2, replace(job, local=str(tmp_path / "local")), str(tmp_path))
    notes = noted(str(tmp_path), "s3")
    outcomes = {outcome["step"]: outcome for outcome in notes["outcomes"]}
    assert outcomes[1]["fault"] is None and outcomes[3]["fault"] is None
    assert "given up" in outcomes[2]["fault"] and "no connection to the S3 server" in outcomes[2]["fault"]
    assert outcomes[3]["wait_s"] > 0
    assert "no connection" in notes["outage"], "an outage was taken for a fault of the checkpoint"
    assert committed_steps(join(root, "checkpoints", "pretrain")) == [1, 3]
    assert notes["step"] == 3 and notes["same"]
    before, after = noted(str(tmp_path), "s3 losses")
    assert before == after
    assert re.search(r"not converted faithfully: \S+null_rows: its ema are not those", noted(str(tmp_path), "unfaithful"))
    assert noted(str(tmp_path), "hosts") == {"converted": True, "same": True, "left": []}, "converted with another host's disk"


# -- kill -9 ----------------------------------------------------------------------------------------------------------------


def die_at(point: str) -> None:
    """Arrange for this process to be killed at a point of its second save."""
    from oar_scale.distributed.checkpoints import layout, saver
    from oar_scale.distributed.checkpoints.deepspeed_files import _Writer

    def dying(function: Callable[..., Any], *, after: bool = False, when: Callable[..., bool] = lambda *args: True) -> Callable[..., Any]:
        def instead(*args: Any, **kwargs: Any) -> Any:
            if not when(*args):
                return function(*args, **kwargs)
            if after:
                function(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        return instead

    rank = os.environ["RANK"]
    if point == "save" and rank == "1":
        _Writer.close = dying(_Writer.close)  # type: ignore[method-assign]
    elif point == "upload" and rank == "1":
        saver._deliver = dying(saver._deliver)
    elif point == "between" and rank == "0":
        saver._deliver = dying(saver._deliver, after=True)
    elif point == "commit" and rank == "0":
        storage = type(layout.open_storage("x"))
        storage.write = dying(storage.write, when=lambda self, uri, data: uri.endswith("COMMITTED"))  # type: ignore[method-assign]
    elif point == "after" and rank == "0":
        layout.commit = dying(layout.commit, after=True)


def save_and_die(job: TrainingJob, point: str) -> None:
    with training(job, 3) as trainer:
        train, saver = trainer(job), Saver(job)
        saved_steps(saver, train, range(1, 2))
        die_at(point)
        saved_steps(saver, train, range(2, 3))
        time.sleep(3600)  # the others are killed by the test


POINTS = {"save": 1, "upload": 1, "between": 1, "commit": 1, "after": 2}
"""Where one rank is killed, and the step that is to be found then."""


def go_on_after_deaths(job: TrainingJob, out: str) -> None:
    with training(job, 4) as trainer:
        train = trainer(job)
        for point in POINTS:
            here = replace(job, root=rooted(job, f"killed-{point}"))
            restored = restore(train.engine, here)
            assert restored is not None
            outcomes = saved_steps(Saver(here), train, range(restored.step + 1, restored.step + 2))
            note(out, point, {"step": restored.step, "rejected": restored.rejected, "outcomes": outcomes})


def test_a_rank_killed_in_a_save_leaves_the_old_or_new_whole(job: TrainingJob, tmp_path: Path) -> None:
    here = replace(job, local=str(tmp_path / "local"))
    for point in POINTS:
        workers = start_workers(save_and_die, 2, replace(here, root=rooted(job, f"killed-{point}")), point)
        victim = workers[1] if point in ("save", "upload") else workers[0]
        victim.join(600)
        code = victim.exitcode
        for worker in workers:
            worker.kill()
            worker.join()
        assert code == -signal.SIGKILL, f"not killed at {point}: {code}"
    run_workers(go_on_after_deaths, 2, here, str(tmp_path))
    for point, step in POINTS.items():
        notes = noted(str(tmp_path), point)
        assert notes["step"] == step and notes["rejected"] == [], point
        assert [outcome["fault"] for outcome in notes["outcomes"]] == [None], point
    assert os.listdir(here.scratch) == [], "what dead processes left on the local disk"


# -- damage -----------------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """Turn over one bit."""
    data = bytearray(path.read_bytes())
    at = random.Random(path.name).randrange(len(data) * 8)
    data[at // 8] ^= 1 << at % 8
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def one(step: Path, pattern: str) -> Path:
    return next(step.glob(pattern))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "rank 1's shard cut short": (lambda step: cut(one(step, "*/*rank_1_*optim*")), r"rank_1_\w+optim_states\.pt is damaged \(\d+ bytes"),
    "a bit of rank 0's shard": (lambda step: flip(one(step, "*/*rank_0_*optim*")), r"rank_0_\w+optim_states\.pt is damaged"),
    "a bit of the model states": (lambda step: flip(one(step, "*/mp_rank*")), r"mp_rank_00_model_states\.pt is damaged"),
    "a shard gone": (lambda step: one(step, "*/*rank_1_*optim*").unlink(), r"optim_states\.pt is missing"),
    "a bit of the manifest": (lambda step: flip(one(step, "*/manifest.json")), r"manifest\.json is damaged \(crc32c"),
    "the manifest gone": (lambda step: one(step, "*/manifest.json").unlink(), r"manifest\.json is missing"),
    "a bit of the marker": (lambda step: flip(step / "COMMITTED"), r"COMMITTED|manifest\.json"),
    "an empty marker": (lambda step: (step / "COMMITTED").write_bytes(b""), r"COMMITTED is damaged"),
    "a marker and nothing else": (lambda step: shutil.rmtree(one(step, "2*")), r"manifest\.json is missing"),
    "no marker: not committed": (lambda step: (step / "COMMITTED").unlink(), ""),
}
"""What is done to the newest checkpoint, and the reported fault."""


def restore_the_damaged(job: TrainingJob, out: str) -> None:
    with training(job, 4) as trainer:
        train = trainer(job)
        for number in range(len(DAMAGE) + 1):
            here = replace(job, root=join(out, str(number)))
            try:
                restored = restore(train.engine, here)
                note(
                    out,
                    f"{number}",
                    {"step": restored.step, "rejected": [vars(each) for each in restored.rejected], "at": train.digest()["steps"]},
                )
            except UserError as error:
                note(out, f"{number}", {"error": str(error)})


def save_three_and_go_back(job: TrainingJob, out: str) -> None:
    with training(job, 4) as trainer:
        train, saver = trainer(job), Saver(job)
        saved_steps(saver, train, range(1, 3))
        before = [train.digest(), train.losses(2, 4)]
        saved_steps(saver, train, range(3, 4))
        restored = restore(train.engine, job, at_most=2)
        note(out, "back", {"step": restored.step, "before": before, "after": [train.digest(), train.losses(2, 4)]})


@pytest.fixture(scope="module")
def whole(job: TrainingJob, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingJob, str]:
    """Two checkpoints, after one more was taken back."""
    out = tmp_path_factory.mktemp("whole")
    here = replace(job, root=rooted(job, "whole"), local=str(out / "local"))
    run_workers(save_three_and_go_back, 2, here, str(out))
    return here, str(out)


def test_going_back_to_a_step_undoes_the_later_ones(whole: tuple[TrainingJob, str]) -> None:
    here, out = whole
    notes = noted(out, "back")
    assert notes["step"] == 2 and notes["after"] == notes["before"]
    assert committed_steps(here.checkpoints) == [1, 2]


def test_damaged_checkpoints_are_rejected_by_name(whole: tuple[TrainingJob, str], tmp_path: Path) -> None:
    """What is not committed is skipped without a message."""
    here, _ = whole
    for number, (damage, _) in enumerate(DAMAGE.values()):
        shutil.copytree(here.root, tmp_path / str(number), symlinks=True)
        damage(tmp_path / str(number) / "checkpoints" / "pretrain" / "step-00000002")
    hopeless = tmp_path / str(len(DAMAGE))
    shutil.copytree(here.root, hopeless, symlinks=True)
    for step in sorted((hopeless / "checkpoints" / "pretrain").iterdir()):
        flip(one(step, "*/manifest.json"))
    run_workers(restore_the_damaged, 2, here, str(tmp_path))
    for number, (name, (_, fault)) in enumerate(DAMAGE.items()):
        notes = noted(str(tmp_path), str(number))
        assert (notes["step"], notes["at"]) == (1, 1), name
        if fault:
            (rejected,) = notes["rejected"]
            assert re.search(fault, rejected["fault"]) and rejected["uri"].endswith("step-00000002"), (name, rejected)
            assert committed_steps(str(tmp_path / str(number) / "checkpoints" / "pretrain")) == [1], f"{name}: still counts as committed"
        else:
            assert notes["rejected"] == []
    assert "no checkpoint of this stage can be used" in noted(str(tmp_path), str(len(DAMAGE)))["error"]
    assert committed_steps(str(hopeless / "checkpoints" / "pretrain")) == [1, 2], "nothing is taken back when nothing else is there"


SICK = (("manifest", 0), ("shard", 0), ("shard", 1))
"""What a host reads wrong, and the rank on it."""


def restore_on_sick_hosts(job: TrainingJob, out: str) -> None:
    """Each rank is on a host of its own, and one after the other reads wrong bytes, as with damaged memory."""
    from oar_scale.distributed.checkpoints import fetch, layout

    rank = int(os.environ["RANK"])
    import_module("oar_scale.distributed.checkpoints.restore").socket = SimpleNamespace(gethostname=lambda: f"host-{rank}")  # type: ignore[attr-defined]
    crc, manifest_crc = fetch.crc32c, layout.crc32c  # type: ignore[attr-defined]
    with training(job, 4) as trainer:
        train = trainer(job)
        for what, sick in SICK:
            if rank == sick:
                fetch.crc32c = (lambda *_: 0) if what == "shard" else crc  # type: ignore[attr-defined]
                layout.crc32c = SimpleNamespace(crc32c=lambda _: 0) if what == "manifest" else manifest_crc  # type: ignore[attr-defined]
            try:
                restore(train.engine, job)
                error = "restored"
            except RuntimeError as raised:
                error = str(raised)
            fetch.crc32c, layout.crc32c = crc, manifest_crc  # type: ignore[attr-defined]
            note(out, f"{what} {sick}", error)
        restored = restore(train.engine, job)
        assert restored is not None
        note(out, "healthy", restored.step)


def test_one_sick_host_takes_no_checkpoint_from_the_others(whole: tuple[TrainingJob, str], tmp_path: Path) -> None:
    """What one host alone reads as damaged stays committed, and the error names the host."""
    here, _ = whole
    root = str(tmp_path / "root")
    shutil.copytree(here.root, root, symlinks=True)
    job = replace(here, root=root)
    run_workers(restore_on_sick_hosts, 2, job, str(tmp_path))
    for what, sick in SICK:
        error = noted(str(tmp_path), f"{what} {sick}")
        found = rf"00002: rank {sick} on host host-{sick} finds that .*is damaged.*; rank {1 - sick} on host host-{1 - sick}"
        assert re.search(found, error), error
    assert noted(str(tmp_path), "healthy") == 2
    assert committed_steps(job.checkpoints) == [1, 2]


def test_an_interrupted_download_needs_no_room_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, disk, calls = 4 << 20, 10 << 20, list[str]()
    files = {name: {"bytes": size, "crc32c": 0} for name in ("a", "b")}
    checkpoint = Checkpoint("s3://b/step-00000100", "20261123T085016Z-3f9a2c1b", {"files": files})

    def download(checkpoint: Checkpoint, name: str, path: str, *_: object) -> None:
        calls.append(name)
        if calls == ["a", "b"]:
            raise Unreachable("s3://b: no connection")
        Path(path).write_bytes(os.urandom(size))

    def usage(path: str) -> Any:
        return SimpleNamespace(free=disk - sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()))

    monkeypatch.setattr(fetch, "_download", download)
    monkeypatch.setattr(fetch.shutil, "disk_usage", usage)
    monkeypatch.setattr("oar_scale.distributed.checkpoints.deepspeed_files.load_shard", lambda *_: {})
    retry_transient(lambda: fetch.obtain(checkpoint, ["a", "b"], str(tmp_path)), 60, sleep=lambda seconds: None)
    assert calls == ["a", "b", "a", "b"]


def test_a_disk_that_is_too_small_for_a_copy_is_named_with_its_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands about checkpoints read no recipe: what a training sets in it would not help them."""
    files = {"mp_rank_00_model_states.pt": {"bytes": 10, "crc32c": 0}}
    checkpoint = Checkpoint("s3://b/step-00000100", "20261123T085016Z-3f9a2c1b", {"files": files})
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    monkeypatch.setattr(fetch, "read_checkpoint", lambda uri: checkpoint)
    with pytest.raises(UserError, match=r"1 are free\..*storage\.scratch_dir"):
        fetch.obtain(checkpoint, files, str(tmp_path))
    with pytest.raises(UserError, match=r"1 are free\. Free some, or set the environment variable TMPDIR to another disk\."):
        fetch.local_checkpoint(checkpoint.uri).__enter__()


def test_a_rejected_checkpoint_leaves_its_room_to_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk holds one; the last file of the newer one is damaged."""
    size, disk = 4 << 20, 10 << 20
    files = {name: {"bytes": size, "crc32c": 0, "rank": 0} for name in ("mp_rank_a", "mp_rank_b")}
    newer, older = (
        Checkpoint(f"s3://b/step-0000000{step}", f"20261123T085016Z-3f9a2c1{step}", {"files": files, "world_size": 1, "zero_stage": 2})
        for step in (2, 1)
    )
    calls: list[str] = []

    def download(checkpoint: Checkpoint, name: str, path: str, *_: object) -> None:
        calls.append(path)
        Path(path).write_bytes(os.urandom(size))
        if len(calls) == 2:
            raise DamagedCheckpoint(f"{name} is damaged", name)

    def usage(path: str) -> Any:
        return SimpleNamespace(free=disk - sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()))

    monkeypatch.setattr(fetch, "_download", download)
    monkeypatch.setattr(fetch.shutil, "disk_usage", usage)
    monkeypatch.setattr("oar_scale.distributed.checkpoints.deepspeed_files.load_shard", lambda *_: {})
    here = import_module("oar_scale.distributed.checkpoints.restore")
    monkeypatch.setattr(here, "_all_gather", lambda value: [value])
    monkeypatch.setattr(here, "_fits", lambda *_: True)
    scratch = object.__new__(here._HostScratch)
    scratch._ranks, scratch._index, scratch._path = [0], 0, str(tmp_path / "scratch")
    assert list(scratch.obtain(newer, None)) == [0]
    assert scratch.obtain(older, None) == {}
    assert sorted(path.parent.name for path in tmp_path.rglob("mp_rank_*")) == [older.save] * 2
