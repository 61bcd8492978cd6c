"""Stages that are done again: what is said and asked, and that the earlier results are never lost before the new ones are complete."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oar_scale import pipeline
from oar_scale.cli import main
from oar_scale.config.schema import Recipe
from oar_scale.errors import UserError
from oar_scale.observe.console import Console
from oar_scale.pipeline import run_pipeline, undo_again
from oar_scale.registry import Stage
from oar_scale.run.context import Run
from oar_scale.run.previous import put_back, read_redo
from oar_scale.storage import open_storage, write_json

STAGES = [
    Stage("data", "", "", (), ("seed",), ("images",)),
    Stage("pretrain", "", "", ("data",), ("seed",), ("checkpoints/pretrain",), model="any_order"),
    Stage("extract", "", "", ("pretrain",), (), ("orders",)),
    Stage("evaluate", "", "", ("extract",), local=True),
]


class Work:
    """What the stages do: leave two files of the number of their attempt, and fail where they are to."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fails: Callable[[str], object] = lambda name: None

    def __call__(self, run: Run, stage: Stage) -> dict[str, Any]:
        self.ran.append(stage.name)
        if stage.name == "pretrain":
            open_storage(run.at()).write(run.model_uri("base"), f"{len(self.ran)}".encode())
        for part in ("a", "b"):
            for folder in stage.folders:
                open_storage(run.at()).write(run.at(folder, "deep", part), f"{len(self.ran)}".encode())
            self.fails(stage.name)
        if stage.model is not None:
            open_storage(run.at()).write(run.model_uri(stage.model), f"{len(self.ran)}".encode())
        return {}


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    work = Work()
    monkeypatch.setattr(Recipe, "stages", lambda recipe: list(STAGES))
    monkeypatch.setattr(pipeline, "entry_point", lambda stage: lambda run, *_: work(run, stage))
    return work


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(Recipe(name="stub", run_dir=str(tmp_path / "run")), Console(io.StringIO()))


def said(run: Run) -> str:
    stream = run.console._stream
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


def content(run: Run) -> dict[str, bytes]:
    """All objects of the run, there and in its local folder, but its events: that an attempt has failed stays true."""
    storage, local = open_storage(run.at()), Path(run.local())
    objects = {uri.removeprefix(run.at()): storage.read(uri) for uri in storage.list(run.at())}
    objects |= {f"local {path.relative_to(local)}": path.read_bytes() for path in local.rglob("*") if path.is_file()}
    return {name: value for name, value in objects.items() if not name.startswith(("/events/", "local events/"))}


def fail(name: str) -> Callable[[str], object]:
    def failing(stage: str) -> None:
        if stage == name:
            raise UserError("the loss is not finite")

    return failing


