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

from oar_scale.observe.events import attempts, read_events
from oar_scale.orders.order_table import read_orders
from oar_scale.storage import open_storage, read_json

pytestmark = [pytest.mark.ray, pytest.mark.slow]  # `oar run` and `oar train` start a Ray of their own
ROOT = Path(__file__).resolve().parents[2]
SMOKE = str(ROOT / "recipes" / "smoke.yaml")


def oar(*arguments: str, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "oar_scale.cli", *arguments], capture_output=True, text=True, timeout=timeout_s, cwd=ROOT)


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


def test_running_again_skips_every_stage(finished: Path) -> None:
    began = time.monotonic()
    again = oar("run", SMOKE, "-o", f"run_dir={finished}")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("skipped") == 9
    assert time.monotonic() - began < 60


def test_a_changed_setting_in_a_finished_run_is_refused_by_name(finished: Path) -> None:
    refused = oar("run", SMOKE, "-o", f"run_dir={finished}", "-o", "pretrain.lr=0.5")
    assert refused.returncode == 2
    assert "pretrain.lr was 0.001, is 0.5" in refused.stderr and "--from pretrain" in refused.stderr


def test_another_recipes_run_folder_is_refused(finished: Path) -> None:
    refused = oar("run", SMOKE, "-o", f"run_dir={finished}", "-o", "name=other")
    assert refused.returncode == 2
    assert "belongs to another run: name was 'smoke'" in refused.stderr


def test_sample_draws_a_picture(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "drawn.png"
    drawn = oar("sample", SMOKE, "-o", f"run_dir={finished}", "--out", str(out), "a smiling cat")
    assert drawn.returncode == 0, drawn.stderr
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_killed_training_worker_is_replaced_and_goes_on_from_the_checkpoint(finished: Path, tmp_path: Path) -> None:
    """The worker dies after step 5 at the earliest; the losses are those of the undisturbed run."""
    command, slow = _training_command(finished, tmp_path), {**os.environ, **watched(tmp_path, 2.0)}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=slow)
    try:
        worker = next(_wait_for(tmp_path, "start"))["pid"]
        next(_wait_for(tmp_path, "checkpoint"))
        os.kill(worker, signal.SIGKILL)
        watched(tmp_path, 0)
        output, _ = run.communicate(timeout=400)
    finally:
        run.kill()
    assert run.returncode == 0, output[-4000:]
    starts = [event["start_step"] for event in _events(tmp_path) if event["kind"] == "start"]
    if len(attempts(str(tmp_path / "events"), "pretrain")) == 1:
        pytest.fail("the worker was not killed before the end: make the smoke recipe longer")
    assert starts[-1] >= 5
    assert _losses(tmp_path) == _losses(finished)


def test_interrupted_training_says_so_leaves_no_process_and_goes_on(finished: Path, tmp_path: Path) -> None:
    command, slow = _training_command(finished, tmp_path), {**os.environ, **watched(tmp_path, 2.0)}
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=slow, start_new_session=True)
    try:
        worker = next(_wait_for(tmp_path, "start"))["pid"]
        next(_wait_for(tmp_path, "checkpoint"))
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=150)
    finally:
        run.kill()
    assert run.returncode == 130 and "the same command goes on from here" in errors, errors[-3000:]
    deadline = time.monotonic() + 20
    while _runs(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _runs(worker), "a worker outlived the run"
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    starts = [event["start_step"] for event in _events(tmp_path) if event["kind"] == "start"]
    assert starts[-1] >= 5
    assert _losses(tmp_path) == _losses(finished)


def test_a_missing_bucket_and_wrong_credentials_are_named(s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = ("prepare", SMOKE, "-o", f"run_dir={tmp_path}", "-o")
    missing = oar(*prepare, "storage.root=s3://no-such-bucket/x")
    assert missing.returncode == 2 and "no-such-bucket" in missing.stderr and "Traceback" not in missing.stderr
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    refused = oar(*prepare, f"storage.root={s3_root}/refused")
    assert refused.returncode == 2 and "AWS_SECRET_ACCESS_KEY" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.timeout(1200)
def test_the_same_run_with_everything_on_s3(s3_root: str, tmp_path: Path, finished: Path) -> None:
    root = f"{s3_root}/pipeline"
    done = oar("run", SMOKE, "-o", f"run_dir={tmp_path}", "-o", f"storage.root={root}", timeout_s=900)
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


def _wait_for(folder: Path, kind: str, seconds: float = 240) -> Iterator[dict[str, Any]]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield from (event for event in _events(folder) if event["kind"] == kind)
        time.sleep(0.02)
    raise TimeoutError(f"no {kind} event in {folder}")
