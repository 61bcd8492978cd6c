"""Rows follow from the events alone; a stage's state is the same whoever reads it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from oar_scale.observe.events import EventEntry, EventLog, EventReader
from oar_scale.observe.projection import RowProjection, WandbRow
from oar_scale.observe.state import StageState
from tests.observe import synthetic_run
from tests.observe.documented import promised_fields


def read(events: Path, stage: str = "pretrain") -> list[EventEntry]:
    return list(EventReader(str(events), stage).poll())


def rows(entries: Iterable[EventEntry]) -> list[WandbRow]:
    projection = RowProjection()
    return [row for entry in entries if (row := projection.take(entry.attempt, entry.event)[0])]


def train_steps(made: list[WandbRow]) -> list[float]:
    return [row.values["train/step"] for row in made if "train/step" in row.values]


def test_the_documentation_names_exactly_the_fields_of_events(tmp_path: Path) -> None:
    events = synthetic_run.whole_run(tmp_path)
    fields: dict[str, set[str]] = {}
    for stage in ("pretrain", "tokenizer", "extract"):
        for entry in read(events, stage):
            fields.setdefault(entry.event["kind"], set()).update(set(entry.event) - {"time", "stage", "kind", "non_finite"})
    assert fields == promised_fields()


def test_the_same_files_give_the_same_numbered_rows(tmp_path: Path) -> None:
    entries = read(synthetic_run.whole_run(tmp_path))
    first, second = rows(entries), rows(entries)
    assert first == second and [row.number for row in first] == list(range(len(first)))
    assert rows(entries[:10]) == first[: len(rows(entries[:10]))]


def test_a_repeated_step_is_one_row_and_a_late_checkpoint_too(tmp_path: Path) -> None:
    with EventLog(str(tmp_path), "pretrain") as log:
        synthetic_run.start(log)
        for step in (10, 20, 30):
            synthetic_run.train(log, step)
        synthetic_run.checkpoint(log, 20)
    with EventLog(str(tmp_path), "pretrain") as log:
        synthetic_run.start(log, 20)
        synthetic_run.train(log, 30, loss=7.0)
        synthetic_run.train(log, 40)
        synthetic_run.checkpoint(log, 20)  # reported again
        synthetic_run.checkpoint(log, 40)
    made = rows(read(tmp_path))
    assert train_steps(made) == [10, 20, 30, 40]
    assert [row.values["checkpoint/step"] for row in made if "checkpoint/step" in row.values] == [20, 40]
    assert 7.0 not in [row.values.get("train/loss") for row in made]


def test_a_roll_back_sends_no_step_a_second_time(tmp_path: Path) -> None:
    with EventLog(str(tmp_path), "pretrain") as log:
        synthetic_run.start(log)
        for step in (10, 20, 30):
            synthetic_run.train(log, step)
        synthetic_run.checkpoint(log, 10)
        log.emit("spike", step=30, loss=9.0, expected=3.0, action="rollback")
    with EventLog(str(tmp_path), "pretrain") as log:
        synthetic_run.start(log, 10)
        for step in (20, 30, 40):
            synthetic_run.train(log, step)
    assert train_steps(rows(read(tmp_path))) == [10, 20, 30, 40]
    state = StageState("pretrain")
    state.read(EventReader(str(tmp_path), "pretrain"))
    assert (state.step, state.attempts, state.totals["spike"]) == (40, 2, 1)


def test_only_a_start_from_nothing_after_a_commit_begins_anew(tmp_path: Path) -> None:
    def attempt(start_step: int, *, checkpoint: bool = False, rejected: bool = False) -> None:
        with EventLog(str(tmp_path), "pretrain") as log:
            if rejected:
                log.emit("rejected_checkpoint", uri="step-10", fault="bad checksum")
            synthetic_run.start(log, start_step)
            synthetic_run.train(log, start_step + 10)
            if checkpoint:
                synthetic_run.checkpoint(log, start_step + 10)

    def generations() -> int:
        projection = RowProjection()
        for entry in read(tmp_path):
            projection.take(entry.attempt, entry.event)
        return projection.generation

    attempt(0)
    attempt(0, checkpoint=True)  # killed before its first checkpoint: the same run
    attempt(10)
    attempt(0, rejected=True)  # nothing usable was left: the same run
    assert generations() == 0
    attempt(0)  # everything was removed
    assert generations() == 1
    attempt(0)
    assert generations() == 1


def pool(log: EventLog, done: int) -> None:
    log.emit("pool", done=done, total=96, images_per_s=40.0, actors=1, retries=0, deaths=0, late=0)


def pool_rows(events: Path) -> list[tuple[int, float, int]]:
    """Number, images done and W&B run of each point of the pools' curve."""
    projection = RowProjection()
    made = [(projection.take(e.attempt, e.event)[0], projection.generation) for e in read(events, "extract")]
    return [(row.number, row.values["pool/done"], run) for row, run in made if row and "pool/done" in row.values]


