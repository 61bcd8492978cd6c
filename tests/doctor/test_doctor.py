"""The doctor tells what is so: on this machine, on one without any package, and about storage that cannot be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from oar_scale.cli import main
from oar_scale.doctor import Finding, examine, storage_checks
from oar_scale.doctor import kernels as kernel_checks
from oar_scale.doctor.finding import guarded
from oar_scale.doctor.storage_checks import disk, shared_memory, storage_root, weights_and_biases
from oar_scale.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TINY = kernel_checks.AttentionShape(batch=1, heads=2, kv_heads=2, rows=16, head_dim=16)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """A recipe of defaults whose run lies in a folder that is not there yet."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: doctored\nrun_dir: {tmp_path / 'deep' / 'run'}\n")
    return str(path)


def by_item(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.item: finding for finding in findings}


def test_a_sound_machine_gets_no_fail_and_says_which_kernels_run(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", recipe]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok   ", "warn ")) for line in lines), lines
    findings = dict(line[5:].split(": ", 1) for line in lines)
    assert findings["torch"].startswith(torch.__version__.split("+")[0])
    assert findings["devices"].startswith("no GPU: CPU, ") and torch.backends.cpu.get_cpu_capability() in findings["devices"]
    assert findings["process group"].startswith("gloo works")
    for precision in ("bf16", "fp32"):
        assert findings[f"attention {precision}"].startswith("causal CPU flash, with a mask CPU flash; runs here: flash, math")
        assert findings[f"decoding attention {precision}"].startswith("CPU flash; ")
    assert "x the speed of fp32" in findings["bf16 matmul"] and "TFLOP/s" in findings["bf16 matmul"]
    assert findings["fused AdamW"] == "works on cpu"
    assert str(tmp_path / "deep" / "run") in findings["storage root"] and "GiB free" in findings["run_dir"]
    assert findings["W&B"] == "off" and "/dev/shm" in findings
    assert not (tmp_path / "deep").exists()  # it looked, and left nothing behind


