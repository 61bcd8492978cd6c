"""``oar checkpoint list | verify | prune | diff | convert | export --ema`` on what two real trainings have saved."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import forge_file, forge_manifest, hostile_files
from launcher import run_workers
from safetensors.torch import load_file
from small_run import prepare_small_run, pretraining
from small_training import note, noted, tiny_recipe, training, with_stage

from oar_scale.cli import main
from oar_scale.commands import checkpoint_content
from oar_scale.commands.checkpoint_content import convert_checkpoint
from oar_scale.commands.checkpoint_export import export_checkpoint
from oar_scale.commands.checkpoint_management import list_checkpoints, verify_checkpoints
from oar_scale.distributed.checkpoints import Saver, restore
from oar_scale.distributed.checkpoints.deepspeed_files import load_shard
from oar_scale.distributed.checkpoints.layout import new_save, read_checkpoint
from oar_scale.distributed.checkpoints.shard_keys import WEIGHTS
from oar_scale.distributed.checkpoints.shard_tensors import Shards, read_shards
from oar_scale.errors import UserError
from oar_scale.model import AnyOrderModel, load_model
from oar_scale.pipeline import bind_run_dir
from oar_scale.run.context import Run
from oar_scale.storage import join, open_storage
from oar_scale.training.job import TrainingJob

UNTRAINED = "conditioner.null_rows"


def save_under_both_kinds(job: TrainingJob, out: str) -> None:
    """Steps 2 under ZeRO 2, 4 under ZeRO 3, 6 under ZeRO 0; each resumes from the one before. One parameter is not trained."""
    from oar_scale.distributed import deepspeed_engine as engine

    made = engine._initial_model

    def frozen(*args: Any) -> AnyOrderModel:
        model = made(*args)
        model.get_parameter(UNTRAINED).requires_grad_(False)
        return model

    engine._initial_model = frozen
    with training(job, 6) as trainer:
        for first, stage in ((0, 2), (2, 3), (4, 0)):
            here = with_stage(job, stage)
            train = trainer(here)
            if first:
                restore(train.engine, here)
            train.losses(first, first + 2)
            saver = Saver(here)
            saver.save(train.engine, first + 2, {"metrics": {"nll_random": 4.5 - first / 4}})
            note(out, f"{first + 2}", {"outcomes": [vars(outcome) for outcome in saver.finish(60)]})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("care")
    run = prepare_small_run(tiny_recipe(str(folder / "run"), pretrain={"keep_checkpoints": 3}))
    bind_run_dir(run)
    run_workers(save_under_both_kinds, 2, pretraining(run), str(folder))
    assert [noted(str(folder), str(step))["outcomes"][0]["fault"] for step in (2, 4, 6)] == [None] * 3
    return run


@pytest.fixture
def copy(run: Run, tmp_path: Path) -> Path:
    """The run's checkpoints, to be spoiled."""
    return Path(shutil.copytree(run.at("checkpoints"), tmp_path / "checkpoints"))


def checkpoint(run: Run, step: int) -> str:
    return run.at("checkpoints", "pretrain", f"step-{step:08d}")


