"""An epoch from a real S3 server whose answers are spoiled: every planned sample arrives exactly once."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from oar_scale.data.manifest import Manifest, read_manifest, write_manifest
from oar_scale.data.shard_source import ShardSource
from oar_scale.data.shards import token_sample, write_shard
from oar_scale.data.stream import Batch, StreamSettings, TokenStream
from oar_scale.errors import UserError
from oar_scale.storage import join, open_storage, s3_ranges
from oar_scale.storage.shard_cache import ShardCache
from oar_scale.tokenizers.text import TextTokenizer, train_text_tokenizer
from tests.fault_proxy import FaultProxy

SHARDS, EACH = 120, 4
SETTINGS = StreamSettings(seed=1, global_batch=24, streams=12, window_shards=4, caption_dropout=0.0)
EPOCH = SHARDS * EACH // 24


@pytest.fixture(scope="module")
def text() -> TextTokenizer:
    return train_text_tokenizer([f"a red number {i}" for i in range(40)], 64, 8)


@pytest.fixture(scope="module")
def tokens(s3_root: str) -> str:
    folder = join(s3_root, uuid.uuid4().hex)
    shards = []
    for shard in range(SHARDS):
        uids = range(shard * EACH, (shard + 1) * EACH)
        written = [
            token_sample({"__key__": f"k{uid}", "txt": f"a red number {uid}"}, np.full((1, 16), uid, dtype=np.uint16)) for uid in uids
        ]
        shards.append(write_shard(folder, f"{shard:05d}.tar", written))
    write_manifest(folder, Manifest(shards=tuple(shards), grid=4, vocab_size=1000, views=("center",)))
    return folder


@pytest.fixture
def proxy(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    server = FaultProxy(int(os.environ["AWS_ENDPOINT_URL"].rsplit(":", 1)[1]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setattr(s3_ranges, "STALL_S", 60.0)  # a server that is slow now and then is none of the faults that are counted
    monkeypatch.setattr(s3_ranges, "BACKOFF_S", 0.01)
    yield server
    server.close()


def test_with_a_fifth_of_all_requests_failing_an_epoch_is_whole(
    tokens: str, text: TextTokenizer, proxy: FaultProxy, tmp_path: Path
) -> None:
    proxy.spoil({"503": 0.04, "slow down": 0.02, "refused": 0.04, "reset": 0.04, "cut": 0.04, "flip": 0.02})
    stream = TokenStream(ShardSource(tokens, read_manifest(tokens), ShardCache(str(tmp_path))), text, SETTINGS)
    batches = list(stream.batches(0, EPOCH))
    uids, codes = torch.cat([batch.uid_b for batch in batches]), torch.cat([batch.codes_bN[:, 0] for batch in batches])
    assert sorted(uids.tolist()) == list(range(SHARDS * EACH))
    assert torch.equal(codes, uids), "every sample is itself, none was replaced"
    assert not [sample for batch in batches for sample in batch.bad]
    spoiled, retries = sum(proxy.injected.values()), sum(batch.fetched.retries for batch in batches)
    assert spoiled >= 12, "the proxy did spoil answers"
    assert retries == spoiled, dict(proxy.injected)


def test_a_broken_shard_is_named_and_replaced_alike_twice(tokens: str, text: TextTokenizer, s3_root: str, tmp_path: Path) -> None:
    """A shard that stays broken is named and replaced the same way twice."""
    folder = join(s3_root, uuid.uuid4().hex)
    manifest = read_manifest(tokens)
    for info in manifest.shards:
        data = open_storage(tokens).read(join(tokens, info.name))
        damaged = data[:700] + bytes([data[700] ^ 1]) + data[701:]
        open_storage(folder).write(join(folder, info.name), damaged if info.name == "00007.tar" else data)
    write_manifest(folder, manifest)
    how = replace(SETTINGS, max_bad_fraction=0.2)
    seen = []
    for attempt in range(2):
        stream = TokenStream(ShardSource(folder, manifest, ShardCache(str(tmp_path / str(attempt)))), text, how)
        batches = list(stream.batches(0, EPOCH))
        named = {sample.uid for batch in batches for sample in batch.bad}
        assert named == set(range(7 * EACH, 8 * EACH))
        assert all("00007.tar" in sample.fault for batch in batches for sample in batch.bad)
        seen.append(torch.cat([batch.codes_bN[:, 0] for batch in batches]))
    assert torch.equal(seen[0], seen[1])
    assert not ((seen[0] >= 7 * EACH) & (seen[0] < 8 * EACH)).any()


def test_credentials_that_expire_replace_no_sample(tokens: str, text: TextTokenizer, proxy: FaultProxy, tmp_path: Path) -> None:
    """What the storage refuses is no fault of the samples: with new credentials they come as they would have come."""
    how = replace(SETTINGS, max_bad_fraction=1.0)

    def batches(cache: str) -> Iterator[Batch]:
        return TokenStream(ShardSource(tokens, read_manifest(tokens), ShardCache(str(tmp_path / cache))), text, how).batches(0, 4)

    expected, disturbed = list(batches("of its own")), batches("here")
    next(disturbed)
    proxy.spoil({"expired": 1.0})
    with pytest.raises(UserError, match=r"^s3://\S+: the S3 credentials have expired"):
        list(disturbed)
    proxy.spoil({})
    assert all(torch.equal(one.codes_bN, two.codes_bN) and not two.bad for one, two in zip(expected, batches("here"), strict=True))
