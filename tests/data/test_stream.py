"""Batches are a function of the recipe and the step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from oar_scale.data.manifest import Manifest, read_manifest, write_manifest
from oar_scale.data.shards import TokenShard, token_sample, write_shard
from oar_scale.data.stream import Batch, StreamSettings, TokenStream
from oar_scale.errors import UserError
from oar_scale.tokenizers.text import TextTokenizer, train_text_tokenizer

SETTINGS = StreamSettings(seed=3, global_batch=8, streams=4, window_shards=2, caption_dropout=0.2)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four shards of ten samples, two views; the first code of a view names the sample."""
    folder = str(tmp_path_factory.mktemp("tokens"))
    shards = []
    for shard in range(4):
        written = []
        for row in range(10):
            uid = 10 * shard + row
            codes = np.full((2, 16), uid, dtype=np.uint16)
            codes[1] += 100
            written.append(token_sample({"__key__": f"k{uid}", "txt": f"a red number {uid}"}, codes))
        shards.append(write_shard(folder, f"{shard:05d}.tar", written))
    write_manifest(folder, Manifest(shards=tuple(shards), grid=4, vocab_size=512, views=("center", "jitter1")))
    return folder


@pytest.fixture(scope="module")
def text() -> TextTokenizer:
    return train_text_tokenizer([f"a red number {i}" for i in range(40)], 64, 8)


def stream(tokens: str, text: TextTokenizer, rank: int = 0, world: int = 1, **changes: object) -> TokenStream:
    return TokenStream(tokens, read_manifest(tokens), text, replace(SETTINGS, **changes), tokens, rank, world)  # type: ignore[arg-type]


def same(one: Batch, two: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one).values(), tensors(two).values(), strict=True))


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: getattr(batch, name) for name in ("uid_b", "codes_bN", "prompts_b", "drop_b")} | {"orders": batch.orders()}


def test_going_on_at_a_step_gives_the_batches_of_an_uninterrupted_stream(tokens: str, text: TextTokenizer) -> None:
    whole = list(stream(tokens, text).batches(0, 12))
    resumed = list(stream(tokens, text).batches(7, 12))
    assert [b.step for b in resumed] == list(range(7, 12))
    assert all(same(a, b) for a, b in zip(whole[7:], resumed, strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batch_of_one_worker(tokens: str, text: TextTokenizer, world: int) -> None:
    whole = stream(tokens, text).batch(5)
    for rank in range(world):
        part = stream(tokens, text, rank, world).batch(5)
        for name, tensor in tensors(part).items():
            assert torch.equal(tensor, tensors(whole)[name][rank::world]), name


def test_codes_and_captions_are_those_of_the_sample(tokens: str, text: TextTokenizer) -> None:
    views = set()
    for batch in stream(tokens, text).batches(0, 10):
        for uid, codes_N, ids_T in zip(batch.uid_b.tolist(), batch.codes_bN, batch.prompts_b, strict=True):
            assert codes_N[0] % 100 == uid
            views.add(int(codes_N[0]) // 100)
            assert torch.equal(ids_T, text.encode([f"a red number {uid}"])[0])
    assert views == {0, 1}


def test_stored_orders_come_with_the_first_view_and_in_the_stated_share(tokens: str, text: TextTokenizer) -> None:
    backwards = np.arange(16, dtype=np.uint16)[::-1]

    def stored(name: str, shard: TokenShard) -> NDArray[np.uint16]:
        return np.stack([backwards] * len(shard.keys))

    settings = replace(SETTINGS, random_share=0.25)
    batches = list(TokenStream(tokens, read_manifest(tokens), text, settings, tokens, stored_orders=stored).batches(0, 50))
    codes, orders = torch.cat([b.codes_bN for b in batches]), torch.cat([b.orders() for b in batches])
    follows = (orders == torch.from_numpy(backwards.astype(np.int64))).all(1)
    assert 0.65 < float(follows.float().mean()) < 0.85
    assert (codes[follows, 0] < 100).all(), "a stored order was used on a view it was not found for"


def test_the_control_sees_the_same_samples_and_views_in_random_orders(tokens: str, text: TextTokenizer) -> None:
    backwards = np.arange(16, dtype=np.int64)[::-1].copy()
    ordered, control = (
        TokenStream(tokens, read_manifest(tokens), text, replace(SETTINGS, random_share=0.25), tokens, stored_orders=stored).batch(2)
        for stored in (lambda name, shard: np.stack([backwards] * len(shard.keys)), None)
    )
    assert torch.equal(ordered.uid_b, control.uid_b) and torch.equal(ordered.codes_bN, control.codes_bN)
    assert torch.equal(ordered.drop_b, control.drop_b)
    follows = (ordered.orders() == torch.from_numpy(backwards)).all(1)
    assert follows.any() and not torch.equal(ordered.orders()[follows], control.orders()[follows])
    assert torch.equal(ordered.orders()[~follows], control.orders()[~follows])


def test_a_raster_stream_has_one_order(tokens: str, text: TextTokenizer) -> None:
    batch = stream(tokens, text, raster=True).batch(3)
    assert torch.equal(batch.orders(), torch.arange(16).expand(len(batch.uid_b), -1))


def test_image_shards_are_not_taken_for_token_shards(tmp_path: Path, text: TextTokenizer) -> None:
    info = write_shard(str(tmp_path), "00000.tar", [{"__key__": "a", "txt": "x", "png": b""}])
    write_manifest(str(tmp_path), Manifest(shards=(info,)))
    with pytest.raises(UserError, match="not token shards"):
        TokenStream(str(tmp_path), read_manifest(str(tmp_path)), text, SETTINGS, str(tmp_path))
