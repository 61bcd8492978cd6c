"""``oar status`` and ``oar tail`` on runs that go well, hang, or are none."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest

from oar_scale.cli import main
from oar_scale.errors import UserError
from oar_scale.observe import events
from oar_scale.observe.events import EventLog
from oar_scale.observe.mirror import open_log
from oar_scale.observe.run_location import find_run
from oar_scale.observe.status import status
from oar_scale.storage import join, write_json
from tests.observe import synthetic_run


def finish(folder: Path, *stages: str) -> None:
    for stage in stages:
        write_json(str(folder / "stages" / f"{stage}.json"), {"stage": stage, "seconds": 12.0})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """That of the events: a hundredth of a second passes with each, whatever the machine needs for it."""
    now_clock = SimpleNamespace(now=1.8e9)

    def tick() -> float:
        now_clock.now += 0.01
        return float(now_clock.now)

    monkeypatch.setattr(events, "time", SimpleNamespace(time=tick))
    return now_clock


def screen(folder: Path, now: float) -> str:
    return status(find_run(str(folder)), now)


def stage_lines(text: str, stage: str) -> list[str]:
    lines = text.splitlines()
    begin = next(index for index, line in enumerate(lines) if line.startswith(f"{stage} "))
    rest = lines[begin + 1 :]
    own = next((index for index, line in enumerate(rest) if not line.startswith(" ")), len(rest))
    return [line.strip() for line in lines[begin : begin + 1 + own]]


def test_arms_stand_with_the_stage_that_they_are_of_seed_by_seed(tmp_path: Path, clock: SimpleNamespace) -> None:
    ordered = [
        "extract",
        "extract_gt",
        "finetune",
        "gt",
        "raster",
        "finetune.s1",
        "gt.s1",
        "finetune.s10",
        "control",
        "control.s1",
        "report",
    ]
    finish(tmp_path, *sorted(ordered, reverse=True))
    lines = screen(tmp_path, clock.now).splitlines()[1:]
    assert [line.split()[0] for line in lines] == ordered
    assert len({line.index("done in") for line in lines}) == 1


def test_a_running_stage_shows_progress_speed_and_checkpoint(tmp_path: Path, clock: SimpleNamespace) -> None:
    finish(tmp_path, "data")
    synthetic_run.interrupted(tmp_path / "events")
    with EventLog(str(tmp_path / "events"), "pretrain") as log:
        synthetic_run.start(log, 50)
        synthetic_run.train(log, 60)
        synthetic_run.train(log, 70)
        synthetic_run.heldout(log, 70)
    text = screen(tmp_path, clock.now + 5)
    assert stage_lines(text, "data") == ["data       done in 12 s"]
    head, *details = stage_lines(text, "pretrain")
    assert head.startswith("pretrain   running  step 70 of 100 (70%)") and head.endswith("left  last progress 5 s ago")
    assert details[:4] == [
        "61.0 images/s (median 61.0, 100% of it; plan 64.0, 95%)  mfu 0.31  data wait 0.5%",
        "loss 3.194  held-out NLL 3.294 at step 70",
        "checkpoint of step 50, committed 5 s ago",
        "2 workers, ZeRO 2, attempt 2 (1 restart)  skipped batches 2  bad samples 1  storage retries 1",
    ]
    assert [line.split()[2] + " " + line.split()[3] for line in details[4:]] == ["non-finite batch:", "loss spike:", "checkpoint failed:"]
    assert "loss nan and grad_norm inf (samples 3, 17, 99)" in text


def test_finished_stalled_and_failed_runs_are_distinguished(tmp_path: Path, clock: SimpleNamespace) -> None:
    synthetic_run.whole_run(tmp_path)
    text = screen(tmp_path, clock.now + 5000)
    assert stage_lines(text, "pretrain")[0] == "pretrain   done  step 100 of 100 (100%)"
    assert stage_lines(text, "extract")[0] == "extract    done  step 96 of 96 (100%)"
    finish(tmp_path, "pretrain")
    assert stage_lines(screen(tmp_path, clock.now + 5000), "pretrain")[0] == "pretrain   done in 12 s"
    other = tmp_path / "other"
    with EventLog(str(other / "events"), "finetune") as log:
        synthetic_run.start(log)
        synthetic_run.train(log, 10)
    assert stage_lines(screen(other, clock.now + 599), "finetune")[0].startswith("finetune   running  step 10 of 100 (10%)")
    head = stage_lines(screen(other, clock.now + 900), "finetune")[0]
    assert head == "finetune   STALLED, or ended without an event, while running:  step 10 of 100 (10%)  last progress 15 min 00 s ago"
    with EventLog(str(other / "events"), "finetune") as log:
        log.emit("worker_failure", cause="a node was lost")
    text = screen(other, clock.now + 5)
    assert stage_lines(text, "finetune")[0].startswith("finetune   failed  step 10")
    assert "worker failure: the workers failed: a node was lost" in text
    with EventLog(str(other / "events"), "finetune") as log:
        log.emit("failed", cause="RuntimeError: no room on the device", final=False, host="n", pid=1)
    head = stage_lines(screen(other, clock.now + 5000), "finetune")[0]
    assert head == "finetune   failed  step 10 of 100 (10%)  its job starts it again  last progress 1 h 23 min ago"
    with EventLog(str(other / "events"), "finetune") as log:
        log.emit("failed", cause="RuntimeError: no room on the device", final=True, host="n", pid=1)
    text = screen(other, clock.now + 5000)
    assert stage_lines(text, "finetune")[0] == "finetune   failed  step 10 of 100 (10%)  last progress 1 h 23 min ago"
    assert "failed: the stage has ended: RuntimeError: no room on the device" in text


def test_a_torn_line_and_a_run_just_begun_are_no_trouble(tmp_path: Path, clock: SimpleNamespace) -> None:
    with EventLog(str(tmp_path / "events"), "pretrain") as log:
        synthetic_run.start(log)
        path = Path(log.path)
    assert stage_lines(screen(tmp_path, clock.now), "pretrain")[0] == "pretrain   starting  step 0 of 100 (0%)  last progress 0 s ago"
    with open(path, "a") as file:
        file.write('{"time": 5, "kind": "tra')
    EventLog(str(tmp_path / "events"), "finetune").close()  # opened, and killed before a word
    text = screen(tmp_path, clock.now)
    assert stage_lines(text, "finetune") == ["finetune   waiting  last progress 0 s ago"]


@pytest.mark.parametrize("what", ["nothing", "an empty folder", "a folder of something else"])
def test_what_is_no_run_is_said_to_be_none(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs"
    if what != "nothing":
        folder.mkdir()
    if what == "a folder of something else":
        (folder / "notes.txt").write_text("?")
    assert main(["status", str(folder)]) == 2
    assert main(["tail", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count(f"{folder}: no run here") == 2 and "runs/NAME" in error


def test_a_run_is_found_by_its_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthetic_run.whole_run(tmp_path / "run")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"name: emoji\nrun_dir: {tmp_path / 'run'}\n")
    assert main(["status", str(recipe)]) == 0
    assert capsys.readouterr().out.startswith(f"emoji ({tmp_path / 'run'})\n")


def test_a_run_in_s3_is_seen_from_anywhere(tmp_path: Path, s3_root: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = f"{s3_root}/{uuid.uuid4().hex[:8]}"
    with open_log(str(tmp_path / "events"), "pretrain", root, 0.1) as log:
        synthetic_run.start(log)
        synthetic_run.train(log, 10)
    write_json(join(root, "stages", "tokens.json"), {"stage": "tokens", "seconds": 70.0})
    assert main(["status", root]) == 0
    text = capsys.readouterr().out
    assert stage_lines(text, "tokens") == ["tokens     done in 1 min 10 s"]
    assert stage_lines(text, "pretrain")[0].startswith("pretrain   running  step 10 of 100 (10%)")
    assert main(["tail", root, "-n", "1"]) == 0
    assert "train               step 10" in capsys.readouterr().out
    with pytest.raises(UserError, match="no run here"):
        find_run(f"{root}-else")


def test_tail_prints_the_last_events_of_all_stages_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthetic_run.whole_run(tmp_path)
    assert main(["tail", str(tmp_path), "-n", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:3] for line in lines] == [["tokenizer", "end"], ["extract", "pool"], ["extract", "pool"]]
    assert lines[-1].endswith("done 96  total 96  images_per_s 40  actors 2  retries 0  deaths 0  late 0")
    assert main(["tail", str(tmp_path), "--kind", "spike", "--kind", "worker_failure"]) == 0
    text = capsys.readouterr().out
    assert "pretrain  spike               step 30: loss 9.000 where 3.200 was expected; going on" in text
    assert "pretrain  worker_failure      the workers failed: ActorDiedError: rank 1" in text
    assert len(text.splitlines()) == 2


def test_tail_follows_attempts_and_stages_that_appear(tmp_path: Path) -> None:
    folder = tmp_path / "events"
    synthetic_run.interrupted(folder)
    command = [sys.executable, "-m", "oar_scale.cli", "tail", str(tmp_path), "-n", "1", "-f", "--kind", "train"]
    following = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert following.stdout is not None
        assert "step 60" in following.stdout.readline()
        synthetic_run.resumed(folder)
        assert [following.stdout.readline().split()[4] for _ in range(5)] == ["60", "70", "80", "90", "100"]
        with EventLog(str(folder), "finetune") as log:
            synthetic_run.train(log, 10)
        assert following.stdout.readline().split()[1:5] == ["finetune", "train", "step", "10"]
    finally:
        following.terminate()
        following.wait()


def test_a_reader_of_tail_may_leave(tmp_path: Path) -> None:
    synthetic_run.whole_run(tmp_path)
    done = subprocess.run(
        f"{sys.executable} -m oar_scale.cli tail {tmp_path} -n 1000 | head -1", shell=True, capture_output=True, text=True
    )
    assert len(done.stdout.splitlines()) == 1 and "Traceback" not in done.stderr


def test_both_answer_without_torch_in_half_a_second_of_cpu(tmp_path: Path) -> None:
    synthetic_run.whole_run(tmp_path)
    finish(tmp_path, "data", "tokens")
    for verb in ("status", "tail"):
        code = f"""
import sys, resource
from oar_scale.cli import main
assert main([{verb!r}, {str(tmp_path)!r}]) == 0
used = resource.getrusage(resource.RUSAGE_SELF)
heavy = {{"torch", "ray", "wandb", "boto3", "rich", "numpy"}} & set(sys.modules)
assert not heavy, heavy
assert used.ru_utime + used.ru_stime < 0.5, used
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
        assert done.returncode == 0, done.stderr
