"""Shards: what is written is what plain WebDataset reads, and damage is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from oar_scale.data.manifest import Manifest, read_manifest, write_manifest
from oar_scale.data.open_shard import OpenShard
from oar_scale.data.shards import read_token_shard, token_sample, write_shard
from oar_scale.errors import UserError


def samples(count: int, views: int = 2, cells: int = 16) -> list[dict[str, object]]:
    codes = np.random.default_rng(0).integers(0, 512, (count, views, cells)).astype(np.uint16)
    return [token_sample({"__key__": f"key{i}", "txt": f"caption {i}"}, codes[i]) for i in range(count)]


def test_a_token_shard_comes_back_as_it_was_written(tmp_path: Path) -> None:
    info = write_shard(str(tmp_path), "00000.tar", samples(5))
    shard = read_token_shard(str(tmp_path / "00000.tar"), str(tmp_path), info)
    assert shard.keys == [f"key{i}" for i in range(5)]
    assert shard.captions[3] == "caption 3"
    assert shard.view(1).dtype == np.uint16 and shard.shape == (2, 16) and shard.view(1).shape == (5, 16)


def test_plain_webdataset_decodes_the_same_codes(tmp_path: Path) -> None:
    write_shard(str(tmp_path), "00000.tar", samples(5))
    ours = read_token_shard(str(tmp_path / "00000.tar"), str(tmp_path))
    theirs = [s["codes.npy"] for s in webdataset.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False).decode()]
    assert np.array_equal(np.stack(theirs), np.stack([ours.view(0), ours.view(1)], axis=1))


@given(cut=st.integers(1, 10_239))
def test_a_truncated_shard_is_never_taken_for_whole(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = tmp_path_factory.mktemp("cut")
    info = write_shard(str(folder), "00000.tar", samples(3))
    path = folder / "00000.tar"
    path.write_bytes(path.read_bytes()[: min(cut, info.bytes - 1)])
    with pytest.raises(UserError, match=r"00000\.tar"):
        read_token_shard(str(path), str(folder), info)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    info = write_shard(str(tmp_path), "00000.tar", samples(3))
    data = bytearray((tmp_path / "00000.tar").read_bytes())
    data[700] ^= 1
    (tmp_path / "00000.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"damaged or was replaced"):
        read_token_shard(str(tmp_path / "00000.tar"), str(tmp_path), info)


def test_a_sample_without_codes_is_named(tmp_path: Path) -> None:
    write_shard(str(tmp_path), "00000.tar", [{"__key__": "lonely", "txt": "only words"}])
    with pytest.raises(UserError, match=r"00000\.tar: sample 'lonely' has no \.codes\.npy"):
        read_token_shard(str(tmp_path / "00000.tar"), str(tmp_path)).view(0)


def test_a_file_that_is_no_tar_is_named(tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(b"x" * 5000)
    with pytest.raises(UserError, match=r"00000\.tar: truncated or broken tar"):
        read_token_shard(str(tmp_path / "00000.tar"), str(tmp_path))


def test_shards_without_a_manifest_are_unfinished_work(tmp_path: Path) -> None:
    info = write_shard(str(tmp_path), "00000.tar", samples(3))
    with pytest.raises(UserError, match=r"never finished"):
        read_manifest(str(tmp_path))
    write_manifest(str(tmp_path), Manifest(shards=(info,)))
    assert read_manifest(str(tmp_path)).samples == 3
    (tmp_path / "manifest.json").write_text((tmp_path / "manifest.json").read_text()[:40])
    with pytest.raises(
        UserError, match=r"(?s)manifest\.json: not a manifest that oar_scale wrote, or not all of it.*Run the stage that writes"
    ):
        read_manifest(str(tmp_path))


def test_a_json_member_that_is_none_names_shard_and_sample(tmp_path: Path) -> None:
    written = [{"__key__": key, "json": text.encode()} for key, text in (("a", '{"family": "f"}'), ("b", '{"fam'), ("c", "[]"))]
    write_shard(str(tmp_path), "00000.tar", written)
    shard = OpenShard(memoryview((tmp_path / "00000.tar").read_bytes()), "00000.tar")
    assert shard.metadata(0) == {"family": "f"}
    for row, key in ((1, "b"), (2, "c")):
        with pytest.raises(UserError, match=f"00000.tar: sample '{key}' has a .json that is none"):
            shard.metadata(row)


def test_the_fingerprint_changes_with_bytes_and_meaning(tmp_path: Path) -> None:
    """The fingerprint changes with the bytes and with the meaning."""
    one = Manifest(shards=(write_shard(str(tmp_path), "00000.tar", samples(3)),), grid=4, vocab_size=512)
    other_bytes = Manifest(shards=(write_shard(str(tmp_path), "00000.tar", samples(4)),), grid=4, vocab_size=512)
    other_meaning = one.model_copy(update={"tokenizer_id": "another"})
    assert len({m.fingerprint for m in (one, other_bytes, other_meaning)}) == 3
