"""The event files: what survives a kill, a restart and a number that is not one."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from oar_scale.errors import UserError
from oar_scale.observe.events import Event, EventLog, read_events


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


def test_an_evaluation_made_again_at_the_resumed_step_replaces_the_first(tmp_path: Path) -> None:
    for nll in (3.0, 2.5):
        with EventLog(str(tmp_path), "pretrain") as log:
            log.emit("start", start_step=5)
            log.emit("heldout", step=5, nll_random=nll)
    assert [e["nll_random"] for e in read_events(str(tmp_path), "pretrain") if e["kind"] == "heldout"] == [2.5]


def test_an_attempt_killed_before_its_first_event_undoes_nothing(tmp_path: Path) -> None:
    write_attempt(tmp_path, 0, 3, loss=1.0)
    EventLog(str(tmp_path), "pretrain").close()
    assert len(steps(read_events(str(tmp_path), "pretrain"))) == 3


def test_a_torn_last_line_is_left_out_and_a_torn_line_inside_is_an_error(tmp_path: Path) -> None:
    path = Path(write_attempt(tmp_path, 0, 3, loss=1.0))
    text = path.read_text()
    path.write_text(text[:-10])
    assert steps(read_events(str(tmp_path), "pretrain")) == [(1, 1.0), (2, 1.0)]
    write_attempt(tmp_path, 2, 4, loss=2.0)
    assert steps(read_events(str(tmp_path), "pretrain")) == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    path.write_text(text.replace('"step": 2', '"step"', 1))
    with pytest.raises(UserError, match=r"pretrain-000\.jsonl:3"):
        read_events(str(tmp_path), "pretrain")


def test_numbers_that_are_not_finite_stay_valid_json_and_are_named(tmp_path: Path) -> None:
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
