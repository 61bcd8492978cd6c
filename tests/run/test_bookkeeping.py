"""What is done again, what is skipped, and what is refused: the pipeline's bookkeeping with stages that only leave a file."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from waiting import wait_until

from oar_scale import pipeline
from oar_scale.config.schema import Recipe
from oar_scale.errors import Requeue, UserError
from oar_scale.observe.events import read_events
from oar_scale.pipeline import run_pipeline, run_stage
from oar_scale.registry import Stage
from oar_scale.run.context import Run
from oar_scale.run.stage_markers import stage_fingerprint
from oar_scale.runtime import ray_session, stop_signals
from oar_scale.runtime.stop_signals import StopSignals
from oar_scale.shard_pool import ArrayTask
from oar_scale.storage import open_storage, read_json
from oar_scale.studies.compare_extraction import run_compare
from oar_scale.studies.order_analysis import run_orders
from oar_scale.studies.order_head import run_predict, run_train_head


def use_stages(patch: pytest.MonkeyPatch, *stages: Stage, work: Callable[[Run, str], dict[str, Any]]) -> None:
    """Every recipe has these stages; each one calls ``work`` with the run and its name."""
    patch.setattr(Recipe, "stages", lambda recipe: list(stages))
    patch.setattr(pipeline, "entry_point", lambda stage: lambda run, *_: work(run, stage.name))


def stub(name: Any, *needs: Any, sections: tuple[str, ...] = ()) -> Stage:
    return Stage(name, f"stage {name}", "", needs, sections, (name,))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the stages that ran, in order. ``c`` needs ``b`` needs ``a``; ``d`` needs ``a``."""
    names: list[str] = []

    def work(run: Run, name: str) -> dict[str, Any]:
        names.append(name)
        open_storage(run.at()).write(run.at(name, "result"), name.encode())
        return {}

    seed = ("seed",)
    stages = (stub("a", sections=seed), stub("b", "a", sections=("extract",)), stub("c", "b", sections=seed), stub("d", "a", sections=seed))
    use_stages(monkeypatch, *stages, work=work)
    return names


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(Recipe(name="stub", run_dir=str(tmp_path / "run")))


def changed(run: Run, **changes: Any) -> Run:
    return Run(Recipe.model_validate({**run.recipe.model_dump(), **changes}))