def test_without_a_recipe_the_machine_alone_is_examined(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert {"torch", "devices", "torch.compile"} <= {finding["item"] for finding in findings}
    assert not {"storage root", "run_dir", "W&B"} & {finding["item"] for finding in findings}


def test_json_says_the_same_as_the_lines(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", recipe, "--json"]) == 0
    findings = [Finding(**finding) for finding in json.loads(capsys.readouterr().out)]
    main(["doctor", recipe])
    lines = capsys.readouterr().out.splitlines()
    assert [str(finding).split(":")[0][5:] for finding in findings] == [line.split(":")[0][5:] for line in lines]
    assert str(findings[2]) == lines[2]


def test_unwritable_storage_fails_with_folder_and_remedy(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Storage that cannot be written fails and names the folder and the remedy."""
    (tmp_path / "file").write_text("not a folder")
    root = str(tmp_path / "file" / "store")
    assert main(["doctor", recipe, "-o", f"storage.root={root}", "--json"]) == 1
    failed = [finding for finding in json.loads(capsys.readouterr().out) if finding["status"] == "FAIL"]
    assert [finding["item"] for finding in failed] == ["storage root"]
    assert failed[0]["text"].startswith(root) and "move that file away, or use another path" in failed[0]["text"]
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_bucket_is_written_read_and_left_as_it_was(s3_root: str) -> None:
    from oar_scale.storage import join, open_storage

    root = join(s3_root, "doctor")
    (finding,) = storage_root(root)
    assert finding.status == "ok" and root in finding.text
    assert open_storage(root).list(root) == []


def test_a_bucket_that_is_not_there_fails_with_its_remedy(s3_root: str) -> None:
    (finding,) = guarded("storage root", lambda: storage_root("s3://oar-no-such-bucket/run"))
    assert finding.status == "FAIL" and "oar-no-such-bucket" in finding.text and "Create it" in finding.text
    assert "\n" not in str(finding)


def test_storage_that_does_not_answer_fails_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A named pipe as the storage: whoever opens it waits for the other end."""
    from oar_scale.storage.local import LocalStorage

    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(storage_checks, "STORAGE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(LocalStorage, "write", lambda self, uri, data: (tmp_path / "pipe").write_bytes(data))
    (finding,) = storage_root(str(tmp_path))
    assert finding.status == "FAIL" and f"{tmp_path}: no answer in" in finding.text
    os.close(os.open(tmp_path / "pipe", os.O_RDONLY))  # let the waiting thread go


def test_a_typing_error_in_the_recipe_is_the_usual_error(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", recipe, "-o", "pretrain.stepps=3"]) == 2
    answer = capsys.readouterr()
    assert "pretrain.stepps" in answer.err and answer.out == ""


def test_without_any_package_every_check_still_gives_its_line(recipe: str) -> None:
    """A Python that sees this source folder and its standard library, and nothing else."""
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from oar_scale.cli import main"
    program = f"{start}; sys.exit(main(['doctor', {recipe!r}, '--json']))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == ""
    findings = by_item([Finding(**finding) for finding in json.loads(done.stdout)])
    assert findings["torch"].status == "FAIL" and "pip install" in findings["torch"].text
    assert findings["boto3"].status == "warn" and "s3:// storage" in findings["boto3"].text
    for item in ("recipe", "devices", "process group", "attention", "decoding attention", "bf16 matmul", "fused AdamW", "torch.compile"):
        assert findings[item].status in ("FAIL", "warn"), item
        assert "install" in findings[item].text, item


def test_another_version_is_told_from_a_version_out_of_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    from oar_scale.doctor import machine

    real = importlib.metadata.version
    answers = {"ray": "2.999.0", "deepspeed": "0.1.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: answers.get(name) or real(name))
    required = ["ray[default,train]>=2.60", "deepspeed<0.20,>=0.19", 'mypy==2.1; extra == "dev"']  # as setuptools writes them
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: required)
    findings = by_item(list(machine.versions()))
    assert findings["ray"].status == "warn" and "2.999.0, and oar_scale was tested with" in findings["ray"].text
    assert findings["deepspeed"].status == "FAIL" and "0.1.0, and oar_scale needs <0.20,>=0.19" in findings["deepspeed"].text
    assert findings["open-clip-torch"].status == "ok"


def test_an_error_inside_a_check_becomes_its_line() -> None:
    def broken() -> Any:
        yield Finding("ok", "first", "seen")
        raise ZeroDivisionError("a\nb")

    assert [str(finding) for finding in guarded("second", broken)] == ["ok   first: seen", "FAIL second: ZeroDivisionError: a"]

    def mendable() -> Any:
        raise UserError("here: it is so.\nDo that.")
        yield

    assert [str(finding) for finding in guarded("third", mendable)] == ["FAIL third: here: it is so. Do that."]


def test_a_kernel_that_computes_something_else_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from oar_scale.model import attention as model_attention

    right = model_attention.attention_with_lse
    assert [finding.status for finding in kernel_checks.decoding_attention(TINY)] == ["ok", "ok"]
    monkeypatch.setattr(model_attention, "attention_with_lse", lambda q, k, v: (right(q, k, v)[0] + 0.2, None))
    assert [finding.status for finding in kernel_checks.decoding_attention(TINY)] == ["FAIL", "FAIL"]


def test_attention_without_a_fused_kernel_is_a_warning() -> None:
    """The watch sees what runs: inside a context that allows the plain computation alone, it is that."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = kernel_checks._qkv(TINY, torch.float32)
    with sdpa_kernel(SDPBackend.MATH):
        assert kernel_checks._kernel(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)) == "math"
    judged = kernel_checks._judged("attention", "fp32", "causal math", "math", 0.0)
    assert judged.status == "warn" and "model.dim / model.heads" in judged.text


def test_grouped_heads_are_examined_as_such() -> None:
    grouped = TINY._replace(heads=4, kv_heads=2)
    assert {finding.status for finding in kernel_checks.attention(grouped)} <= {"ok", "warn"}
    assert [finding.status for finding in kernel_checks.decoding_attention(grouped)] == ["ok", "ok"]


def test_little_room_is_a_warning_with_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(storage_checks, "LOW_DISK_GIB", 1e9)
    monkeypatch.setattr(storage_checks, "LOW_SHM_MIB", 1e12)
    (low,) = disk(str(tmp_path / "not" / "there"))
    assert low.status == "warn" and "set run_dir to another disk" in low.text
    (shm,) = shared_memory(str(tmp_path))
    assert shm.status == "warn" and "--shm-size" in shm.text


def test_wandb_online_without_a_key_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (without,) = weights_and_biases("online")
    assert without.status == "warn" and "wandb login" in without.text
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    (with_key,) = weights_and_biases("online")
    assert with_key.status == "ok"


def test_a_missing_compiler_warns_with_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A missing compiler is a warning with the package to install."""
    from oar_scale.doctor.machine import compilation

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    (without,) = compilation()
    assert without.status == "warn" and "apt-get install g++" in without.text
    (needed,) = compilation(needed=True)  # a recipe that compiles would end at its first step
    assert needed.status == "FAIL" and "or leave parallel.compile out" in needed.text
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: fatal error: Python.h: No such file' >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("CXX", str(broken))
    (cannot,) = compilation()
    assert cannot.status == "warn" and "Python.h" in cannot.text and "python3-dev" in cannot.text


def test_the_checks_are_little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """All checks of a machine: under 40 GFLOP and at most two programs started, so seconds on any CPU."""
    from torch.utils.flop_counter import FlopCounterMode

    started: list[Any] = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: started.append(args) or run(*args, **kwargs))
    with FlopCounterMode(display=False) as counter:
        list(examine())
    assert 1e9 < counter.get_total_flops() < 40e9
    assert len(started) <= 2
