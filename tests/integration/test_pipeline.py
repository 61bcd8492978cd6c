"""The whole pipeline in its two-minute version: real drawings, Ray, DeepSpeed, shards; on a folder and on a real S3 server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import webdataset
from elastic_runs import watched

from oar_scale.cli import main
from oar_scale.observe.events import attempts, read_events
from oar_scale.orders.order_table import read_orders
from oar_scale.storage import open_storage, read_json

pytestmark = [pytest.mark.ray, pytest.mark.slow]  # `oar run` and `oar train` start a Ray of their own
ROOT = Path(__file__).resolve().parents[2]
SMOKE = str(ROOT / "recipes" / "smoke.yaml")


def oar(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "oar_scale.cli", *arguments], capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of recipes/smoke.yaml."""
    folder = tmp_path_factory.mktemp("smoke")
    done = oar("run", SMOKE, "-o", f"run_dir={folder}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return folder


def test_one_command_takes_captioned_images_to_a_report(finished: Path) -> None:
    html = (finished / "report" / "index.html").read_text()
    assert "kid_efflite0" in html and "OpenMoji" in html and "CC BY-SA" in html
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert evaluation
    for name in ("base", "any_order", "ordered", "control"):
        assert (finished / "models" / f"{name}.safetensors").stat().st_size > 100_000


def test_every_training_image_has_an_order_that_is_a_permutation(finished: Path) -> None:
    tables = [read_orders(str(path)) for path in sorted((finished / "orders" / "train").glob("*.parquet"))]
    orders = np.concatenate([table.order_SN for table in tables])
    assert len(orders) == read_json(str(finished / "stages" / "tokens.json"))["results"]["train"]
    assert (np.sort(orders, axis=1) == np.arange(64)).all()
    assert len(np.unique(orders, axis=0)) > 1


def test_plain_webdataset_reads_the_shards(finished: Path) -> None:
    samples = list(webdataset.WebDataset(str(finished / "tokens" / "train" / "00000.tar"), shardshuffle=False))
    assert len(samples) == 32
    assert {"codes.npy", "txt", "json"} <= samples[0].keys()
    images = list(webdataset.WebDataset(str(finished / "images" / "train" / "00000.tar"), shardshuffle=False))
    assert [s["__key__"] for s in images] == [s["__key__"] for s in samples]


def test_running_again_skips_every_stage(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", SMOKE, "-o", f"run_dir={finished}"]) == 0
    assert capsys.readouterr().out.count("skipped") == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("pretrain.lr=0.5", "pretrain.lr was 0.001, is 0.5"),
        ("pretrain.lr=0.5", "--from pretrain"),
        ("name=other", "belongs to another run: name was 'smoke'"),
    ],
)
def test_a_finished_run_refuses_a_changed_recipe(finished: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", SMOKE, "-o", f"run_dir={finished}", "-o", change]) == 2
    assert message in capsys.readouterr().err


def test_sample_draws_a_picture(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "drawn.png"
    assert main(["sample", SMOKE, "-o", f"run_dir={finished}", "--out", str(out), "a smiling cat"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_killed_worker_is_replaced_and_resumes(finished: Path, tmp_path: Path) -> None:
    """The worker dies after step 5 at the earliest; the losses are those of the undisturbed run."""
    command, slow = _training_command(finished, tmp_path), {**os.environ, **watched(tmp_path, 2.0, 5)}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=slow)
    try:
        worker = next(_wait_for(tmp_path, "start"))["pid"]
        next(_wait_for(tmp_path, "checkpoint"))
        os.kill(worker, signal.SIGKILL)
        watched(tmp_path, 0)
        output, _ = run.communicate()
    finally:
        run.kill()
    assert run.returncode == 0, output[-4000:]
    starts = [event["start_step"] for event in _events(tmp_path) if event["kind"] == "start"]
    if len(attempts(str(tmp_path / "events"), "pretrain")) == 1:
        pytest.fail("the worker was not killed before the end: make the smoke recipe longer")
    assert starts[-1] >= 5
    assert _losses(tmp_path) == _losses(finished)


def test_interrupted_training_leaves_no_process_and_resumes(finished: Path, tmp_path: Path) -> None:
    command, slow = _training_command(finished, tmp_path), {**os.environ, **watched(tmp_path, 2.0, 5)}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=slow, start_new_session=True)
    try:
        worker = next(_wait_for(tmp_path, "start"))["pid"]
        next(_wait_for(tmp_path, "checkpoint"))
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate()
    finally:
        run.kill()
    assert run.returncode == 130 and "run the same command again to resume" in errors, errors[-3000:]
    while _runs(worker):  # one that outlives the run ends this test by its time limit
        time.sleep(0.05)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    starts = [event["start_step"] for event in _events(tmp_path) if event["kind"] == "start"]
    assert starts[-1] >= 5
    assert _losses(tmp_path) == _losses(finished)


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


def test_the_same_run_with_everything_on_s3(s3_root: str, tmp_path: Path, finished: Path) -> None:
    root = f"{s3_root}/pipeline"
    done = oar("run", SMOKE, "-o", f"run_dir={tmp_path}", "-o", f"storage.root={root}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert (tmp_path / "report" / "index.html").stat().st_size > 50_000
    names = [uri.removeprefix(root) for uri in open_storage(root).list(root)]
    for pattern in (r"/tokens/train/00000\.tar", r"/orders/train/00000\.parquet", r"/checkpoints/pretrain/step-00000020/COMMITTED"):
        assert any(re.fullmatch(pattern, name) for name in names), pattern
    assert not (tmp_path / "tokens").exists() and not (tmp_path / "checkpoints").exists()
    assert _losses(tmp_path) == _losses(finished), "the storage changed the training"


def _training_command(finished: Path, folder: Path) -> list[str]:
    """``oar train`` in a new folder, on the data and tokens of the finished run."""
    for part in ("images", "tokens", "tokenizers"):
        shutil.copytree(finished / part, folder / part)
    for stage in ("data", "tokenizer", "tokens"):
        (folder / "stages").mkdir(exist_ok=True)
        shutil.copy(finished / "stages" / f"{stage}.json", folder / "stages")
    return [sys.executable, "-m", "oar_scale.cli", "train", SMOKE, "-o", f"run_dir={folder}"]


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # whoever should reap it may take its time
    except psutil.NoSuchProcess:
        return False


def _events(folder: Path) -> list[dict[str, Any]]:
    return read_events(str(folder / "events"), "pretrain")


def _losses(folder: Path) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in _events(folder) if event["kind"] == "train"}


def _wait_for(folder: Path, kind: str, seconds: float = 800) -> Iterator[dict[str, Any]]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield from (event for event in _events(folder) if event["kind"] == kind)
        time.sleep(0.02)
    raise TimeoutError(f"no {kind} event in {folder}")
