"""Captions through a frozen text tower, computed once with the tokens: the same inputs for training, and no other tower's."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from actors_here import pools_here
from PIL import Image

from oar_scale.config.schema import ClipTextConfig, ModelConfig
from oar_scale.data.manifest import Manifest, read_manifest, write_manifest
from oar_scale.data.shards import read_shard, shard_name, write_shard
from oar_scale.errors import UserError
from oar_scale.model import AnyOrderModel, ModelSpec, check_prompts
from oar_scale.model.spec import condition_spec
from oar_scale.shard_pool.tokenization import TokenizeJob, tokenize_all
from oar_scale.tokenizers.clip_text import ClipText
from oar_scale.tokenizers.prompts import (
    FeatureReader,
    check_features,
    conditioning_inputs,
    for_new_prompts,
    load_prompts,
    write_features_note,
)
from oar_scale.tokenizers.text_features import TextFeatures
from oar_scale.tokenizers.vq import VQSpec, VQTokenizer, save_vq

TOWER = "ViT-S-16-alt"
ROUNDED = {"rtol": 2e-3, "atol": 2e-4}
"""To float16, of a tower that computed other batches: how a CPU multiplies depends on the shape."""
CAPTIONS = ["a red apple", "two green cars on a blue road", "!", "word " * 100]


def tower_file(folder: Path, seed: int) -> str:
    import open_clip  # seconds, in each process that collects tests

    torch.manual_seed(seed)
    path = folder / f"clip{seed}.pt"
    torch.save(open_clip.create_model(TOWER, pretrained=None).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> TokenizeJob:
    """Four pictures with captions in two shards, tokenised with the features of their captions."""
    folder = tmp_path_factory.mktemp("features")
    spec = VQSpec(image_size=16, channels=32, multipliers=(1, 2), res_blocks=1, latent_channels=32, codebook_size=32, codebook_dim=4)
    save_vq(str(folder / "vq.safetensors"), VQTokenizer(spec))
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, "PNG")
    samples = [{"__key__": f"s{i}", "png": buffer.getvalue(), "txt": caption, "json": b"{}"} for i, caption in enumerate(CAPTIONS)]
    shards = [write_shard(str(folder / "images"), shard_name(i), samples[2 * i : 2 * i + 2]) for i in range(2)]
    write_manifest(str(folder / "images"), Manifest(shards=tuple(shards)))
    job = TokenizeJob(
        images=str(folder / "images"),
        tokens=str(folder / "tokens"),
        vq=str(folder / "vq.safetensors"),
        views=("center",),
        cache_dir=str(folder / "cache"),
        text=ClipTextConfig(type="open_clip", architecture=TOWER, weights=tower_file(folder, 0), precompute=True),
    )
    with pools_here():
        tokenize_all(job, actors=1)
    return job


@pytest.fixture(scope="module")
def tower(job: TokenizeJob) -> ClipText:
    assert job.text is not None
    text = load_prompts(for_new_prompts(job.text), "")
    assert isinstance(text, ClipText)
    return text


@pytest.fixture(scope="module")
def reader(job: TokenizeJob, tower: ClipText) -> FeatureReader:
    assert job.text is not None
    write_features_note(tower, f"{job.tokens}/../tokenizers")
    reader = load_prompts(job.text, f"{job.tokens}/../tokenizers")
    assert isinstance(reader, FeatureReader)
    return reader


def stored(job: TokenizeJob) -> list[np.ndarray]:
    """The features as they lie in the shards."""
    samples = [sample for shard in read_manifest(job.tokens).shards for sample in read_shard(f"{job.tokens}/{shard.name}", "", shard)]
    return [np.load(io.BytesIO(sample["features.npy"]), allow_pickle=False) for sample in samples]


def test_the_model_is_told_what_the_tower_would_have_said(job: TokenizeJob, tower: ClipText, reader: FeatureReader) -> None:
    on_the_fly_BTF = conditioning_inputs(tower, tower.encode(CAPTIONS))
    read_BTF = conditioning_inputs(reader, reader.encode(stored(job)))
    assert read_BTF.dtype == on_the_fly_BTF.dtype == torch.float32 and read_BTF.shape == on_the_fly_BTF.shape
    torch.testing.assert_close(read_BTF, on_the_fly_BTF, **ROUNDED)
    no_token_BT = (on_the_fly_BTF == 0).all(-1)
    assert torch.equal((read_BTF == 0).all(-1), no_token_BT) and no_token_BT.any() and not no_token_BT.all()


def test_rows_without_a_token_take_no_room(job: TokenizeJob) -> None:
    assert [features.dtype for features in stored(job)] == [np.float16] * 4
    assert [len(features) for features in stored(job)] == [5, 9, 3, 77]


def test_the_manifest_names_the_tower(job: TokenizeJob, tower: ClipText, reader: FeatureReader) -> None:
    features = read_manifest(job.tokens).features
    assert features == TextFeatures(tower_id=tower.content_id, rows=77, width=256)
    check_features(features, reader, job.tokens)
    plain = Manifest(shards=(), grid=8)
    assert plain.fingerprint != plain.model_copy(update={"features": features}).fingerprint
    assert Manifest(shards=(), grid=8, vocab_size=512).fingerprint == "a06c6f6ff2fdcad4", "that of shards without features is what it was"


@pytest.mark.usefixtures("pool_here")
def test_another_tower_is_refused(job: TokenizeJob, tower: ClipText, reader: FeatureReader, tmp_path: Path) -> None:
    assert job.text is not None
    with pytest.raises(UserError, match=rf"text features are of the tower {tower.content_id}, tokenizer\.text is the tower 0123"):
        check_features(read_manifest(job.tokens).features, FeatureReader(77, 256, tower.spec, "0123"), job.tokens)
    with pytest.raises(UserError, match="hold no text features"):
        check_features(None, reader, job.tokens)
    other = job.text.model_copy(update={"weights": tower_file(tmp_path, 1)})
    with pytest.raises(UserError, match=r"the codes of 00000\.tar were made with another tokenizer, text tower"):
        tokenize_all(replace(job, text=other), actors=1)


def test_a_model_trained_on_stored_features_knows_its_tower(tower: ClipText, reader: FeatureReader) -> None:
    """So it draws for new captions with that tower, and with no other."""
    condition = condition_spec(reader, encoder_layers=1)
    assert condition == condition_spec(tower, encoder_layers=1)
    config = ModelConfig(dim=32, layers=1, heads=2, ffn_multiple_of=32)
    spec = AnyOrderModel(ModelSpec.from_recipe(config, vocab_size=32, grid=8, condition=condition)).spec
    check_prompts(spec, tower, "model")
    check_prompts(spec, reader, "model")
    with pytest.raises(UserError, match=r"its condition has tower_id \w+, the prompt encoder of tokenizer\.text makes 0123"):
        check_prompts(spec, FeatureReader(77, 256, tower.spec, "0123"), "model")


@pytest.mark.usefixtures("pool_here")
def test_pooled_features_are_stored_as_one_row(job: TokenizeJob, tmp_path: Path) -> None:
    """One row a caption is stored where the recipe asks for it."""
    assert job.text is not None
    pooled = job.text.model_copy(update={"features": "pooled"})
    job = replace(job, tokens=str(tmp_path / "tokens"), text=pooled)
    tokenize_all(job, actors=1)
    text = ClipText.load(TOWER, pooled.weights, features="pooled")
    write_features_note(text, str(tmp_path))
    encoder = load_prompts(pooled, str(tmp_path))
    wanted = text.features(text.encode(CAPTIONS))
    torch.testing.assert_close(encoder.encode(stored(job)), wanted, **ROUNDED)


def test_a_reader_refuses_more_rows_and_other_widths() -> None:
    """A reader takes no more rows than there are and no other width."""
    reader = FeatureReader(3, 4)
    padded = reader.encode([np.ones((2, 4), np.float16), np.ones((0, 4), np.float16)])
    assert padded.sum((1, 2)).tolist() == [8, 0] and padded.shape == (2, 3, 4)
    for wrong in (np.ones((4, 4)), np.ones((3, 5)), np.ones(4), "a caption", [[1, 2, 3, 4], [5]]):
        with pytest.raises(UserError, match=r"precomputed features \(3, 4\)"):
            reader.encode([wrong])


@pytest.mark.parametrize("wrong", [math.nan, np.float16(math.inf), 1e39, None, "a"])
def test_a_reader_names_features_that_are_no_finite_numbers(wrong: object) -> None:
    """Half precision that overflowed is no fault of the model: NaN scores would say that its weights are damaged."""
    features = np.array([[1, 1, 1, 1], [1, 1, 1, wrong]])
    for refuse in (FeatureReader(3, 4).check, lambda prompt: FeatureReader(3, 4).encode([features[:1].astype(np.float32), prompt])):
        with pytest.raises(UserError, match="no numbers" if wrong == "a" else r"(nan|inf) in row 1, column 3"):
            refuse(features)


def test_without_the_tokenizer_stage_there_is_nothing_to_read(job: TokenizeJob, tmp_path: Path) -> None:
    assert job.text is not None
    with pytest.raises(UserError, match=r"text-features\.json"):
        load_prompts(job.text, str(tmp_path))
