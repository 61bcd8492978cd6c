"""Pictures of many prompts by a pool: those of one process, whatever was interrupted.

On a real Ray; what does not depend on it, by actors in this process.
"""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_models import small_model

from oar_scale.cli import main
from oar_scale.config.loading import dump_recipe
from oar_scale.config.schema import Recipe, SampleConfig
from oar_scale.data.balanced_labels import balanced_labels
from oar_scale.data.manifest import read_manifest
from oar_scale.data.prompt_files import GivenPrompt
from oar_scale.data.shards import read_shard
from oar_scale.data.verify import verify_folder
from oar_scale.errors import UserError
from oar_scale.generation.model_bundle import find_bundle
from oar_scale.generation.picture_files import read_record
from oar_scale.generation.pretrained import load_pretrained
from oar_scale.generation.wanted_pictures import draw_wanted, wanted_pictures
from oar_scale.model import save_model
from oar_scale.model.spec import ClassSpec
from oar_scale.shard_pool import PoolReport, sampling_pool
from oar_scale.shard_pool.sampling_pool import SamplingJob, sample_all
from oar_scale.storage import join, open_storage
from oar_scale.tokenizers.vq import VQSpec, VQTokenizer, save_vq

SIDE = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a run with a model of ten classes."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = {"image": {"multipliers": (1, 1, 1)}, "text": {"type": "labels", "classes": 10}}
    parallel = {"precision": "fp32", "cpu_threads": 1}
    recipe = {"name": "small", "data": {"image_size": SIDE}, "tokenizer": tokenizer, "sample": {"guidance": 1.5}, "parallel": parallel}
    (folder / "recipe.yaml").write_text(dump_recipe(Recipe.model_validate(recipe)))
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"image_size": SIDE, "channels": 32, "multipliers": (1, 1, 1), "res_blocks": 1, "latent_channels": 32}
    save_vq(str(folder / "tokenizers" / "vq.safetensors"), VQTokenizer(VQSpec(**sizes, codebook_size=7, codebook_dim=4)))
    save_model(str(folder / "models" / "ordered.safetensors"), small_model(condition=ClassSpec(classes=10)))
    return str(folder)


GIVEN = [GivenPrompt(str(number % 10), number, 4 if number == 1 else 3, f"prompts.csv row {number + 2}") for number in range(5)]


def job(run: str, out: str, **changes: Any) -> SamplingJob:
    return dataclasses.replace(SamplingJob(bundle=find_bundle(run), out=out, dtype=torch.float32, count=2, batch=3), **changes)


def pictures(out: str, cache: Path) -> dict[str, bytes]:
    samples = [sample for info in read_manifest(out).shards for sample in read_shard(join(out, info.name), str(cache), info)]
    return {sample["__key__"]: sample["png"] for sample in samples}


class Killed(Exception):
    """Ends a pool as a signal that nobody handles."""


@pytest.mark.usefixtures("shared_ray")
def test_an_interrupted_pool_draws_the_pictures_of_one_process(run: str, s3_root: str, tmp_path: Path) -> None:
    """Its driver ends after the first shard, with the actors at the next ones; then one tar is lost, and another pool goes on."""
    wanted, out = job(run, join(s3_root, "drawn")), join(s3_root, "drawn")

    def kill(done: int, total: int, report: PoolReport) -> None:
        assert total == 10
        if done:
            raise Killed

    with pytest.raises(Killed):
        sample_all(wanted, GIVEN, shard_pictures=4, actors=1, on_progress=kill)
    storage, first = open_storage(out), join(out, "00000.tar")
    before = storage.read(first)
    assert not storage.exists(join(out, "manifest.json"))
    storage.delete(first)
    manifest = sample_all(wanted, GIVEN, shard_pictures=4, actors=2)
    assert storage.read(first) == before
    assert [info.samples for info in manifest.shards] == [4, 4, 2] and not manifest.skipped
    assert not verify_folder(out, None, workers=2, decode=True).faults
    alone = {each.wanted.key: each for each in draw_wanted(load_pretrained(run), wanted_pictures(GIVEN, 2), batch=64)}
    drawn = pictures(out, tmp_path)
    assert list(drawn) == [each.key for each in wanted_pictures(GIVEN, 2)]
    for key, png in drawn.items():
        assert Image.open(io.BytesIO(png)).tobytes() == alone[key].picture.tobytes()
        assert read_record(png) == alone[key].record
    sample = read_shard(first, str(tmp_path))[3]
    assert (sample["__key__"], sample["txt"]) == ("000001_1", b"1") and json.loads(sample["json"])["drawing"]["seed"] == 4


