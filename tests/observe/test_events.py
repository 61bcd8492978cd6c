"""The event files: what survives a kill, a restart and a number that is not one."""

import json
import resource
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oar_scale.errors import UserError
from oar_scale.observe.events import (
    Event,
    EventLog,
    EventReader,
    attempt_path,
    next_local,
    parse_line,
    read_events,
    resumed_attempts,
    stages_with_events,
)
from oar_scale.observe.formatting import line as format_line


def steps(events: list[Event], kind: str = "train") -> list[tuple[int, float]]:
    return [(e["step"], e["loss"]) for e in events if e["kind"] == kind]


def write_attempt(folder: Path, start_step: int, last_step: int, loss: float) -> str:
    with EventLog(str(folder), "pretrain") as log:
        log.emit("start", steps=100, start_step=start_step)
        for step in range(start_step + 1, last_step + 1):
            log.emit("train", step=step, loss=loss)
    return log.path


def test_each_attempt_is_a_file_of_its_own(tmp_path: Path) -> None:
    paths = [write_attempt(tmp_path, 0, 1, 1.0) for _ in range(3)]
    assert [Path(p).name for p in paths] == ["pretrain-000.jsonl", "pretrain-001.jsonl", "pretrain-002.jsonl"]
    assert read_events(str(tmp_path), "extract") == []


def test_replayed_steps_count_once_and_the_last_attempt_wins(tmp_path: Path) -> None:
    write_attempt(tmp_path, 0, 8, loss=1.0)
    write_attempt(tmp_path, 5, 7, loss=2.0)
    # Step 8 of the first attempt was undone too: the second one has not come that far yet.
    assert steps(read_events(str(tmp_path), "pretrain")) == [(s, 1.0) for s in range(1, 6)] + [(6, 2.0), (7, 2.0)]


def test_an_evaluation_repeated_at_the_resumed_step_replaces_it(tmp_path: Path) -> None:
    for nll in (3.0, 2.5):
        with EventLog(str(tmp_path), "pretrain") as log:
            log.emit("start", start_step=5)
            log.emit("heldout", step=5, nll_random=nll)
    assert [e["nll_random"] for e in read_events(str(tmp_path), "pretrain") if e["kind"] == "heldout"] == [2.5]


def test_an_attempt_killed_before_its_first_event_undoes_nothing(tmp_path: Path) -> None:
    write_attempt(tmp_path, 0, 3, loss=1.0)
    EventLog(str(tmp_path), "pretrain").close()
    assert len(steps(read_events(str(tmp_path), "pretrain"))) == 3


def test_a_torn_last_line_is_skipped_and_one_inside_is_an_error(tmp_path: Path) -> None:
    path = Path(write_attempt(tmp_path, 0, 3, loss=1.0))
    text = path.read_text()
    path.write_text(text[:-10])
    assert steps(read_events(str(tmp_path), "pretrain")) == [(1, 1.0), (2, 1.0)]
    write_attempt(tmp_path, 2, 4, loss=2.0)
    assert steps(read_events(str(tmp_path), "pretrain")) == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    path.write_text(text.replace('"step": 2', '"step"', 1))
    with pytest.raises(UserError, match=r"pretrain-000\.jsonl:3"):
        read_events(str(tmp_path), "pretrain")


def test_non_finite_numbers_stay_valid_json_and_are_named(tmp_path: Path) -> None:
    with EventLog(str(tmp_path), "pretrain") as log:
        log.emit("train", step=1, loss=float("nan"), grad_norm=np.float32("inf"), by_cell=[1.0, float("-inf")])

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    event = json.loads(Path(log.path).read_text(), parse_constant=refuse)
    assert event["loss"] is None and event["grad_norm"] is None and event["by_cell"] == [1.0, None]
    assert event["non_finite"] == {"loss": "nan", "grad_norm": "inf", "by_cell.1": "-inf"}