def test_a_pool_that_was_complete_and_works_again_begins_anew(tmp_path: Path) -> None:
    for done in ((48, 96), (24,), (72,)):
        with EventLog(str(tmp_path), "extract") as log:
            pool(log, 0)
            log.emit("actor_started", host="a")
            for each in done:
                pool(log, each)
    assert pool_rows(tmp_path) == [(0, 0, 0), (2, 48, 0), (3, 96, 0), (1, 24, 1), (3, 72, 1)]
    state = StageState("extract")
    state.read(EventReader(str(tmp_path), "extract"))
    assert (state.step, state.status, state.totals["actor_started"]) == (72, "running", 2)


def test_pools_at_work_at_the_same_time_are_one_run(tmp_path: Path) -> None:
    """Three tasks of an array, each of which learns late what the others have done, and one that comes when all is complete."""
    logs = [EventLog(str(tmp_path), "extract") for _ in range(3)]
    for log in logs:
        pool(log, 0)
        log.emit("actor_started", host="a")
    for task, done in ((0, 32), (1, 24), (2, 16), (0, 64), (0, 96), (1, 48), (2, 96), (1, 96)):
        if task == 2:
            logs[task].emit("retry", shard="0", attempt=2, error="an actor died")
        pool(logs[task], done)
    logs.append(EventLog(str(tmp_path), "extract"))
    for done in (0, 48, 96):
        pool(logs[3], done)
    for log in logs:
        log.close()
    rows = pool_rows(tmp_path)
    assert [(done, run) for _, done, run in rows] == [(0, 0), (32, 0), (64, 0), (96, 0)]
    projection = RowProjection()
    for entry in read(tmp_path, "extract"):
        projection.take(entry.attempt, entry.event)
    assert projection.complete and projection.rows == 4 + 3 + 2, "points, actors and retries are rows"
    state = StageState("extract")
    state.read(EventReader(str(tmp_path), "extract"))
    assert (state.step, state.status) == (96, "done")
    assert (state.totals["actor_started"], state.totals["retry"]) == (3, 2), "what the first tasks counted is kept"


def test_pace_and_time_left_count_from_the_start_of_the_attempt() -> None:
    state = StageState("pretrain")

    def event(attempt: int, time: float, kind: str, **fields: object) -> None:
        state.take(attempt, {"time": time, "stage": "pretrain", "kind": kind, **fields})

    event(0, 100.0, "start", start_step=0, steps=100)
    event(0, 110.0, "train", step=60, images_per_s=10.0)
    event(1, 1000.0, "start", start_step=20, steps=100)
    assert state.seconds_left() is None
    event(1, 1010.0, "train", step=40, images_per_s=30.0)
    event(1, 1020.0, "heldout", step=40, nll_random=3.0)
    event(1, 1030.0, "train", step=60, images_per_s=20.0)
    assert state.per_second() == 40 / 30 and state.seconds_left() == 30.0
    assert (state.attempts, state.median_images_per_s, state.status) == (2, 20.0, "running")


def test_an_attempt_after_one_that_was_stopped_is_running() -> None:
    """The training of an image tokenizer logs no start; its next attempt begins with a step."""
    state = StageState("tokenizer")
    for attempt, kind, step in ((0, "vq", 20), (0, "stopping", 27), (1, "vq", 40)):
        state.take(attempt, {"time": 1.0 + step, "stage": "tokenizer", "kind": kind, "step": step})
        assert state.status == ("stopping" if kind == "stopping" else "running")
