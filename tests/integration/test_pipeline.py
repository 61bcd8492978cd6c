"""The whole pipeline in its two-minute version: real drawings, Ray, DeepSpeed, shards; everything on a real S3 server.

Its first training is done again on a folder, and disturbed: neither changes a loss. (The whole of it on a folder: tests/launch.)
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import webdataset
from elastic_runs import watched

from oar_scale.cli import main
from oar_scale.observe.events import read_events
from oar_scale.orders.order_table import read_orders
from oar_scale.storage import join, open_storage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(2700)]  # `oar run` and `oar train` start a Ray of their own, nine stages in a row
ROOT = Path(__file__).resolve().parents[2]
SMOKE = str(ROOT / "recipes" / "smoke.yaml")
SMALLER = [*("-o", "parallel.workers=1"), *("-o", "extract.actors=1"), *("-o", "data.image_size=16")]
"""Than the recipe: 4 x 4 cells, and nobody to share the work with."""


def oar(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "oar_scale.cli", *arguments], capture_output=True, text=True, cwd=ROOT)


@dataclass(frozen=True)
class Finished:
    """A finished run of recipes/smoke.yaml: its local folder, and its root on S3."""

    folder: Path
    root: str

    @property
    def recipe(self) -> list[str]:
        return [SMOKE, "-o", f"run_dir={self.folder}", "-o", f"storage.root={self.root}", *SMALLER]

    def read(self, *names: str) -> bytes:
        return open_storage(self.root).read(join(self.root, *names))

    def list(self, *names: str) -> list[str]:
        """The names of all objects below one, from the root on."""
        return sorted(uri.removeprefix(f"{self.root}/") for uri in open_storage(self.root).list(join(self.root, *names)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, s3_root: str) -> Finished:
    run = Finished(tmp_path_factory.mktemp("smoke"), f"{s3_root}/pipeline")
    done = oar("run", *run.recipe)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return run


def test_one_command_takes_captioned_images_to_a_report(finished: Finished) -> None:
    html = (finished.folder / "report" / "index.html").read_text()
    assert len(html) > 50_000
    assert "kid_efflite0" in html and "OpenMoji" in html and "CC BY-SA" in html
    evaluation = json.loads((finished.folder / "evaluation.json").read_text())
    assert evaluation
    for name in ("base", "any_order", "ordered", "control"):
        assert len(finished.read("models", f"{name}.safetensors")) > 100_000


def test_data_and_checkpoints_are_on_s3_only(finished: Finished) -> None:
    names = finished.list()
    for pattern in (r"tokens/train/00000\.tar", r"orders/train/00000\.parquet", r"checkpoints/pretrain/step-00000020/COMMITTED"):
        assert any(re.fullmatch(pattern, name) for name in names), pattern
    assert not (finished.folder / "tokens").exists() and not (finished.folder / "checkpoints").exists()


def test_every_training_image_has_an_order_that_is_a_permutation(finished: Finished) -> None:
    names = [name for name in finished.list("orders", "train") if re.fullmatch(r"orders/train/[^/]*\.parquet", name)]
    orders = np.concatenate([read_orders(join(finished.root, name)).order_SN for name in names])
    assert len(orders) == json.loads(finished.read("stages", "tokens.json"))["results"]["train"]
    assert (np.sort(orders, axis=1) == np.arange(16)).all()
    assert len(np.unique(orders, axis=0)) > 1


def test_plain_webdataset_reads_the_shards(finished: Finished, tmp_path: Path) -> None:
    def samples(part: str) -> list[dict[str, Any]]:
        shard = tmp_path / f"{part}.tar"
        shard.write_bytes(finished.read(part, "train", "00000.tar"))
        return list(webdataset.WebDataset(str(shard), shardshuffle=False))

    tokens, images = samples("tokens"), samples("images")
    assert len(tokens) == 32
    assert {"codes.npy", "txt", "json"} <= tokens[0].keys()
    assert [sample["__key__"] for sample in images] == [sample["__key__"] for sample in tokens]


def test_running_again_skips_every_stage(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *finished.recipe]) == 0
    assert capsys.readouterr().out.count("skipped") == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("pretrain.lr=0.5", "pretrain.lr was 0.001, is 0.5"),
        ("pretrain.lr=0.5", "--from pretrain"),
        ("name=other", "belongs to another run: name was 'smoke'"),
    ],
)
def test_a_finished_run_refuses_a_changed_recipe(finished: Finished, change: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *finished.recipe, "-o", change]) == 2
    assert message in capsys.readouterr().err


def test_sample_draws_a_picture(finished: Finished, tmp_path: Path) -> None:
    out = tmp_path / "drawn.png"
    assert main(["sample", *finished.recipe, "--out", str(out), "a smiling cat"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_killed_worker_then_an_interrupt_change_no_loss(finished: Finished, tmp_path: Path) -> None:
    """On a folder. A worker dies after step 5 at the earliest and is replaced; Ctrl-C leaves no process; the same command resumes.

    The losses are those of the undisturbed run, whose storage was another.
    """
    command, slow = _training_command(finished, tmp_path), {**os.environ, **watched(tmp_path, 2.0, 5)}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=slow, start_new_session=True)
    try:
        _wait_for(run, tmp_path, "start", 1)
        _wait_for(run, tmp_path, "checkpoint", 1)
        os.kill(_events(tmp_path, "start")[0]["pid"], signal.SIGKILL)
        _wait_for(run, tmp_path, "start", 2)
        _wait_for(run, tmp_path, "checkpoint", len(_events(tmp_path, "checkpoint")) + 1)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate()
    finally:
        run.kill()
    assert run.returncode == 130 and "run the same command again to resume" in errors, errors[-3000:]
    starts = _events(tmp_path, "start")
    assert len(starts) == 2
    assert starts[1]["start_step"] >= 5
    while any(_runs(start["pid"]) for start in starts):  # one that outlives the run ends this test by its time limit
        time.sleep(0.05)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert _events(tmp_path, "start")[-1]["start_step"] >= starts[1]["start_step"] + 5
    assert _losses(tmp_path) == _losses(finished.folder), "a disturbance, or the storage, changed the training"


def test_a_missing_bucket_and_wrong_credentials_are_named(
    s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare = ["prepare", SMOKE, "-o", f"run_dir={tmp_path}", "-o"]
    assert main([*prepare, "storage.root=s3://no-such-bucket/x"]) == 2
    error = capsys.readouterr().err
    assert "no-such-bucket" in error and "Traceback" not in error
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert main([*prepare, f"storage.root={s3_root}/refused"]) == 2
    error = capsys.readouterr().err
    assert "AWS_SECRET_ACCESS_KEY" in error and "Traceback" not in error


def _training_command(finished: Finished, folder: Path) -> list[str]:
    """``oar train`` in a new folder, on the data and tokens of the finished run."""
    markers = [f"stages/{stage}.json" for stage in ("data", "tokenizer", "tokens")]
    for name in [*finished.list("images"), *finished.list("tokens"), *finished.list("tokenizers"), *markers]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(finished.read(name))
    return [sys.executable, "-m", "oar_scale.cli", "train", SMOKE, "-o", f"run_dir={folder}", *SMALLER]


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # whoever should reap it may take its time
    except psutil.NoSuchProcess:
        return False


def _events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(str(folder / "events"), "pretrain") if event["kind"] == kind]


def _losses(folder: Path) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in _events(folder, "train")}


def _wait_for(run: subprocess.Popen[str], folder: Path, kind: str, count: int) -> None:
    """Wait for so many events while the run goes on."""
    while len(_events(folder, kind)) < count:
        assert run.poll() is None, f"it ended before {kind} number {count}: {run.communicate()[1][-4000:]}"
        time.sleep(0.02)