@pytest.mark.usefixtures("pool_here")
@pytest.mark.parametrize(
    ("changes", "given", "says"),
    [
        ({"count": 1}, GIVEN, "made with drawings of a prompt 2, now it is 1"),
        ({"order": "raster"}, GIVEN, "made with order of the model, now it is raster"),
        ({"dtype": torch.bfloat16}, GIVEN, "made with precision float32, now it is bfloat16"),
        ({}, GIVEN[1:], "made with prompts"),
    ],
)
def test_pictures_of_other_settings_do_not_mix(run: str, tmp_path: Path, changes: dict[str, Any], given: Any, says: str) -> None:
    first = job(run, str(tmp_path))
    with pytest.raises(Killed):
        sample_all(first, GIVEN, actors=1, on_progress=stop_at_once)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=says):
        sample_all(dataclasses.replace(first, **changes), given, actors=1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def stop_at_once(done: int, total: int, report: PoolReport) -> None:
    raise Killed


@pytest.mark.usefixtures("pool_here")
def test_prompts_that_cannot_be_drawn_are_named(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The others are drawn; the same command again has nothing to do, and still names them."""
    (tmp_path / "prompts.txt").write_text("3\n\n99\n7\n")
    command = ["sample", run, "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out"), "--actors", "1"]
    assert main(command) == main(command) == 1
    said = capsys.readouterr().out
    assert said.count("prompts.txt:3: left out: '99' is no class label: this model knows the labels 0 to 9") == 2
    assert said.count("out: 2 pictures in 1 shards, in ") == 2
    assert list(pictures(str(tmp_path / "out"), tmp_path)) == ["000000", "000002"]
    assert read_manifest(str(tmp_path / "out")).skipped.keys() == {"000001"}
    assert main(["sample", run, "--out", str(tmp_path / "out"), "--status"]) == 0
    assert "out: 1 of 1 shards, 3 of 3 images (100.0 %)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--actors", "1", "3"), "prompts come from a file"),
        (("--actors", "1", "--prompts", "p.txt"), "--out FOLDER"),
        (("--actors", "1", "--prompts", "p.txt", "--out", "x.png"), "--out FOLDER"),
        (("--actors", "1", "--prompts", "p.txt", "--out", "x", "--gpus-per-actor", "nan"), "must be a number from 0"),
        (("--actors", "1", "--prompts", "p.txt", "--out", "x", "--order", "hilbrt"), "no such policy"),
        (("--status", "--out", "x"), "no pool has begun"),
    ],
)
def test_what_a_pool_cannot_do_is_said(
    run: str, arguments: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("3")
    assert main(["sample", run, *arguments]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_model_of_the_hub_is_looked_up_on_each_host(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = dataclasses.replace(find_bundle(run), where="hf://me/emoji@0123", model="/home/driver/model", sample=SampleConfig(top_k=3))
    monkeypatch.setattr(sampling_pool, "find_bundle", {"hf://me/emoji@0123": find_bundle(run)}.__getitem__)
    assert sampling_pool._here(own) == dataclasses.replace(find_bundle(run), sample=SampleConfig(top_k=3))


@pytest.mark.usefixtures("pool_here")
def test_balanced_labels_are_drawn_equally_often(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command, in a pool: the same labels as those of the function, whatever the actors and shards."""
    out = str(tmp_path / "drawn")
    balanced = ["sample", run, "--labels", "balanced", "--out", out]
    assert main([*balanced, "--images", "20", "--seed", "3", "--actors", "1", "--per-shard", "8"]) == 0
    samples = [sample for info in read_manifest(out).shards for sample in read_shard(join(out, info.name), str(tmp_path), info)]
    labels = [int(sample["txt"]) for sample in samples]
    assert labels == [int(str(each.prompt)) for each in balanced_labels(10, 20, seed=3)] and sorted(labels) == sorted([*range(10)] * 2)
    assert main([*balanced, "--images", "25"]) == 2
    assert "--images 25: not a multiple of the model's 10 classes. Nearest that is: 20." in capsys.readouterr().err
