"""The live console, as a log file sees it."""

import io
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from oar_scale.config.schema import Recipe
from oar_scale.observe import console as module
from oar_scale.observe.console import Console, duration
from oar_scale.observe.events import EventLog
from oar_scale.observe.watch import watching
from tests.observe import synthetic_run
from tests.waiting import wait_until


@pytest.fixture(autouse=True)
def _time_for_the_last_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "JOIN_S", 600.0)


def test_a_followed_stage_shows_progress_and_restarts(tmp_path: Path) -> None:
    with EventLog(str(tmp_path), "pretrain") as log:
        log.emit("start", steps=10, start_step=0)
        log.emit("train", step=1, loss=9.999)
    with EventLog(str(tmp_path), "pretrain") as log:
        log.emit("worker_failure", cause="lost")
    stream = io.StringIO()
    console = Console(stream)
    console.stage("pretrain", "continue the any-order model", "about 1 min")
    with console.follow(str(tmp_path), "pretrain", total_steps=10), EventLog(str(tmp_path), "pretrain") as log:
        log.emit("start", steps=10, start_step=5)
        log.emit("train", step=6, loss=3.25, images_per_s=61.3)
        log.emit("heldout", step=6, nll_random=3.5)
        log.emit("checkpoint", step=6, seconds=0.5, bytes=12_000_000)
        log.emit("train", step=7, loss=float("nan"), images_per_s=61.3)
    text = stream.getvalue()
    assert text.startswith("pretrain: continue the any-order model (about 1 min)\n")
    assert "attempt 2: resumes from step 5" in text
    assert "step 6: held-out NLL 3.500" in text
    assert "step 6: checkpoint, 12.0 MB in 0.5 s" in text
    assert "step 7: loss is nan" in text
    assert "step 7/10  loss not finite  nll 3.500  61.3 images/s" in text
    assert "9.999" not in text  # what an earlier attempt wrote


def test_faults_and_silence_are_shown_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, clock = io.StringIO(), SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def until(text: str) -> None:
        wait_until(lambda: text in stream.getvalue())

    with Console(stream).follow(str(tmp_path), "pretrain", 100, stall_s=600), EventLog(str(tmp_path), "pretrain") as log:
        synthetic_run.start(log, 50)
        synthetic_run.faults(log, 60)
        log.emit("stopping", step=60, reason="SIGTERM")
        synthetic_run.driver(tmp_path)
        synthetic_run.heldout(log, 70)
        until("step 70: held-out NLL")
        clock.now += 601
        until("nothing was heard of pretrain for ")
    text = stream.getvalue()
    assert "attempt 1: resumes from step 50, 2 workers" in text
    assert "step 60: batch skipped: loss nan and grad_norm inf (samples 3, 17, 99)" in text
    assert "step 60: loss 9.000 where 3.200 was expected; going on" in text
    assert "step 60: the checkpoint was not written: the disk is full" in text
    assert "step 60: stopping: SIGTERM" in text
    assert text.count("nothing was heard of pretrain for ") == 1
    assert "ActorDiedError" not in text and "2 -> 1 workers" not in text


def test_replaced_samples_are_told_in_one_line_at_the_end(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Console(stream).follow(str(tmp_path), "pretrain", 10), EventLog(str(tmp_path), "pretrain") as log:
        log.emit("start", steps=10, start_step=0)
        for number in range(4):
            log.emit("bad_sample", step=number, uid=number, fault=f"0.tar: sample '{number}' has no .txt")
        log.emit("end", step=10, seconds=1.0)
    named = ", ".join(f"0.tar: sample '{number}' has no .txt" for number in range(3))
    assert f"left out or changed: 4 bad samples, replaced by others ({named}, ...)" in stream.getvalue()
    assert stream.getvalue().count("has no .txt") == 3


def test_a_console_that_cannot_be_written_to_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError("nobody reads")

    recipe = Recipe.model_validate({"name": "emoji"})
    watched = watching(str(tmp_path), "pretrain", recipe, str(tmp_path), console=Console(Gone(), 0.0), steps=100)
    with watched, EventLog(str(tmp_path), "pretrain") as log:
        synthetic_run.start(log, 50)
        synthetic_run.train(log, 60)
    assert "the console no longer follows pretrain (BrokenPipeError: nobody reads)" in caplog.text


def test_the_pace_of_shards_that_end_together_is_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two actors, whose shards of five minutes end a few seconds apart."""
    stream, clock = io.StringIO(), SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with Console(stream, plain_interval_s=0).progress(8000, "orders") as tally:
        for seconds in range(300, 6000, 300):
            for clock.now in (float(seconds), seconds + 5.0):
                tally.advance(256)
    rates = [float(line.split()[2].removesuffix("/s")) for line in stream.getvalue().splitlines()]
    assert all(0.8 <= rate <= 2.1 for rate in rates[4:]), rates


def test_progress_counts_and_ends_with_the_total() -> None:
    stream = io.StringIO()
    with Console(stream, plain_interval_s=0).progress(40, "orders") as tally:
        for _ in range(4):
            time.sleep(0.01)
            tally.advance(10)
        tally.note("actor 1 was lost and replaced")
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("  orders 10/40") and lines[0].endswith("left")
    assert any(line.startswith("  orders 40/40") for line in lines)
    assert lines[-1] == "  actor 1 was lost and replaced"


def test_an_exception_in_the_body_is_not_swallowed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="worker died"), Console(io.StringIO()).follow(str(tmp_path), "pretrain", 10):
        raise RuntimeError("worker died")


@pytest.mark.parametrize(("seconds", "text"), [(8.6, "9 s"), (59.7, "1 min 00 s"), (125, "2 min 05 s"), (4800, "1 h 20 min")])
def test_durations_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text
