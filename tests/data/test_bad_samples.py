"""A bad sample is left out or replaced, counted, and named with shard and key: alike by all who read shards, and never one a run."""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign_shards import picture

from oar_scale.cli import main
from oar_scale.config.schema import DataConfig, WebDatasetSource
from oar_scale.data.bad_samples import BadSamples
from oar_scale.data.manifest import Manifest, ShardInfo, read_manifest
from oar_scale.data.notes import Notes
from oar_scale.data.prepare import prepare_images
from oar_scale.data.shard_source import ShardSource
from oar_scale.data.shards import read_token_shard
from oar_scale.data.stream import StreamSettings, TokenStream
from oar_scale.data.tokenize import TokenizedShard, pack_tokens
from oar_scale.errors import UserError
from oar_scale.storage.shard_cache import ShardCache
from oar_scale.tokenizers.prompts import FeatureReader, LabelEncoder
from oar_scale.tokenizers.vq import VQSpec, VQTokenizer

GOOD = 12
FAULTS = {
    "truncated": "cannot be read",
    "bomb": "cannot be read",
    "noimage": "has no image",
    "notext": r"has no \.txt",
    "badjson": r"has a \.json that is none",
    "doubled": r"has two members \.jpg",
    "twice": "comes twice in its shard",
}


