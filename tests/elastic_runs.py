"""Trainings that are disturbed, and the same one undisturbed: each step's samples and loss must be the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_run import copy_run, prepare_small_run, small_recipe

from oar_scale.config.loading import dump_recipe
from oar_scale.data.manifest import read_manifest
from oar_scale.observe.events import read_events
from oar_scale.run.context import Run
from oar_scale.run.stage_markers import stage_fingerprint
from oar_scale.storage import write_json

STEPS = 45
LATE, LONGER = 35, 10
"""From this step on pauses are so many times as long: a machine that is slow to do what is to happen before the last step has time for it,
and any other never comes to them."""
SHAPE: dict[str, Any] = {
    "model": {"dropout": 0.1},
    "parallel": {"workers": {"min": 1, "max": 2}, "precision": "fp32", "micro_batch": 2},
    "pretrain": {"steps": STEPS, "checkpoint_every": 5, "evaluate_every": 100, "spike_guard": "off"},
}
WATCHED = """
import importlib.util, json, os, sys, time

def pause(step):
    seconds, first = open("{pause}").read().split()
    return (step >= int(first)) * float(seconds) * ({longer} if step >= {late} else 1)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "oar_scale.distributed.deepspeed_engine":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            one_step = module.DeepSpeedEngine.train_step
            def slow(engine, batch, lr, seeds):
                begun = time.monotonic()
                while time.monotonic() - begun < pause(batch.step):
                    time.sleep(0.1)
                with open("{seen}-" + str(os.getpid()), "a") as file:
                    file.write(json.dumps([batch.seed, batch.step, batch.uid_b.tolist()]) + "\\n")
                return one_step(engine, batch, lr, seeds)
            module.DeepSpeedEngine.train_step = slow
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""
"""A ``sitecustomize`` for whoever imports the engine: steps slow enough for what is to happen between them; samples written down."""
_made: dict[str, Any] = {}


def prepared_run(folders: pytest.TempPathFactory) -> Run:
    """Once a session."""
    if "prepared" not in _made:
        _made["prepared"] = prepare_small_run(small_recipe(str(folders.mktemp("prepared")), **SHAPE))
    run: Run = _made["prepared"]
    return run


def undisturbed_run(folders: pytest.TempPathFactory) -> tuple[dict[int, float], dict[int, list[int]]]:
    """The losses and the samples of a single process, once a session."""
    if "undisturbed" not in _made:
        folder = folders.mktemp("undisturbed")
        shape = {**SHAPE, "parallel": {**SHAPE["parallel"], "workers": 1}}
        run = copy_run(prepared_run(folders), str(folder / "run"), **shape)
        done = subprocess.run(torchrun(run, 1), env={**os.environ, **watched(folder, 0)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        _made["undisturbed"] = losses(run), samples(folder)
    undisturbed: tuple[dict[int, float], dict[int, list[int]]] = _made["undisturbed"]
    return undisturbed


def watched(folder: Path, pause: float, first: int = 0) -> dict[str, str]:
    """Make steps slow, from the outside.

    Args:
        folder: where the samples of the steps are written down.
        pause: seconds before a step; a call while the process runs changes it, for the step that waits, too.
        first: the step (counted from 0) before which the first pause is made.

    Returns:
        Environment variables for the process.
    """
    if not (folder / "sitecustomize.py").exists():
        (folder / "sitecustomize.py").write_text(WATCHED.format(pause=folder / "pause", seen=folder / "seen", late=LATE, longer=LONGER))
    (folder / "pause.new").write_text(f"{pause} {first}")
    os.replace(folder / "pause.new", folder / "pause")  # in one piece: steps read it
    return {"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}


def samples(folder: Path) -> dict[int, list[int]]:
    """Of each step of the pretraining; one that was done again must have had the same."""
    by_rank: dict[int, dict[tuple[int, ...], None]] = {}
    for path in folder.glob("seen-*"):
        for line in path.read_text().splitlines():
            seed, step, uids = json.loads(line)
            if seed == 0:  # the recipe's; fine-tuning and control draw with another one
                by_rank.setdefault(step, {})[tuple(uids)] = None
    return {step: sorted({uid for uids in samples_of_rank for uid in uids}) for step, samples_of_rank in by_rank.items()}


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run.events, "pretrain") if event["kind"] == kind]


def losses(run: Run) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in events(run, "train")}


def max_difference(actual: dict[int, float], expected: dict[int, float]) -> float:
    assert sorted(actual) == sorted(expected)
    return max(abs(actual[step] - expected[step]) for step in expected)


def recipe_file(run: Run, stages: int = 3) -> str:
    """The run's recipe as a file; its first stages are marked as done."""
    path = run.local("as-given.yaml")
    Path(path).write_text(dump_recipe(run.recipe))
    counts = {split: read_manifest(run.at("tokens", split)).samples for split in ("train", "heldout")}
    results = {"data": {**counts, "shards": 6}, "tokenizer": {"psnr_db": 0.0, "codebook_use": 1.0, "trained": False}, "tokens": counts}
    for stage in run.recipe.stages()[:stages]:
        done = {"stage": stage.name, "fingerprint": stage_fingerprint(run.recipe, stage), "settings": {}, "seconds": 0, "started": 0}
        write_json(run.marker(stage.name), {**done, "results": results.get(stage.name, {})})
    return path


def torchrun(run: Run, workers: int) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    return [*command, "-m", "oar_scale.cli", "train", recipe_file(run)]


def wait_for_events(run: Run, kind: str, count: int, ended: Callable[[], str | None], seconds: float = 800) -> None:
    """``ended``: the driver's last output, if it has ended."""
    deadline = time.monotonic() + seconds
    while len(events(run, kind)) < count:
        output = ended()
        assert output is None, f"the driver ended: {output[-4000:]}"
        assert time.monotonic() < deadline, f"no {kind} number {count}"
        time.sleep(0.1)