def test_numpy_and_torch_scalars_are_written_as_numbers(tmp_path: Path) -> None:
    import torch

    with EventLog(str(tmp_path), "pretrain") as log:
        log.emit("train", step=np.int64(3), loss=torch.tensor(0.5), order=np.arange(3))
    [event] = read_events(str(tmp_path), "pretrain")
    assert (event["step"], event["loss"], event["order"]) == (3, 0.5, [0, 1, 2])


def test_a_line_is_readable_at_once(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path), "pretrain")
    log.emit("train", step=1, loss=1.0)
    assert len(read_events(str(tmp_path), "pretrain")) == 1
    log.close()


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    def work(log: EventLog) -> None:
        for done in range(200):
            log.emit("pool", done=done, total=200, text="x" * 500)

    with EventLog(str(tmp_path), "extract") as log:
        threads = [threading.Thread(target=work, args=(log,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(read_events(str(tmp_path), "extract")) == 800


def test_reserved_fields_and_bad_names_are_refused(tmp_path: Path) -> None:
    with EventLog(str(tmp_path), "pretrain") as log, pytest.raises(ValueError, match="time"):
        log.emit("train", time=3)
    with pytest.raises(ValueError, match=r"\.\./up"):
        EventLog(str(tmp_path), "../up")


def test_an_attempt_may_be_given_its_number(tmp_path: Path) -> None:
    with EventLog(str(tmp_path), "pretrain", attempt=4) as log:
        assert (log.attempt, Path(log.path).name) == (4, "pretrain-004.jsonl")
    with EventLog(str(tmp_path), "pretrain", attempt=4) as log:
        assert log.attempt == 5  # two that start at once never share a file
    with EventLog(str(tmp_path), "pretrain") as log:
        assert log.attempt == 6


def test_a_full_disk_ends_nothing_and_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with EventLog(str(tmp_path), "pretrain") as log:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))  # the kernel cuts off a write in the middle of a line
            for step in range(1, 21):
                log.emit("train", step=step, loss=1.0)
            assert Path(log.path).stat().st_size == 700
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert len(read_events(str(tmp_path), "pretrain")) < 20
        log.emit("train", step=21, loss=1.0)
    assert [step for step, _ in steps(read_events(str(tmp_path), "pretrain"))] == list(range(1, 22))
    assert caplog.text.count("kept in memory") == 1


def polled(reader: EventReader) -> list[object]:
    return [entry.event.get("step", entry.event["kind"]) for entry in reader.poll()]


def test_a_reader_gets_each_event_once_and_only_whole_lines(tmp_path: Path) -> None:
    reader = EventReader(str(tmp_path), "pretrain")
    assert polled(reader) == []
    path = Path(write_attempt(tmp_path, 0, 2, loss=1.0))
    assert polled(reader) == ["start", 1, 2]
    with open(path, "a") as file:
        file.write('{"time": 1, "kind": "train", "st')
        file.flush()
        assert polled(reader) == []
        file.write('ep": 3}\n')
    assert polled(reader) == [3]
    write_attempt(tmp_path, 2, 4, loss=1.0)
    assert polled(EventReader(str(tmp_path), "pretrain", from_now=True)) == []
    assert polled(reader) == ["start", 3, 4]
    assert [entry.attempt for entry in EventReader(str(tmp_path), "pretrain").poll()] == [0] * 4 + [1] * 3


def test_a_reader_that_stops_half_way_goes_on_there(tmp_path: Path) -> None:
    write_attempt(tmp_path, 0, 3, loss=1.0)
    reader = EventReader(str(tmp_path), "pretrain")
    poll = reader.poll()
    assert [next(poll).event["kind"], next(poll).event["step"]] == ["start", 1]
    assert polled(reader) == [2, 3]


def test_driver_events_are_in_order_and_undo_nothing(tmp_path: Path) -> None:
    with EventLog(str(tmp_path), "pretrain") as driver:
        write_attempt(tmp_path, 0, 1, loss=1.0)
        driver.emit("worker_failure", cause="lost")
        write_attempt(tmp_path, 1, 2, loss=1.0)
    entries = list(EventReader(str(tmp_path), "pretrain").poll())
    assert [(e.attempt, e.event["kind"]) for e in entries] == [
        (1, "start"), (1, "train"), (0, "worker_failure"), (2, "start"), (2, "train"),
    ]  # fmt: skip
    assert steps(read_events(str(tmp_path), "pretrain")) == [(1, 1.0), (2, 1.0)]
    assert stages_with_events(str(tmp_path)) == ["pretrain"]


def write_times(folder: Path, *events: tuple[float, str, dict[str, int]]) -> None:
    """The next attempt, of events at these times."""
    lines = [json.dumps({"time": at, "stage": "pretrain", "kind": kind, **fields}) + "\n" for at, kind, fields in events]
    Path(attempt_path(str(folder), "pretrain", next_local(str(folder), "pretrain"))).write_text("".join(lines))


def test_a_training_took_as_long_as_the_attempts_it_resumed(tmp_path: Path) -> None:
    """Pauses between them, what was begun anew, and what is still under way do not count; steps that were done twice do."""
    write_times(tmp_path, (1000, "start", {"start_step": 0}), (1900, "train", {"step": 90}))
    write_times(tmp_path, (5000, "start", {"start_step": 0}), (5100, "train", {"step": 10}))  # oar run --from pretrain
    write_times(tmp_path, (5101, "worker_failure", {}))
    write_times(tmp_path, (9000, "start", {"start_step": 5}), (9030, "train", {"step": 10}), (9040, "stopping", {"step": 10}))
    write_times(tmp_path, (20000, "start", {"start_step": 10}), (29999, "train", {"step": 90}))
    assert resumed_attempts(str(tmp_path), "pretrain", before=20000) == (2, 140.0)
    assert resumed_attempts(str(tmp_path), "pretrain", before=1e9) == (3, 140.0 + 9999.0)
    write_times(tmp_path, (30000, "start", {"start_step": 0}), (30001, "train", {"step": 1}))
    assert resumed_attempts(str(tmp_path), "pretrain", before=29999.5) == (0, 0.0)
    assert resumed_attempts(str(tmp_path / "none"), "pretrain", before=1e9) == (0, 0.0)


def test_a_history_of_a_hundred_attempts_is_read_in_one_pass(tmp_path: Path) -> None:
    """100,000 events, each attempt undoing half of the one before."""
    line = '{"time": 1.0, "stage": "pretrain", "kind": "train", "step": %d, "loss": 1.0}\n'
    for attempt in range(100):
        first = 500 * attempt
        start = f'{{"time": 1.0, "stage": "pretrain", "kind": "start", "start_step": {first}}}\n'
        (tmp_path / f"pretrain-{attempt:03d}.jsonl").write_text(start + "".join(line % (first + step) for step in range(1, 1001)))
    began = time.process_time()
    history = read_events(str(tmp_path), "pretrain")
    spent = time.process_time() - began
    assert [step for step, _ in steps(history)] == list(range(1, 50_501))
    assert spent < 5, f"{spent:.1f} s of CPU"


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ({"kind": "train", "step": 3, "images_per_s": {"a": 1}}, {"kind": "train", "step": 3}),
        ({"kind": "train", "step": 3, "loss": None}, {"kind": "train", "step": 3, "loss": None}),
        ({"kind": "train", "step": "3"}, None),
        ({"kind": "pool", "done": 1, "total": None}, None),
        ({"kind": "settings_changed", "changes": {"lr": 3}, "stage": []}, {"kind": "settings_changed"}),
        ({"kind": "checkpoint", "step": 2, "bytes": None, "seconds": 10**400}, {"kind": "checkpoint", "step": 2}),
        ({"kind": "end", "time": 1e15}, {"kind": "end"}),
        ({"kind": ["train"]}, None),
    ],
)
def test_fields_of_another_type_are_left_out(line: dict[str, Any], left: dict[str, Any] | None) -> None:
    """Whoever may write into a run's folder may write any line there, and no reader fails for it."""
    event = parse_line(json.dumps(line))
    assert event == (None if left is None else {"time": 0.0, **left})
    assert event is None or format_line(event)
