"""Tokenising a folder with the pool: the codes of every view, a manifest that counts them, and no mixing of tokenizers.

By two actors of a real Ray; what does not depend on them, by one in this process.
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from oar_scale.config.schema import DataConfig, Recipe
from oar_scale.data.bad_samples import BadSamples
from oar_scale.data.manifest import Manifest, read_manifest, write_manifest
from oar_scale.data.notes import Notes
from oar_scale.data.shards import pack_shard, read_token_shard, shard_name, write_shard
from oar_scale.data.verify import verify_folder
from oar_scale.errors import UserError
from oar_scale.run.context import Run
from oar_scale.shard_pool import Bounds, Ledger, ShardOutput
from oar_scale.shard_pool.ledger import LedgerEntry
from oar_scale.shard_pool.tokenization import TokenizeJob, TokenizeWorker, tokenize_all
from oar_scale.stages import tokens as tokens_stage
from oar_scale.storage import open_storage
from oar_scale.tokenizers.vq import VQSpec, VQTokenizer, load_vq, pixels_to_unit, save_vq

SIDE, VIEWS = 16, ("center", "center_flip")


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def small_vq(seed: int) -> VQTokenizer:
    torch.manual_seed(seed)
    spec = VQSpec(image_size=SIDE, channels=32, multipliers=(1, 2), res_blocks=1, latent_channels=32, codebook_size=32, codebook_dim=4)
    return VQTokenizer(spec)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TokenizeJob:
    """Two image shards of 4 and 3 pictures and an untrained tokenizer."""
    folder = tmp_path_factory.mktemp("images")
    save_vq(str(folder / "vq.safetensors"), small_vq(0))
    samples = [{"__key__": f"image{i}", "png": picture(i), "txt": f"picture {i}", "json": b"{}"} for i in range(7)]
    shards = [write_shard(str(folder / "images"), shard_name(i), samples[4 * i : 4 * i + 4]) for i in range(2)]
    write_manifest(str(folder / "images"), Manifest(shards=tuple(shards), attribution="drawn by a generator"))
    return TokenizeJob(
        images=str(folder / "images"), tokens="", vq=str(folder / "vq.safetensors"), views=VIEWS, cache_dir=str(folder / "cache")
    )


@pytest.mark.usefixtures("shared_ray")
def test_every_view_of_every_image_is_encoded_and_counted(job: TokenizeJob, tmp_path: Path) -> None:
    job = dataclasses.replace(job, tokens=str(tmp_path / "tokens"))
    progress: list[tuple[int, int]] = []
    manifest = tokenize_all(job, actors=2, on_progress=lambda *images: progress.append(images))
    assert manifest == read_manifest(job.tokens)
    assert (manifest.samples, manifest.grid, manifest.vocab_size, manifest.views) == (7, 8, 32, VIEWS)
    assert manifest.attribution == "drawn by a generator"
    assert (progress[0], progress[-1]) == ((0, 7), (7, 7))
    vq = load_vq(job.vq)
    first = read_token_shard(str(tmp_path / "tokens/00000.tar"), job.cache_dir, manifest.shards[0])
    assert first.keys == ["image0", "image1", "image2", "image3"]
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(io.BytesIO(picture(i)))) for i in range(4)]))
    np.testing.assert_array_equal(first.view(0), vq.encode(pixels_to_unit(pixels)).numpy())
    np.testing.assert_array_equal(first.view(1), vq.encode(pixels_to_unit(pixels.flip(2))).numpy())


@pytest.mark.usefixtures("pool_here")
def test_codes_of_two_tokenizers_do_not_mix(job: TokenizeJob, tmp_path: Path) -> None:
    job = dataclasses.replace(job, tokens=str(tmp_path / "tokens"))
    tokenize_all(job, actors=1)
    save_vq(str(tmp_path / "other.safetensors"), small_vq(1))
    with pytest.raises(UserError, match=r"the codes of 00000\.tar were made with another tokenizer"):
        tokenize_all(dataclasses.replace(job, vq=str(tmp_path / "other.safetensors")), actors=1)


@pytest.mark.usefixtures("pool_here")
def test_no_manifest_is_written_while_a_shard_is_missing(job: TokenizeJob, tmp_path: Path) -> None:
    images, tokens = tmp_path / "images", tmp_path / "tokens"
    broken = [{"__key__": "cat", "png": b"no picture", "txt": "a cat", "json": b"{}"}]
    shards = [write_shard(str(images), shard_name(0), broken)]
    write_manifest(str(images), Manifest(shards=tuple(shards)))
    with pytest.raises(UserError, match=r"00000\.tar: image of sample 'cat' cannot be read"):
        tokenize_all(dataclasses.replace(job, images=str(images), tokens=str(tokens)), actors=1)
    assert not (tokens / "manifest.json").exists()


@pytest.mark.usefixtures("pool_here")
def test_codes_of_a_late_or_dead_actor_agree_with_the_manifest(job: TokenizeJob, tmp_path: Path) -> None:
    """Another GPU gives other last bits, and now and then another code: the first bytes stay, and the manifest describes them."""
    job = dataclasses.replace(job, tokens=str(tmp_path / "tokens"))
    ours = TokenizeWorker(job).run("00000.tar", lambda: None)
    samples = [{"__key__": f"image{i}", "codes.npy": np.zeros((2, 64), dtype=np.uint16), "txt": "x", "json": b"{}"} for i in range(4)]
    info, data = pack_shard("00000.tar", samples)
    ledger = Ledger(str(tmp_path / "tokens/ledger"))
    theirs = ShardOutput(ours.uri, data, ours.made_from, {"shard": info.model_dump()})
    ledger.write_draft("00000.tar", info.crc32c, LedgerEntry(theirs.result))  # it dies before the entry
    open_storage(ours.uri).write(ours.uri, data)
    manifest = tokenize_all(job, actors=1)
    assert manifest.shards[0] == info
    assert read_token_shard(ours.uri, job.cache_dir, manifest.shards[0]).view(0).max() == 0


@pytest.mark.usefixtures("pool_here")
def test_codes_without_a_draft_are_replaced(job: TokenizeJob, tmp_path: Path) -> None:
    """Those of another tokenizer, whose ledger was removed by hand."""
    job = dataclasses.replace(job, tokens=str(tmp_path / "tokens"))
    ours = TokenizeWorker(job).run("00000.tar", lambda: None)
    open_storage(ours.uri).write(ours.uri, b"the codes of another tokenizer")
    tokenize_all(job, actors=1)
    assert open_storage(ours.uri).read(ours.uri) == ours.data


@pytest.mark.usefixtures("pool_here")
def test_a_token_shard_that_is_gone_or_cut_is_made_again(job: TokenizeJob, tmp_path: Path) -> None:
    job = dataclasses.replace(job, tokens=str(tmp_path / "tokens"))
    manifest = tokenize_all(job, actors=1)
    before = {info.name: (tmp_path / "tokens" / info.name).read_bytes() for info in manifest.shards}
    (tmp_path / "tokens/00000.tar").unlink()
    (tmp_path / "tokens/00001.tar").write_bytes(before["00001.tar"][:-512])
    assert tokenize_all(job, actors=1) == manifest
    assert {name: (tmp_path / "tokens" / name).read_bytes() for name in before} == before


@pytest.mark.usefixtures("pool_here")
def test_bad_samples_are_named_in_the_manifest_or_stop_it(job: TokenizeJob, tmp_path: Path) -> None:
    """Two of seven, in two shards: too many for the limit, though what is done is kept; borne, and both are named at once."""
    folder = str(tmp_path / "images")
    samples = [{"__key__": f"image{i}", "png": picture(i)[: 100 if i in (1, 5) else None], "txt": "t", "json": b"{}"} for i in range(7)]
    shards = [write_shard(folder, shard_name(i), samples[4 * i : 4 * i + 4]) for i in range(2)]
    write_manifest(folder, Manifest(shards=tuple(shards)))
    job = dataclasses.replace(job, images=folder, tokens=str(tmp_path / "tokens"))
    with pytest.raises(UserError, match=r"tokens: \d of the first \d images are bad, more than data\.max_bad_fraction = 0\.01 of all 7"):
        tokenize_all(job, actors=1)
    notes = Notes()
    manifest = tokenize_all(
        job, actors=1, make_bad=lambda total: BadSamples("tokens", total, DataConfig(max_bad_fraction=2 / total), notes)
    )
    assert (manifest.samples, sorted(manifest.skipped)) == (5, ["00000.tar/image1", "00001.tar/image5"])
    assert "00001.tar: image of sample 'image5' cannot be read" in manifest.skipped["00001.tar/image5"]
    assert notes.record()["bad samples, left out"]["count"] == 2 and manifest == read_manifest(job.tokens)


@pytest.mark.usefixtures("pool_here")
def test_bad_samples_of_long_or_equal_keys_are_all_counted(job: TokenizeJob, tmp_path: Path) -> None:
    """Keys that differ behind their first 200 letters, and one that comes twice."""
    folder, keys = str(tmp_path / "images"), ["long" * 60 + "1", "long" * 60 + "2", "twice", "good", "twice"]
    samples = [{"__key__": key, "png": picture(3) if "long" not in key else b"none", "txt": "t", "json": b"{}"} for key in keys]
    write_manifest(folder, Manifest(shards=(write_shard(folder, shard_name(0), samples),)))
    job = dataclasses.replace(job, images=folder, tokens=str(tmp_path / "tokens"))
    manifest = tokenize_all(job, actors=1, make_bad=lambda total: BadSamples("tokens", total, DataConfig(max_bad_fraction=0.8), Notes()))
    assert manifest.samples == 1
    assert sorted(manifest.skipped) == [*(f"00000.tar/{key}" for key in keys[:3]), "00000.tar/twice (row 4)"]


@pytest.mark.usefixtures("pool_here")
def test_a_shard_of_bad_samples_alone_leaves_tokens_that_are_verified(job: TokenizeJob, tmp_path: Path) -> None:
    """Its token shard has no sample, and is not in the manifest; another one that is not is still a fault."""
    folder = str(tmp_path / "images")
    samples = [{"__key__": f"image{i}", "png": picture(i) if i < 3 else b"none", "txt": "t", "json": b"{}"} for i in range(4)]
    shards = [write_shard(folder, shard_name(i), each) for i, each in enumerate((samples[:3], samples[3:], []))]
    write_manifest(folder, Manifest(shards=tuple(shards)))
    job = dataclasses.replace(job, images=folder, tokens=str(tmp_path / "tokens"))
    made = tokenize_all(job, actors=1, make_bad=lambda total: BadSamples("tokens", total, DataConfig(max_bad_fraction=0.5), Notes()))
    assert [shard.name for shard in made.shards] == ["00000.tar"]
    assert verify_folder(job.tokens).faults == []
    write_shard(job.tokens, "00007.tar", samples[:1])
    assert verify_folder(job.tokens).faults == ["00007.tar: lies here, but is not in the manifest"]


def test_an_elastic_recipe_tokenises_with_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On as few GPUs as it trains on; a private Ray refuses actors that do not fit."""
    asked: list[object] = []

    def note(job: TokenizeJob, *, actors: object, **_: object) -> Manifest:
        asked.append(actors)
        return Manifest(shards=())

    monkeypatch.setattr(tokens_stage, "read_manifest", lambda folder: Manifest(shards=()))
    monkeypatch.setattr(tokens_stage, "tokenize_all", note)
    parallel = {"workers": {"min": 1, "max": 4}, "micro_batch": 4, "gpus_per_worker": 1}
    tokens_stage.run_tokens(Run(Recipe.model_validate({"name": "stub", "run_dir": str(tmp_path), "parallel": parallel})))
    assert asked == [Bounds(1, 4)] * 2