def test_a_run_of_some_minutes_begins_nothing_after_them_and_the_next_one_goes_on(
    run: Run, ran: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(pipeline.time, "monotonic", lambda: clock[0])
    work = pipeline.entry_point

    def slow(stage: Stage) -> Callable[..., dict[str, Any]]:
        clock[0] += 50.0
        return work(stage)

    monkeypatch.setattr(pipeline, "entry_point", slow)
    with pytest.raises(Requeue, match=r"1\.5 min are over"):
        run_pipeline(Run(run.recipe), minutes=1.5)
    assert ran == ["a", "b"]
    assert "2 of 4 stages are left: c, d" in capsys.readouterr().out
    run_pipeline(Run(run.recipe), minutes=1.5)
    assert ran == ["a", "b", "c", "d"]
    assert "left" not in capsys.readouterr().out


def test_a_stop_request_that_the_last_moment_of_a_stage_swallows_ends_the_run_behind_it(
    run: Run, ran: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stage was done nevertheless; whoever sent the signal sends no second one."""
    work = pipeline.entry_point

    def at_its_end(stage: Stage) -> Callable[..., dict[str, Any]]:
        with StopSignals() as signals:
            if stage.name == "b":
                os.kill(os.getpid(), signal.SIGTERM)
                wait_until(lambda: signals.reason)
        return work(stage)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "entry_point", at_its_end)
        with pytest.raises(Requeue, match="SIGTERM"):
            run_pipeline(Run(run.recipe))
    assert ran == ["a", "b"] and "2 of 4 stages are left: c, d" in capsys.readouterr().out
    run_pipeline(Run(run.recipe))
    assert ran == ["a", "b", "c", "d"]


class HeldClock:
    """The clock of deadlines: stands still until a test moves it past them all, which their threads wait for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.over, self.stop_requests = threading.Event(), list[int]()
        clock = self

        class HeldDeadline(stop_signals.Deadline):
            def _watch(self) -> None:
                clock.over.wait(60)  # at most, where the stage that moves the clock never begins
                super()._watch()

            def _note(self, number: int, frame: object) -> None:
                clock.stop_requests.append(number)
                super()._note(number, None)

        monkeypatch.setattr(pipeline, "Deadline", HeldDeadline)
        monkeypatch.setattr(stop_signals, "AGAIN_S", 0.01)
        monkeypatch.setattr(stop_signals, "time", SimpleNamespace(monotonic=lambda: 3600.0 if self.over.is_set() else 0.0))


def test_a_stage_under_way_is_asked_to_stop_when_the_minutes_are_over(
    run: Run, ran: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = HeldClock(monkeypatch)

    def listens(stage: Stage) -> Callable[..., dict[str, Any]]:
        def work(*_: object) -> dict[str, Any]:
            if stage.name != "b":
                return {}
            with StopSignals() as signals:
                clock.over.set()
                wait_until(lambda: signals.reason)
            assert signals.reason is not None
            raise Requeue(signals.reason)

        return work

    handler = signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(pipeline, "entry_point", listens)
    with pytest.raises(Requeue, match="5 min are over"):
        run_pipeline(Run(run.recipe), minutes=5)
    assert "3 of 4 stages are left: b, c, d" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGUSR1) == handler


def test_a_stage_that_cannot_stop_goes_on_to_its_end(run: Run, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is asked; then no other stage begins."""
    clock = HeldClock(monkeypatch)

    def work(name: str) -> dict[str, Any]:
        clock.over.set()
        wait_until(lambda: len(clock.stop_requests) >= 2)
        ran.append(name)
        return {}

    monkeypatch.setattr(pipeline, "entry_point", lambda stage: lambda *_: work(stage.name))
    with pytest.raises(Requeue, match="5 min are over"):
        run_pipeline(run, minutes=5)
    assert ran == ["a"]


def test_in_another_thread_the_stage_under_way_goes_on_and_no_other_begins(
    run: Run, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is sent there: no StopSignals would hear it, and a signal that nobody handles would end the process."""
    now, seen, errors = [0.0], list[object](), list[BaseException]()

    def work(name: str) -> dict[str, Any]:
        ran.append(name)
        with StopSignals() as signals:
            now[0] = 3600.0
            seen.extend([signals.reason, *(each.name for each in threading.enumerate() if each.name == "deadline")])
        return {}

    def drive() -> None:
        try:
            run_pipeline(Run(run.recipe), minutes=5)
        except BaseException as error:
            errors.append(error)

    monkeypatch.setattr(pipeline, "entry_point", lambda stage: lambda *_: work(stage.name))
    monkeypatch.setattr(stop_signals, "time", SimpleNamespace(monotonic=lambda: now[0]))
    thread = threading.Thread(target=drive)
    thread.start()
    thread.join()
    assert ran == ["a"] and seen == [None], "one stage, which was not asked to stop by any thread that watches the clock"
    assert [(type(error), str(error)) for error in errors] == [(Requeue, "5 min are over")]


def test_a_schedulers_stop_request_that_no_stage_hears_ends_the_run_at_the_next_one(
    run: Run, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(name: str) -> dict[str, Any]:
        ran.append(name)
        signal.raise_signal(signal.SIGUSR1)
        return {}

    monkeypatch.setattr(pipeline, "entry_point", lambda stage: lambda *_: work(stage.name))
    with pytest.raises(Requeue, match="SIGUSR1"):
        run_pipeline(Run(run.recipe), minutes=60)
    assert ran == ["a"]


def test_a_driver_whose_minutes_are_over_does_not_say_that_the_run_is_done(
    run: Run, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    endings = list[str]()
    monkeypatch.setattr(pipeline, "show_ending", lambda events, how: endings.append(how))
    monkeypatch.setattr(pipeline, "entry_point", lambda stage: lambda *_: time.sleep(0.1) or {})
    with pytest.raises(Requeue):
        run_pipeline(Run(run.recipe), minutes=0.001)
    run_pipeline(Run(run.recipe))
    assert endings == ["stopped", "done"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"pipeline": {"arms": {"x": {"order": "rastr"}}}}, "pipeline.arms.x.order"),
        ({"finetune": {"order": "rastr"}}, "finetune.order"),
        ({"sample": {"order": "rastr"}}, "sample.order"),
    ],
)
def test_an_order_policy_that_there_is_none_of_is_refused_before_the_first_stage(
    run: Run, ran: list[str], changes: dict[str, Any], field: str
) -> None:
    for begin in (run_pipeline, lambda run: run_stage(run, "a")):
        with pytest.raises(UserError, match=rf"{field} 'rastr': no such policy. There are: .*raster"):
            begin(changed(run, **changes))
    assert ran == []


def test_finished_stages_are_skipped(run: Run, ran: list[str]) -> None:
    run_pipeline(run)
    run_pipeline(run)
    assert ran == ["a", "b", "c", "d"]


def test_a_trainings_seconds_are_of_all_its_commands(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its attempts are; a pool counts its own work, which the stage's time exceeds."""
    stages = (replace(stub("a"), training="pretrain"), stub("b"), replace(stub("c"), training="pretrain"))
    results = {"a": {"seconds": 7200.0, "attempts": 3}, "b": {"seconds": 7200.0}, "c": {"steps": 0}}  # c: a copy of given weights
    use_stages(monkeypatch, *stages, work=lambda run, name: results[name])
    run_pipeline(run)
    seconds = {name: read_json(run.marker(name))["seconds"] for name in results}
    assert seconds["a"] == 7200.0 and seconds["b"] < 7200.0 and seconds["c"] < 7200.0


def test_from_does_a_stage_and_all_after_it_again(run: Run, ran: list[str]) -> None:
    run_pipeline(run)
    run_pipeline(run, start="b", yes=True)
    assert ran[4:] == ["b", "c", "d"]


def test_only_does_one_stage_and_unfinishes_its_dependents(run: Run, ran: list[str]) -> None:
    """Their results stay, and are not taken for those of the new ones."""
    run_pipeline(run)
    run_pipeline(run, only="b", yes=True)
    assert ran[4:] == ["b"]
    assert os.path.exists(run.at("c", "result")) and os.path.exists(run.at("d", "result"))
    for start in (None, "d"):
        with pytest.raises(UserError, match=r"stage c .* is stale: stage b.*\n.*oar run RECIPE --from c"):
            run_pipeline(run, start=start, yes=True)
    run_pipeline(run, start="c", yes=True)
    run_pipeline(run)
    assert ran[5:] == ["c", "d"]


def test_other_settings_are_refused_unless_asked_for(run: Run, ran: list[str]) -> None:
    run_pipeline(run)
    other = changed(run, extract={"tie_seed": 7})
    with pytest.raises(UserError, match=r"stage b .* extract\.tie_seed was 0, is 7(.|\n)*--from b"):
        run_pipeline(other)
    assert ran == ["a", "b", "c", "d"] and os.path.exists(run.at("b", "result"))
    run_pipeline(other, start="b", yes=True)
    assert ran[4:] == ["b", "c", "d"]


def test_settings_that_change_no_result_may_change(run: Run, ran: list[str]) -> None:
    run_pipeline(run)
    run_pipeline(changed(run, extract={"actors": 5}))
    assert ran == ["a", "b", "c", "d"]


def test_all_stages_of_a_run_share_one_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many cores as the widest of them asks for; a run with nothing left to do starts none."""
    log: list[Any] = []

    @contextmanager
    def session(cpus: int, gpus: int, least_gpus: int) -> Iterator[None]:
        log.append((cpus, gpus))
        yield
        log.append("end")

    def work(run: Run, name: str) -> dict[str, Any]:
        log.append(name)
        return {}

    stages = [replace(stub("tokens"), ray=True), stub("report"), replace(stub("extract"), ray=True)]
    use_stages(monkeypatch, *stages, work=work)
    monkeypatch.setattr(ray_session, "ray_session", session)
    recipe = {"name": "stub", "run_dir": str(tmp_path), "parallel": {"workers": 2, "cpu_threads": 3}, "extract": {"actors": 4}}
    run = Run(Recipe.model_validate(recipe))
    run_pipeline(run)
    assert log == [(12, 0), "tokens", "report", (12, 0), "extract", "end", "end"]  # the second one is the first again, in real life
    log.clear()
    run_pipeline(run)
    assert log == []


def test_an_older_finished_extract_stays_finished(tmp_path: Path) -> None:
    """Version 60fa78e hashed three fields of ``extract`` that are gone; these are the fingerprints that it computed."""
    recipe = Recipe.model_validate({"name": "stub", "run_dir": str(tmp_path), "extract": {"score": "gt_logprob"}})  # its default
    fingerprints = {stage.name: stage_fingerprint(recipe, stage) for stage in recipe.stages()}
    assert (fingerprints["extract"], fingerprints["finetune"]) == ("cdaafdfab93f8dc9", "7ff00a6f94d13f8f")


def test_a_refused_recipe_leaves_the_folder_as_it_was(run: Run, ran: list[str]) -> None:
    run_pipeline(run)
    before = {path: path.read_bytes() for path in Path(run.local()).rglob("*") if path.is_file()}
    for other in (changed(run, seed=9), changed(run, extract={"tie_seed": 7})):
        with pytest.raises(UserError):
            run_pipeline(other)
    assert {path: path.read_bytes() for path in Path(run.local()).rglob("*") if path.is_file()} == before


def test_a_kill_while_clearing_leaves_no_orphaned_stage(run: Run, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever deletion the kill falls on, the next run does every stage again whose ground was removed."""
    for kill_at in range(1, 7):
        run_pipeline(run)
        ran.clear()
        storage, left = type(open_storage(run.at())), [kill_at]
        delete = storage.delete

        def dying(self: Any, uri: str, left: list[int] = left, delete: Any = delete) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            delete(self, uri)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(storage, "delete", dying)
            run_pipeline(run, start="b", yes=True)
        run_pipeline(run)
        assert "b" not in ran or "c" in ran, f"killed at deletion {kill_at}: {ran}"
        assert all(os.path.exists(run.at(name, "result")) for name in "abcd")


def test_only_the_first_of_several_processes_is_watched(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others' events are in the same folder: a second metrics server, or W&B process, would show the same once more."""
    watched: dict[int, bool] = {}

    def work(run: Run, name: str) -> dict[str, Any]:
        assert run.array is not None
        watched[run.array.index] = os.path.exists(run.local("metrics.json"))
        return {}

    use_stages(monkeypatch, stub("b"), work=work)
    recipe = changed(run, observe={"metrics_port": 0}).recipe
    for index in (1, 0):
        task = Run(recipe, array=ArrayTask(index, 2))
        run_stage(task, "b")
        os.remove(task.marker("b"))
    assert watched == {0: True, 1: False}


def test_a_stage_alone_names_the_first_stage_it_lacks(run: Run, ran: list[str]) -> None:
    with pytest.raises(UserError, match="stage c needs stage a, which is not finished"):
        run_stage(run, "c")
    run_stage(run, "a")
    with pytest.raises(UserError, match="stage c needs stage b"):
        run_stage(run, "c")
    assert ran == ["a"]


def test_an_unknown_stage_is_answered_with_the_known_ones(run: Run, ran: list[str]) -> None:
    with pytest.raises(UserError, match=r"no stage 'pretain'.* a, b, c, d"):
        run_pipeline(run, start="pretain")


def test_a_missing_stage_is_refused_with_its_reason(run: Run) -> None:
    raster, alone = changed(run, model={"layout": "raster"}), changed(run, pipeline={"control": False})
    for stage in ("extract", "finetune", "control"):
        with pytest.raises(UserError, match=rf"no stage '{stage}'.*model\.layout raster has one order for all images") as refused:
            run_stage(raster, stage)
        assert "pipeline.control" not in str(refused.value) and "data, tokenizer, tokens, pretrain." in str(refused.value)
        with pytest.raises(UserError, match=rf"no stage '{stage}'.*model\.layout raster"):
            run_pipeline(raster, start=stage)
    with pytest.raises(UserError, match=r"no stage 'control'.*pipeline\.control is false\. Set it to true"):
        run_stage(alone, "control")


def test_a_raster_run_says_so_where_orders_are_asked_for(run: Run) -> None:
    raster = changed(run, model={"layout": "raster"})
    for ask in (run_compare, lambda run: run_orders(run, images=1), lambda run: run_train_head(run, "any_order"), run_predict):
        with pytest.raises(UserError, match=r"raster has one order for all images.*\n.*instructed or dual"):
            ask(raster)


@pytest.mark.parametrize("where", ["ray", "stage", "training", "import", "folder", "marker"])
def test_a_stage_that_fails_anywhere_reports_it_once(where: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also around what is watched: as Ray starts, before the workers of a training, and as it is written down that it is done."""

    def fail(*_: object, **__: object) -> Any:
        raise OSError("no space left")

    stage = replace(stub("a"), ray=where == "ray", training="pretrain" if where == "training" else "")
    use_stages(monkeypatch, stage, work=fail if where == "stage" else lambda run, name: {})
    if where != "stage":
        name = {"ray": "_shared_ray", "import": "entry_point", "folder": "bind_run_dir", "marker": "write_finished"}.get(where)
        monkeypatch.setattr(pipeline, name or "entry_point", fail if name else lambda stage: fail)
    with pytest.raises(OSError, match="no space left"):
        run_pipeline(run)
    [event] = read_events(run.events, "a")
    assert (event["kind"], event["cause"]) == ("failed", "OSError: no space left")


def test_a_failed_stage_is_not_finished(run: Run, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: Run, name: str) -> dict[str, Any]:
        if name == "b":
            raise UserError("no bucket")
        return {}

    use_stages(monkeypatch, stub("a"), stub("b", "a"), work=fail)
    with pytest.raises(UserError, match="no bucket"):
        run_pipeline(run)
    assert os.path.exists(run.marker("a"))
    assert not os.path.exists(run.marker("b"))
