"""From shards that others wrote to token shards that are verified, by commands alone."""

from __future__ import annotations

import contextlib
import os
import shlex
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_shards import img2dataset_folder, picture, upload, write_tar

from oar_scale.cli import _parser, main
from oar_scale.data.manifest import read_manifest
from oar_scale.data.shards import read_shard
from oar_scale.shard_pool import OnStep, ShardOutput
from oar_scale.shard_pool.tokenization import TokenizeWorker
from oar_scale.tokenizers.vq import VQSpec, VQTokenizer, save_vq


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    torch.manual_seed(0)
    spec = VQSpec(image_size=8, channels=32, multipliers=(1, 2), res_blocks=1, latent_channels=32, codebook_size=64, codebook_dim=4)
    save_vq(str(tmp_path / "vq.safetensors"), VQTokenizer(spec))
    return str(tmp_path / "vq.safetensors")


@pytest.mark.usefixtures("pool_here")
def test_foreign_pictures_on_s3_become_token_shards(
    s3_root: str, tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    images = upload(img2dataset_folder(tmp_path / "images"), f"{s3_root}/{uuid.uuid4().hex[:8]}")
    tokens = f"{images}-tokens"
    command = ["data", "tokenize", images, "--out", tokens, "--tokenizer", tokenizer, "--views", "center,center_flip", "--actors", "2"]
    assert main(command) == 2
    assert "oar data index" in capsys.readouterr().err
    assert main(["data", "index", images]) == 0
    assert main(command) == 0
    shown = capsys.readouterr()
    assert f"{tokens}: 12 images in 3 shards, 2 views of 4 x 4 codes" in shown.out
    assert "images 12/12" in shown.err
    manifest = read_manifest(tokens)
    assert (manifest.samples, manifest.grid, manifest.vocab_size, manifest.views) == (12, 4, 64, ("center", "center_flip"))
    assert len(manifest.tokenizer_id or "") > 8
    assert main(["data", "verify", tokens]) == 0
    before = read_shard(f"{tokens}/00000.tar", str(tmp_path / "cache"))
    assert [sample["__key__"] for sample in before] == [f"{number:09d}" for number in range(4)]
    assert np.array_equal(before[0]["txt"], b"photo 0")
    assert main(command) == 0, "a finished folder is gone through again"
    assert main(["data", "stats", tokens, "--tokenizer", tokenizer, "--grid", str(tmp_path / "grid.png")]) == 0
    assert os.path.getsize(tmp_path / "grid.png") > 1000


@pytest.mark.usefixtures("pool_here")
def test_relative_paths_mean_the_same_to_actors_in_another_folder(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a cluster (RAY_ADDRESS) work in the folder in which its Ray was started."""
    here, elsewhere, run = tmp_path / "here", tmp_path / "elsewhere", TokenizeWorker.run
    elsewhere.mkdir()
    images = img2dataset_folder(here / "images")
    os.replace(tokenizer, here / "vq.safetensors")

    def run_elsewhere(worker: TokenizeWorker, shard: str, on_step: OnStep) -> ShardOutput:
        with contextlib.chdir(elsewhere):
            output = run(worker, shard, on_step)
            return replace(output, uri=os.path.abspath(output.uri))

    monkeypatch.setattr(TokenizeWorker, "run", run_elsewhere)
    monkeypatch.chdir(here)
    assert main(["data", "index", os.path.relpath(images, here)]) == 0
    command = ["data", "tokenize", os.path.relpath(images, here), "--out", "tokens", "--tokenizer", "vq.safetensors", "--actors", "1"]
    assert main(command) == 0
    assert main(["data", "verify", "tokens"]) == 0
    assert not list(elsewhere.iterdir())


def test_a_view_that_does_not_exist_is_named(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "tokenize", str(tmp_path), "--out", str(tmp_path / "t"), "--tokenizer", tokenizer, "--views", "centre"]) == 2
    assert "--views centre: no such view" in capsys.readouterr().err


def test_names_of_strangers_do_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Members of a tar and objects of a bucket may be called anything, and there may be any number of their kinds."""
    evil = "\x1b]0;mine\x07"
    write_tar(tmp_path / "0.tar", [{"__key__": f"k{n}", "jpg": picture(n), "txt": b"a", f"x{n}{evil}": b"", evil: b""} for n in range(300)])
    assert main(["data", "index", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\\x1b]0;mine\\x07 300" in shown and len(shown) < 4000
    write_tar(tmp_path / f"{evil}.tar", [{"__key__": "k", "jpg": picture(0)}])
    for command in (["verify"], ["stats"], ["stats", "--json"]):
        main(["data", command[0], str(tmp_path), *command[1:]])
        shown = capsys.readouterr().out
        assert "\x1b" not in shown and "mine" in shown, command
    assert main(["checkpoint", "list", checkpoint_called(tmp_path, evil)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\\x1b]0;mine" in shown


def checkpoint_called(folder: Path, stage: str) -> str:
    save = folder / "checkpoints" / stage / "step-00000004" / "20260101T000000Z-0123abcd"
    save.mkdir(parents=True)
    (save / "file").write_bytes(b"")
    return str(folder / "checkpoints")


def test_every_command_of_the_guide_is_understood() -> None:
    guide = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    commands = [shlex.split(line, comments=True)[1:] for line in guide.splitlines() if line.startswith("    oar ")]
    assert {tuple(command[:2]) for command in commands} == {("data", verb) for verb in ("index", "verify", "stats", "tokenize")}
    for command in commands:
        assert callable(_parser().parse_args(command).run)


def test_the_old_name_of_the_stage_is_answered_with_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "--help"])
    assert "oar prepare" in " ".join(capsys.readouterr().out.split())  # help is wrapped to the width of the terminal