def faulty_members() -> list[tuple[str, bytes]]:
    """Good samples, and one of each fault between them."""
    whole = picture(0, (40, 40))
    faulty = {
        "truncated": [("jpg", whole[: len(whole) // 2]), ("txt", b"t"), ("json", b"{}")],
        "bomb": [("png", b"\x89PNG\r\n\x1a\n"), ("txt", b"t")],
        "noimage": [("txt", b"t"), ("json", b"{}")],
        "notext": [("jpg", whole), ("json", b"{}")],
        "badjson": [("jpg", whole), ("txt", b"t"), ("json", b'{"label": ')],
        "doubled": [("jpg", whole), ("JPG", whole), ("txt", b"t")],
        "twice": [("jpg", whole)],
    }
    members = []
    for number in range(GOOD):
        members += [(f"{number:04d}.jpg", picture(number)), (f"{number:04d}.txt", b"t"), (f"{number:04d}.json", b'{"label": 1}')]
        if number < len(FAULTS):
            key = list(FAULTS)[number]
            members += [(f"{key}.{extension}", content) for extension, content in faulty[key]]
    return [*members, ("twice.txt", b"t")]


def write(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "shards/00000.tar", faulty_members())
    return tmp_path / "shards"


@pytest.fixture(scope="module")
def vq() -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(
        VQSpec(image_size=16, channels=32, multipliers=(1, 2), res_blocks=1, latent_channels=32, codebook_size=32, codebook_dim=4)
    )


def manifest_of(folder: Path) -> Manifest:
    assert main(["data", "index", str(folder)]) == 0
    return read_manifest(str(folder))


def tokens_of(folder: Path, vq: VQTokenizer) -> tuple[ShardInfo, TokenizedShard]:
    (shard,) = manifest_of(folder).shards
    return shard, pack_tokens(str(folder), shard, vq, ("center",), "")


def test_preparing_leaves_out_each_of_them_and_says_why(folder: Path, tmp_path: Path) -> None:
    source = WebDatasetSource(type="webdataset", url=str(folder))
    config = DataConfig(source=source, image_size=8, heldout_fraction=0.3, samples_per_shard=4, max_bad_fraction=0.5)
    manifests = prepare_images(config, str(tmp_path / "images"))
    assert sum(manifest.samples for manifest in manifests.values()) == GOOD
    skipped = manifests["train"].skipped
    assert sorted(key.split("-")[1] for key in skipped) == sorted(FAULTS)
    with pytest.raises(UserError, match=r"6 of the first \d+ images are bad, more than data\.max_bad_fraction"):
        prepare_images(config.model_copy(update={"max_bad_fraction": 0.3}), str(tmp_path / "none"))


def test_tokenising_leaves_out_each_of_them_and_says_why(folder: Path, vq: VQTokenizer, tmp_path: Path) -> None:
    """The shard is written with the others; all faults are named at once, each with shard and key."""
    shard, made = tokens_of(folder, vq)
    assert (shard.samples, made.info.samples) == (GOOD + len(FAULTS) + 1, GOOD)
    assert [row.key for row in made.bad].count("twice") == 2, "each of them is counted"
    bad = {row.key: row.fault for row in made.bad}
    assert set(bad) == set(FAULTS)
    for key, fault in FAULTS.items():
        with pytest.raises(UserError, match=fault):
            raise UserError(bad[key])
        assert bad[key].startswith(f"{folder}/00000.tar: ") and f"sample {key!r}" in bad[key]
    (tmp_path / "t.tar").write_bytes(made.data)
    assert read_token_shard(str(tmp_path / "t.tar"), "").keys == [f"{number:04d}" for number in range(GOOD)]


def test_what_is_left_is_tokenised_as_without_them(folder: Path, vq: VQTokenizer, tmp_path: Path) -> None:
    good = [(name, content) for name, content in faulty_members() if name.split(".")[0] not in FAULTS]
    write(tmp_path / "good/00000.tar", good)
    assert tokens_of(folder, vq)[1].data == tokens_of(tmp_path / "good", vq)[1].data


def test_a_shard_of_bad_samples_alone_becomes_an_empty_one(vq: VQTokenizer, tmp_path: Path) -> None:
    write(tmp_path / "shards/00000.tar", [("a.jpg", b"none"), ("a.txt", b"t"), ("b.txt", b"t")])
    _, made = tokens_of(tmp_path / "shards", vq)
    assert (made.info.samples, [row.key for row in made.bad]) == (0, ["a", "b"])


def test_verify_and_index_name_what_they_can_see(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cut pictures are seen with --decode only; nothing refuses the whole shard."""
    manifest_of(folder)
    assert "faults in samples" in capsys.readouterr().out
    assert main(["data", "verify", str(folder)]) == 1
    seen = capsys.readouterr().out
    for expected in (
        "'noimage' has no image",
        "'notext' has no txt",
        "'badjson' has a .json",
        "'doubled' has two members",
        "'twice' comes twice",
    ):
        assert expected in seen
    assert "truncated" not in seen
    assert main(["data", "verify", str(folder), "--decode"]) == 1
    seen = capsys.readouterr().out
    assert "picture of sample 'truncated' cannot be read" in seen and "picture of sample 'bomb' cannot be read" in seen


def test_statistics_count_them_and_name_some(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", str(folder), "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert {reason: note["count"] for reason, note in notes.items()} == {
        "samples with two members of one kind, of which the first is counted": 1,
        "samples whose .json is none, not counted among the labels": 1,
        "pictures that cannot be read, counted as such": 1,
    }
    assert main(["data", "stats", str(folder)]) == 0
    assert "left out or changed: " in capsys.readouterr().out.splitlines()[-1]


def test_image_shards_in_the_stream_replace_them(folder: Path, vq: VQTokenizer, tmp_path: Path) -> None:
    manifest = manifest_of(folder)
    source = ShardSource(str(folder), manifest, ShardCache(str(tmp_path / "cache"), None), tokenizer=vq)
    settings = StreamSettings(seed=0, global_batch=4, streams=4, window_shards=1, caption_dropout=0.0, max_bad_fraction=1.0)
    bad = [sample.fault for batch in TokenStream(source, LabelEncoder(4), settings).batches(0, 5) for sample in batch.bad]
    for key in ("truncated", "noimage", "badjson", "doubled"):
        assert any(f"00000.tar: sample {key!r}" in fault for fault in bad), key


@pytest.mark.parametrize("label", ["-1", "4", '"cat"', "null", "1.5"])
def test_a_label_that_the_model_does_not_have_is_replaced(label: str, vq: VQTokenizer, tmp_path: Path) -> None:
    """One sample of twelve; the training goes on, and the event names shard and key."""
    members = []
    for number in range(GOOD):
        metadata = f'{{"label": {label if number == 3 else number % 4}}}'.encode()
        members += [(f"{number:04d}.jpg", picture(number)), (f"{number:04d}.txt", b"t"), (f"{number:04d}.json", metadata)]
    write(tmp_path / "shards/00000.tar", members)
    source = ShardSource(
        str(tmp_path / "shards"), manifest_of(tmp_path / "shards"), ShardCache(str(tmp_path / "cache"), None), tokenizer=vq
    )
    settings = StreamSettings(seed=0, global_batch=4, streams=4, window_shards=1, caption_dropout=0.0, max_bad_fraction=1.0)
    batches = list(TokenStream(source, LabelEncoder(4), settings).batches(0, 3))
    faults = {sample.fault for batch in batches for sample in batch.bad}
    assert faults and all("00000.tar: sample '0003' cannot be used: " in fault and "label" in fault for fault in faults)
    assert all(int(batch.encoded_prompts_b.max()) < 4 for batch in batches)


def test_features_that_overflowed_are_replaced(vq: VQTokenizer, tmp_path: Path) -> None:
    """Else every batch with them would have a loss that is no number, and the training would stop without naming them."""
    members = []
    for number in range(GOOD):
        buffer = io.BytesIO()
        np.save(buffer, np.full((2, 4), math.inf if number == 3 else number, np.float16))
        members += [(f"{number:04d}.jpg", picture(number)), (f"{number:04d}.txt", b"t"), (f"{number:04d}.features.npy", buffer.getvalue())]
    write(tmp_path / "shards/00000.tar", members)
    source = ShardSource(
        str(tmp_path / "shards"), manifest_of(tmp_path / "shards"), ShardCache(str(tmp_path / "cache"), None), tokenizer=vq
    )
    settings = StreamSettings(seed=0, global_batch=4, streams=4, window_shards=1, caption_dropout=0.0, max_bad_fraction=1.0)
    batches = list(TokenStream(source, FeatureReader(3, 4), settings).batches(0, 3))
    faults = {sample.fault for batch in batches for sample in batch.bad}
    assert faults and all("00000.tar: sample '0003' cannot be used: " in fault and "inf in row 0" in fault for fault in faults)
    assert all(batch.encoded_prompts_b.isfinite().all() for batch in batches)


class CountingEncoder(LabelEncoder):
    """Counts the prompts that it makes tensors of."""

    encoded = 0

    def encode(self, prompts: Sequence[int | str]) -> torch.Tensor:
        self.encoded += len(prompts)
        return super().encode(prompts)


def test_prompts_are_encoded_once_however_they_are_checked(vq: VQTokenizer, tmp_path: Path) -> None:
    members = []
    for number in range(GOOD):
        members += [(f"{number:04d}.jpg", picture(number)), (f"{number:04d}.json", b'{"label": 1}')]
    write(tmp_path / "shards/00000.tar", members)
    source = ShardSource(
        str(tmp_path / "shards"), manifest_of(tmp_path / "shards"), ShardCache(str(tmp_path / "cache"), None), tokenizer=vq
    )
    settings = StreamSettings(seed=0, global_batch=4, streams=4, window_shards=1, caption_dropout=0.0)
    encoder = CountingEncoder(4)
    assert len(list(TokenStream(source, encoder, settings).batches(0, 3))) == 3 and encoder.encoded == 12


def test_members_that_are_not_neighbours_are_told_with_a_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``tar cf shard.tar images texts``: all pictures first, then all captions."""
    names = [f"{number:04d}" for number in range(6)]
    write(tmp_path / "shards/0.tar", [(f"{name}.jpg", picture(0)) for name in names] + [(f"{name}.txt", b"t") for name in names])
    config = DataConfig(source=WebDatasetSource(type="webdataset", url=str(tmp_path / "shards")), image_size=8)
    with pytest.raises(UserError, match=r"6 of .* 6 images are bad(.|\n)*not next to each other.*tar --sort=name"):
        prepare_images(config, str(tmp_path / "images"))
    manifest_of(tmp_path / "shards")
    assert main(["data", "verify", str(tmp_path / "shards")]) == 1
    assert "tar --sort=name" in capsys.readouterr().out


def test_a_bad_sample_stops_where_the_recipe_says_fail() -> None:
    bad = BadSamples("tokens", 1000, DataConfig(on_bad_sample="fail"), Notes())
    with pytest.raises(UserError, match=r"tokens: image '0\.tar/a': 0\.tar: sample 'a' has no image.*on_bad_sample: skip"):
        bad.add("0.tar/a", "0.tar: sample 'a' has no image")


def test_a_hundredth_of_bad_samples_is_borne_and_no_more() -> None:
    bad = BadSamples("tokens", 200, DataConfig(), Notes(), "--max-bad-fraction ...")
    for number in range(2):
        bad.add(str(number), "no image")
        bad.check(number + 1)
    bad.add("2", "no image")
    with pytest.raises(UserError, match=r"3 of the first 3 images(.|\n)*raise the limit: --max-bad-fraction"):
        bad.check(3)