def test_nothing_is_set_aside_unless_the_user_agrees(run: Run, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal by --yes, at a terminal by an answer; what is to be done is said before."""
    run_pipeline(run)
    before = content(run)
    with pytest.raises(UserError, match=r"pretrain +4 objects, 0\.0 MB\n.*stale afterwards, .*: extract, evaluate\n(.|\n)*add --yes"):
        run_pipeline(run, only="pretrain")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    with pytest.raises(UserError, match=r"^nothing has been changed"):
        run_pipeline(run, start="pretrain")
    assert content(run) == before and len(work.ran) == 4
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    run_pipeline(run, start="pretrain")
    assert work.ran[4:] == ["pretrain", "extract", "evaluate"]
    assert "  extract    2 objects" in said(run)


def test_a_stage_that_leaves_nothing_is_done_again_unasked(run: Run, work: Work) -> None:
    run_pipeline(run)
    run_pipeline(run, only="evaluate")
    assert work.ran[4:] == ["evaluate"]


@pytest.mark.parametrize("place", ["folder", pytest.param("s3", marks=pytest.mark.s3)])
def test_a_failed_attempt_can_be_undone(run: Run, work: Work, place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """It says how, and then everything is as it was; a second attempt meanwhile does not replace the earlier results."""
    if place == "s3":
        root = f"{request.getfixturevalue('s3_root')}/again"
        run = Run(Recipe.model_validate({**run.recipe.model_dump(), "storage": {"root": root}}), run.console)
    run_pipeline(run)
    before = content(run)
    work.fails = fail("pretrain")
    for again in ({"start": "pretrain"}, {"only": "pretrain"}, {"start": "data"}):
        with pytest.raises(UserError, match="not finite"):
            run_pipeline(run, **again, yes=True)  # type: ignore[arg-type]
        with pytest.raises(UserError, match="not finite"):
            run_pipeline(run)
    assert f"are kept in {run.at('previous')}: oar run RECIPE goes on, oar run RECIPE --undo puts them back" in said(run)
    undo_again(run, yes=True)
    assert content(run) == before
    with pytest.raises(UserError, match="nothing is set aside here"):
        undo_again(run, yes=True)
    run_pipeline(run)
    assert work.ran.count("evaluate") == 1


def test_an_evaluation_of_the_new_results_does_not_stay_for_the_earlier_ones(run: Run, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file lies in the local folder, where the new one replaces it; the earlier marker would say that it is of the earlier models."""
    monkeypatch.setattr(Recipe, "stages", lambda recipe: [*STAGES, Stage("report", "", "", ("evaluate",), local=True)])
    run_pipeline(run)
    work.fails = fail("report")
    for _ in range(2):  # the second time the failed attempt alone is removed
        with pytest.raises(UserError, match="not finite"):
            run_pipeline(run, start="pretrain", yes=True)
    undo_again(run, yes=True)
    assert "done again by oar run RECIPE: evaluate" in said(run)
    work.fails, before = lambda name: None, len(work.ran)
    run_pipeline(run)
    assert work.ran[before:] == ["evaluate"], "the report is that of the earlier results"


def test_unfinished_trainings_on_earlier_results_are_named(run: Run, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    finetune = Stage("finetune", "", "", ("extract",), (), ("checkpoints/finetune",), training="finetune")
    monkeypatch.setattr(Recipe, "stages", lambda recipe: [*STAGES[:3], finetune])
    work.fails = fail("finetune")
    with pytest.raises(UserError, match="not finite"):
        run_pipeline(run)
    with pytest.raises(UserError, match=r"begun on them, not finished, .*: finetune; .*oar run RECIPE --from finetune\n(.|\n)*add --yes"):
        run_pipeline(run, only="extract")


def test_where_nothing_was_there_is_nothing_to_undo(run: Run, work: Work) -> None:
    work.fails = fail("data")
    with pytest.raises(UserError, match="not finite"):
        run_pipeline(run, only="data")
    assert "set aside" not in said(run) and "previous" not in "".join(content(run))
    work.fails = lambda name: None
    run_pipeline(run)


def test_what_is_set_aside_goes_when_the_new_is_complete(run: Run, work: Work) -> None:
    run_pipeline(run)
    work.fails = fail("extract")
    with pytest.raises(UserError, match="not finite"):
        run_pipeline(run, start="pretrain", yes=True)
    assert any(name.startswith("/previous/checkpoints") for name in content(run)), "the new pretraining is not all that was asked for"
    work.fails = lambda name: None
    run_pipeline(run)
    assert not any("previous" in name for name in content(run))
    assert content(run)["/models/any_order.safetensors"] == b"5"


def test_what_a_recipe_has_no_more_stays_set_aside(run: Run, work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a control that failed is switched off: its earlier results have not been replaced by anything."""
    run_pipeline(run)
    before = content(run)
    work.fails = fail("extract")
    with pytest.raises(UserError, match="not finite"):
        run_pipeline(run, only="extract", yes=True)
    monkeypatch.setattr(Recipe, "stages", lambda recipe: STAGES[:2])
    run_pipeline(run, only="pretrain", yes=True)
    monkeypatch.setattr(Recipe, "stages", lambda recipe: list(STAGES))
    undo_again(run, yes=True)
    assert content(run) == before


@pytest.mark.parametrize("again", [{}, {"only": "pretrain"}])
def test_a_kill_before_the_last_removal_leaves_nothing(
    run: Run, work: Work, again: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is complete is neither kept twice for ever, nor removed for the sake of what it has replaced."""
    run_pipeline(run)

    def killed(run: Run) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "drop_if_complete", killed)
        run_pipeline(run, only="pretrain", yes=True)
    complete = content(run)["/models/any_order.safetensors"]
    work.fails = fail("pretrain")
    with pytest.raises(UserError, match=r"stale|not finite"):
        run_pipeline(run, **again, yes=True)
    if again:
        undo_again(run, yes=True)
    assert content(run)["/models/any_order.safetensors"] == complete
    assert not any("previous" in name for name in content(run))


@pytest.mark.parametrize("undone", [True, False])
def test_a_kill_at_any_time_loses_no_results(run: Run, work: Work, undone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """While results are set aside, put back or removed: the next command finishes that, and then everything is there, old or new."""
    run_pipeline(run)
    before = content(run)
    storage = type(open_storage(run.at()))
    for kill_at in range(1, 30):
        left = [kill_at]

        def counted(name: str, left: list[int] = left) -> Callable[..., Any]:
            original = getattr(storage, name)

            def call(self: Any, *arguments: Any, **options: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt
                return original(self, *arguments, **options)

            return call

        work.fails = fail("extract") if undone else lambda name: None
        with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, UserError)):
            for name in ("copy", "delete", "write"):
                patch.setattr(storage, name, counted(name))
            run_pipeline(run, start="pretrain", yes=True)
            raise UserError("it was not killed")
        if undone:
            if (Path(run.at()) / "previous" / "redo.json").exists():
                with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, UserError)):
                    left[0] = kill_at
                    for name in ("copy", "delete", "write"):
                        patch.setattr(storage, name, counted(name, left))
                    undo_again(run, yes=True)
                    raise UserError("it was not killed")
            if (Path(run.at()) / "previous" / "redo.json").exists():
                undo_again(run, yes=True)
            work.fails = lambda name: None
            run_pipeline(run)
            assert {name: value for name, value in content(run).items() if name in before} == before, kill_at
        else:
            run_pipeline(run)
            after = content(run)
            assert after.keys() == before.keys(), kill_at
            assert work.ran[::-1].index("extract") < work.ran[::-1].index("pretrain"), "orders of an earlier model"