def test_the_list_shows_steps_workers_bytes_age_and_likelihood(run: Run, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = copy / "pretrain" / "step-00000008" / new_save(time.time() - 7200)
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"")
    assert main(["checkpoint", "list", str(copy)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["STAGE", "STEP", "COMMITTED", "WORKERS", "ZERO", "BYTES", "AGE", "nll_random"]
    assert re.fullmatch(r"pretrain +2 +yes +2 +2 +[\d,]+ +\d+ (s|min) +4\.5000", rows[0])
    assert re.fullmatch(r"pretrain +6 +yes +2 +0 +[\d,]+ +\d+ (s|min) +3\.5000", rows[2])
    assert re.fullmatch(r"pretrain +8 +no +2 h", rows[3])
    assert list_checkpoints(run.local()).count("yes") == 3, "a run's folder is as good a name"
    with pytest.raises(UserError, match="no checkpoints here"):
        list_checkpoints(run.at("tokens"))


def test_every_byte_is_verified_and_what_is_wrong_is_named(copy: Path, s3_root: str, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = join(s3_root, "verify")
    for path in (path for path in copy.rglob("*") if path.is_file()):
        open_storage(prefix).upload(str(path), join(prefix, str(path.relative_to(copy))))
    for folder in (str(copy), prefix):
        assert main(["checkpoint", "verify", folder]) == 0
        assert capsys.readouterr().out.count("all as they were written") == 3
    victim = next((copy / "pretrain" / "step-00000004").glob("*/*rank_1*optim*"))
    whole = bytearray(victim.read_bytes())
    whole[len(whole) // 2] ^= 1
    victim.write_bytes(whole)
    open_storage(prefix).write(join(prefix, str(victim.relative_to(copy))), bytes(whole))
    for folder in (str(copy), prefix):
        assert main(["checkpoint", "verify", folder]) == 1
        assert re.search(rf"step-00000004: {victim.name} is damaged \(\d+ bytes, crc32c", capsys.readouterr().out)
    assert [fault for _, fault in verify_checkpoints(str(copy / "pretrain" / "step-00000006"))] == [None]


def test_a_prune_says_what_it_would_do_and_keeps_the_newest(run: Run, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = copy / "pretrain" / "step-00000004" / new_save(time.time() - 7200)
    left.mkdir()
    (left / "half").write_bytes(b"")
    assert main(["checkpoint", "prune", str(copy), "--keep", "1", "--keep-best", "1", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("would remove") == 2 and left.exists()
    assert main(["checkpoint", "prune", str(copy), "--keep", "1", "--keep-every", "4"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"removed .*step-00000002: \d+ files, not kept", output) and re.search(
        r"removed .*step-00000004: 1 files, left over", output
    )
    assert sorted(os.listdir(copy / "pretrain")) == ["step-00000004", "step-00000006"] and not left.exists()
    assert main(["checkpoint", "prune", run.local()]) == 0
    assert "nothing to remove" in capsys.readouterr().out, "the recipe keeps three"
    assert main(["checkpoint", "prune", str(copy)]) == 2
    assert "Set it: --keep N" in capsys.readouterr().err


def test_a_difference_is_shown_for_every_parameter_and_moment(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "diff", checkpoint(run, 2), checkpoint(run, 4)]) == 0
    output = capsys.readouterr().out
    assert re.search(r"^step +2 +4$", output, re.MULTILINE) and re.search(r"^zero_stage +2 +3$", output, re.MULTILINE)
    table = output.split("\n\n")[1].splitlines()
    assert table[0].split() == ["PARAMETER", "weights", "ema", "exp_avg", "exp_avg_sq"]
    assert all(float(number) > 0 for number in table[1].split()[1:]), table[1]
    assert main(["checkpoint", "diff", checkpoint(run, 2), checkpoint(run, 2)]) == 0
    assert not re.findall(r" (?!0$)\S+$", capsys.readouterr().out.split("\n\n")[1].split("\n", 1)[1], re.MULTILINE)


@pytest.mark.parametrize("step", [2, 4])
def test_universal_format_has_the_same_values_and_the_average(run: Run, tmp_path: Path, step: int) -> None:
    out = tmp_path / "universal"
    assert main(["checkpoint", "convert", checkpoint(run, step), "--out", str(out)]) == 0
    assert (out / "latest_universal").read_text() == "universal"
    state = read_checkpoint(checkpoint(run, step))
    shards = read_shards(state.folder, state.files)
    for name in shards.shapes:
        for kind, file in ((WEIGHTS, "fp32"), ("exp_avg", "exp_avg"), ("ema", "ema")):
            stored = torch.load(out / "universal" / "zero" / name / f"{file}.pt", weights_only=True)
            stored = stored["param"] if isinstance(stored, dict) else stored
            assert torch.equal(stored.view(shards.shapes[name]), shards.whole(name, kind)), (name, kind)
    with pytest.raises(UserError, match="there is something here already"):
        convert_checkpoint(checkpoint(run, step), str(out))


@pytest.mark.parametrize("step", [2, 4])
def test_deepspeeds_own_command_makes_whole_weights(run: Run, tmp_path: Path, step: int) -> None:
    """The command in docs/checkpoints.md: it finds the shards by itself."""
    command = [sys.executable, "-m", "deepspeed.utils.zero_to_fp32", checkpoint(run, step), str(tmp_path), "--safe_serialization"]
    done = subprocess.run(command, env={**os.environ, "DS_ACCELERATOR": "cpu"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    tensors, state = load_file(tmp_path / "model.safetensors"), read_checkpoint(checkpoint(run, step))
    shards = read_shards(state.folder, state.files)
    for name in shards.shapes:
        assert torch.equal(tensors[name], shards.whole(name, WEIGHTS)), name


def test_zero_0_has_no_universal_format(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="DeepSpeed converts none of ZeRO 0"):
        convert_checkpoint(checkpoint(run, 6), str(tmp_path / "out"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("step", [2, 4, 6])
def test_weights_or_average_are_exported_from_any_zero_stage(run: Run, tmp_path: Path, step: int) -> None:
    state = read_checkpoint(checkpoint(run, step))
    shards = read_shards(state.folder, state.files)
    base = load_model(run.model_uri("base")).get_parameter(UNTRAINED)
    for flags, kind in (([], WEIGHTS), (["--ema"], "ema")):
        out = str(tmp_path / kind)
        assert main(["checkpoint", "export", checkpoint(run, step), "--out", out, *flags]) == 0
        model = load_model(join(out, "model.safetensors"))
        for name, tensor in model.named_parameters():
            expected = base if name == UNTRAINED else shards.whole(f"model.{name}", kind)
            assert torch.equal(tensor, expected), name
    with pytest.raises(UserError, match="--ema is for a training checkpoint"):
        export_checkpoint(str(tmp_path / "weights"), str(tmp_path / "again"), average=True)


# -- what somebody else has written -------------------------------------------------------------------------------------------


def commands(step: Path, out: Path) -> dict[str, list[str]]:
    """Every command that opens the files of a checkpoint."""
    return {
        "verify": ["verify", str(step)],
        "diff": ["diff", str(step), str(step)],
        "convert": ["convert", str(step), "--out", str(out / "converted")],
        "export": ["export", str(step), "--out", str(out / "exported")],
        "export to a peer": ["export", str(step), "--format", "randar", "--out", str(out / "peer.pt")],
    }


@pytest.mark.parametrize("kind", ["model", "optim"])
def test_no_command_runs_code_from_a_checkpoint(copy: Path, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checksums are right: whoever may write to the bucket wrote them, too."""
    step, ran, out = copy / "pretrain" / "step-00000002", tmp_path / "ran", tmp_path / "out"
    out.mkdir()
    name = min(name for name in read_checkpoint(str(step)).files if f"{kind}_states" in name)
    files = hostile_files(str(ran))
    for how in ("zip", "protocol 2", "exec"):
        forge_file(str(step), name, files[how])
        for command, arguments in commands(step, out).items():
            assert main(["checkpoint", *arguments]) == 2, (how, command)
            error = capsys.readouterr().err
            assert re.search(rf"{name}: .*run(?:ning)? code", error) and "Traceback" not in error, (command, error)
            assert not ran.exists() and not list(out.iterdir()), (how, command)


def test_the_converter_gets_what_was_checked(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is replaced after our own reading, and one that the manifest does not name: DeepSpeed's tool unpickles neither."""
    step, ran = copy / "pretrain" / "step-00000004", tmp_path / "ran"
    checkpoint = read_checkpoint(str(step))
    data = hostile_files(str(ran))["zip"]
    extra = os.path.join(checkpoint.folder, "zero_pp_rank_9_mp_rank_00_model_states.pt")
    Path(extra).write_bytes(data)
    convert_checkpoint(str(step), str(tmp_path / "first"))
    reads = checkpoint_content.read_shards

    def replaced(folder: str, names: Iterable[str]) -> Shards:
        shards = reads(folder, names)
        for name in checkpoint.files:  # another inode: what was read stays as it was
            os.unlink(os.path.join(folder, name))
            Path(folder, name).write_bytes(data)
        return shards

    monkeypatch.setattr(checkpoint_content, "read_shards", replaced)
    with pytest.raises(UserError, match="run code"):
        convert_checkpoint(str(step), str(tmp_path / "second"))
    assert not ran.exists() and not (tmp_path / "second").exists()


def renamed(value: Any, old: str, new: str) -> Any:
    """A state in which a parameter has another name."""
    if isinstance(value, dict):
        return type(value)((new if key == old else key, renamed(each, old, new)) for key, each in value.items())
    if isinstance(value, list | tuple):
        return type(value)(renamed(each, old, new) for each in value) if type(value) in (list, tuple) else value
    return new if isinstance(value, str) and value == old else value


@pytest.mark.parametrize("wrong", ["../../../escaped", "{tmp}/escaped", "a/../../escaped", ".."])
@pytest.mark.parametrize("number", [2, 4])
def test_parameters_are_no_paths(copy: Path, number: int, wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The converter makes a folder of each parameter's name, and a file of each moment's."""
    step = copy / "pretrain" / f"step-{number:08d}"
    checkpoint = read_checkpoint(str(step))
    parameter = max(read_shards(checkpoint.folder, checkpoint.files).shapes)
    for name in checkpoint.files:
        file = BytesIO()
        torch.save(renamed(load_shard(os.path.join(checkpoint.folder, name)), parameter, wrong.format(tmp=tmp_path)), file)
        forge_file(str(step), name, file.getvalue())
    assert main(["checkpoint", "convert", str(step), "--out", str(tmp_path / "out")]) == 2
    assert "is not the name of a parameter" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*escaped*"))


@pytest.mark.parametrize("name", ["../../escaped.pt", "{tmp}/escaped.pt", "a/b.pt", "..", "", "mp_rank_00_model_states.pt\n", "x\0y"])
def test_a_manifest_names_no_other_files(copy: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = copy / "pretrain" / "step-00000002"
    wrong = name.format(tmp=tmp_path)

    def add(manifest: dict[str, Any]) -> None:
        manifest["files"][wrong] = {"bytes": 1, "crc32c": 0, "rank": 0}

    forge_manifest(str(step), add)
    for arguments in commands(step, tmp_path / "out").values():
        assert main(["checkpoint", *arguments]) in (1, 2)
        printed = "".join(capsys.readouterr())
        assert "is not the name of a checkpoint's file" in printed and "Traceback" not in printed


def resume(job: TrainingJob, out: str) -> None:
    with training(job, 6) as trainer:
        train = trainer(job)
        try:
            restore(train.engine, job)
        except UserError as error:
            Path(out, f"refused-{os.environ['RANK']}").write_text(str(error))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_training_runs_no_code(run: Run, copy: Path, stage: int, tmp_path: Path) -> None:
    """With the shards as they are, and converted; every worker is told, so that none waits for another."""
    step, ran = copy / "pretrain" / "step-00000002", tmp_path / "ran"
    shutil.rmtree(copy / "pretrain" / "step-00000004")
    shutil.rmtree(copy / "pretrain" / "step-00000006")
    name = max(read_checkpoint(str(step)).files)  # the second worker's
    forge_file(str(step), name, hostile_files(str(ran))["zip"])
    for part in ("tokens", "tokenizers", "models"):
        os.symlink(run.at(part), tmp_path / part)
    job = replace(with_stage(pretraining(run), stage), root=str(tmp_path), local=str(tmp_path / "local"))
    run_workers(resume, 2, job, str(tmp_path))
    for rank in range(2):
        assert re.search(rf"{name}: asks for \S+system, .*run code", (tmp_path / f"refused-{rank}").read_text())
    assert not ran.exists() and read_checkpoint(str(step)).step == 2