def test_another_driver_is_not_worked_against(run: Run, work: Work) -> None:
    """Neither are results moved under its hands, nor is its stage done a second time."""
    run_pipeline(run)
    refused: list[str] = []

    def second(name: str) -> None:
        for again in ({"only": "data"}, {"start": "data"}, {}):
            with pytest.raises(UserError, match="another driver works on this run") as error:
                run_pipeline(run, **again, yes=True)  # type: ignore[arg-type]
            refused.append(str(error.value))

    work.fails = lambda name: second(name) if name == "pretrain" and not refused else None
    run_pipeline(run, start="pretrain", yes=True)
    assert len(refused) == 3 and f"pid {os.getpid()}" in refused[0]
    assert work.ran[4:] == ["pretrain", "extract", "evaluate"]
    assert not any("drivers" in name for name in content(run)), "a driver that has ended left something"


def test_the_command_line_has_all_of_it(run: Run, work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "stub.yaml"
    recipe.write_text(f"name: stub\nrun_dir: {run.local()}\n")
    assert main(["run", str(recipe)]) == 0
    assert main(["run", str(recipe), "--only", "pretrain"]) == 2
    assert "add --yes" in capsys.readouterr().err
    work.fails = fail("pretrain")
    assert main(["run", str(recipe), "--only", "pretrain", "--yes"]) == 2
    assert "oar run RECIPE --undo puts them back" in capsys.readouterr().out
    assert main(["run", str(recipe), "--undo", "--yes"]) == 0
    assert main(["run", str(recipe)]) == 0
    assert work.ran[4:] == ["pretrain"]


def test_results_of_an_arm_that_the_recipe_has_no_more_are_put_back(tmp_path: Path) -> None:
    run = Run(Recipe(name="stub", run_dir=str(tmp_path)))
    storage = open_storage(run.at())
    for name in ("previous/checkpoints/gone.s1/a", "previous/stages/gone.s1.json", "checkpoints/gone.s1/b", "models/gone.s1.safetensors"):
        storage.write(run.at(name), b"{}")
    nothing: dict[str, Any] = {"moving": [], "removing": [], "put_back": False, "drop": False}
    write_json(run.at("previous", "redo.json"), {"stages": ["gone.s1"], **nothing})
    redo = read_redo(run)
    assert redo is not None
    put_back(run, redo)
    assert [uri.removeprefix(run.at()) for uri in storage.list(run.at())] == ["/checkpoints/gone.s1/a", "/stages/gone.s1.json"]
