"""Batches are a function of the recipe and the step."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launcher import run_workers, start_workers
from numpy.typing import NDArray
from PIL import Image
from waiting import wait_until

from cluster.dev.processes import is_alive
from oar_scale.data.manifest import Manifest, read_manifest, write_manifest
from oar_scale.data.open_shard import OpenShard
from oar_scale.data.shard_source import ShardSource, StoredOrders
from oar_scale.data.shards import token_sample, write_shard
from oar_scale.data.stream import Batch, StreamSettings, TokenStream
from oar_scale.errors import Unreachable, UserError
from oar_scale.storage.shard_cache import ShardCache
from oar_scale.tokenizers.text import TextTokenizer, train_text_tokenizer
from oar_scale.tokenizers.vq import VQSpec, VQTokenizer, pixels_to_unit

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


def source(folder: str, stored_orders: StoredOrders | None = None, **changes: Any) -> ShardSource:
    return ShardSource(folder, read_manifest(folder), ShardCache(folder), stored_orders=stored_orders, **changes)


def stream(tokens: str, text: TextTokenizer, rank: int = 0, world: int = 1, **changes: Any) -> TokenStream:
    return TokenStream(source(tokens), text, replace(SETTINGS, **changes), rank, world)


def same(one: Batch, two: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one).values(), tensors(two).values(), strict=True))


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: getattr(batch, name) for name in ("uid_b", "codes_bN", "encoded_prompts_b", "drop_b")} | {"orders": batch.orders()}


def test_resuming_gives_the_batches_of_one_stream(tokens: str, text: TextTokenizer) -> None:
    """Going on at a step gives the batches of an uninterrupted stream."""
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
        for uid, codes_N, ids_T in zip(batch.uid_b.tolist(), batch.codes_bN, batch.encoded_prompts_b, strict=True):
            assert codes_N[0] % 100 == uid
            views.add(int(codes_N[0]) // 100)
            assert torch.equal(ids_T, text.encode([f"a red number {uid}"])[0])
    assert views == {0, 1}


def test_stored_orders_come_with_view_0_in_their_share(tokens: str, text: TextTokenizer) -> None:
    """Stored orders come with the first view and in the stated share."""
    backwards = np.arange(16, dtype=np.uint16)[::-1]

    def stored(name: str, shard: OpenShard) -> dict[int, NDArray[np.uint16]]:
        return {0: np.stack([backwards[None]] * len(shard.keys))}

    settings = replace(SETTINGS, random_share=0.25)
    batches = list(TokenStream(source(tokens, stored), text, settings).batches(0, 50))
    codes, orders = torch.cat([b.codes_bN for b in batches]), torch.cat([b.orders() for b in batches])
    follows = (orders == torch.from_numpy(backwards.astype(np.int64))).all(1)
    assert 0.65 < float(follows.float().mean()) < 0.85
    assert (codes[follows, 0] < 100).all(), "a stored order was used on a view it was not found for"


def orders_of_views(name: str, shard: OpenShard) -> dict[int, NDArray[np.uint16]]:
    """For view v of each sample the order that begins with cell 1 + v."""
    return {view: np.stack([np.roll(np.arange(16, dtype=np.uint16), -1 - view)[None]] * len(shard.keys)) for view in (0, 1)}


def test_a_view_follows_the_order_stored_for_it(tokens: str, text: TextTokenizer) -> None:
    """A view with stored orders follows the one that was found for it."""
    settings = replace(SETTINGS, random_share=0.25, stored_views=(0, 1))
    batches = list(TokenStream(source(tokens, orders_of_views), text, settings).batches(0, 50))
    codes, orders, fixed = (torch.cat(each) for each in zip(*((b.codes_bN, b.orders(), b.fixed_b) for b in batches), strict=True))
    view = codes[:, 0] // 100
    assert torch.equal(orders[fixed, 0], 1 + view[fixed])
    assert 0.4 < float(view[fixed].float().mean()) < 0.6, "both views are trained on"
    # The view is that of pretraining, whatever follows an order; the control sees the same; and no rank changes any of it.
    pretraining = list(stream(tokens, text).batches(0, 50))
    control = list(TokenStream(source(tokens), text, settings).batches(0, 50))
    for other in (pretraining, control):
        assert torch.equal(codes, torch.cat([batch.codes_bN for batch in other]))
    for rank in range(2):
        part = TokenStream(source(tokens, orders_of_views), text, settings, rank, 2).batch(7)
        assert torch.equal(part.codes_bN, batches[7].codes_bN[rank::2]) and torch.equal(part.orders(), batches[7].orders()[rank::2])


def test_where_the_first_view_alone_has_orders_it_is_taken(tokens: str, text: TextTokenizer) -> None:
    stored = TokenStream(source(tokens, lambda *of: {0: orders_of_views(*of)[0]}), text, replace(SETTINGS, random_share=0.25))
    for batch in stored.batches(0, 20):
        assert (batch.codes_bN[batch.fixed_b, 0] < 100).all() and (batch.orders()[batch.fixed_b, 0] == 1).all()


def test_sample_and_epoch_choose_among_stored_orders(tokens: str, text: TextTokenizer) -> None:
    """One of several stored orders is taken by sample and epoch."""
    several = np.stack([np.roll(np.arange(16, dtype=np.uint16), shift) for shift in (1, 2, 3)])
    settings = replace(SETTINGS, random_share=0.0)

    def taken(stored: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ours = TokenStream(source(tokens, lambda name, shard: {0: np.stack([stored] * len(shard.keys))}), text, settings)
        batches = list(ours.batches(0, 60))
        return tuple(torch.cat(columns) for columns in zip(*((b.uid_b, b.epoch_b, b.orders()) for b in batches), strict=True))  # type: ignore[return-value]

    uid, epoch, orders = taken(several)
    shift = orders.argmin(1)
    assert set(shift.tolist()) == {1, 2, 3}
    assert shift.bincount()[1:].min() > 0.25 * len(shift)
    of_sample: dict[int, set[int]] = {}
    for one, at in zip(uid.tolist(), shift.tolist(), strict=True):
        of_sample.setdefault(one, set()).add(at)
    assert len(epoch.unique()) > 1 and any(len(seen) > 1 for seen in of_sample.values())
    assert all(torch.equal(a, b) for a, b in zip(taken(several), (uid, epoch, orders), strict=True))
    only = taken(several[:1])[2]
    assert torch.equal(only, torch.from_numpy(several[0].astype(np.int64)).expand_as(only))


def test_the_control_differs_in_its_orders_only(tokens: str, text: TextTokenizer) -> None:
    """The control sees the same samples and views in random orders."""
    backwards = np.arange(16, dtype=np.int64)[::-1].copy()
    ordered, control = (
        TokenStream(source(tokens, stored), text, replace(SETTINGS, random_share=0.25)).batch(2)
        for stored in (lambda name, shard: {0: np.stack([backwards[None]] * len(shard.keys))}, None)
    )
    assert torch.equal(ordered.uid_b, control.uid_b) and torch.equal(ordered.codes_bN, control.codes_bN)
    assert torch.equal(ordered.drop_b, control.drop_b)
    follows = (ordered.orders() == torch.from_numpy(backwards)).all(1)
    assert follows.any() and not torch.equal(ordered.orders()[follows], control.orders()[follows])
    assert torch.equal(ordered.orders()[~follows], control.orders()[~follows])


def test_a_given_order_applies_to_all_and_leaves_views(tokens: str, text: TextTokenizer) -> None:
    """A given order is that of all samples and leaves their views."""
    backwards = tuple(reversed(range(16)))
    batch, random = stream(tokens, text, order=backwards, random_share=0.0).batch(3), stream(tokens, text).batch(3)
    assert torch.equal(batch.orders(), torch.tensor(backwards).expand(len(batch.uid_b), -1))
    assert torch.equal(batch.codes_bN, random.codes_bN)


def test_a_given_order_leaves_the_random_share_its_random_orders(tokens: str, text: TextTokenizer) -> None:
    given = torch.arange(15, -1, -1)
    mixed = [stream(tokens, text, order=tuple(given.tolist()), random_share=0.5).batch(step) for step in range(8)]
    random = [stream(tokens, text).batch(step) for step in range(8)]
    follows = torch.cat([(batch.orders() == given).all(1) for batch in mixed])
    assert 0.25 < float(follows.float().mean()) < 0.75
    drawn, expected = (torch.cat([batch.orders() for batch in batches])[~follows] for batches in (mixed, random))
    assert torch.equal(drawn, expected)


def test_image_shards_are_not_taken_for_token_shards(tmp_path: Path, text: TextTokenizer) -> None:
    info = write_shard(str(tmp_path), "00000.tar", [{"__key__": "a", "txt": "x", "png": b""}])
    write_manifest(str(tmp_path), Manifest(shards=(info,)))
    with pytest.raises(UserError, match="not token shards"):
        TokenStream(source(str(tmp_path)), text, SETTINGS)


def write_tokens(folder: str, sizes: list[int], broken: dict[int, str] | None = None) -> None:
    """Token shards of the given sizes; the first code of a sample is its uid. ``broken``: uid -> what is wrong with it."""
    shards, uid = [], 0
    for shard, size in enumerate(sizes):
        written = []
        for _ in range(size):
            sample = token_sample({"__key__": f"k{uid}", "txt": f"a red number {uid}"}, np.full((1, 16), uid, dtype=np.uint16))
            match (broken or {}).get(uid):
                case "no codes":
                    del sample["codes.npy"]
                case "no caption":
                    del sample["txt"]
                case "codes above the vocabulary":
                    sample = {**sample, **token_sample({"__key__": f"k{uid}", "txt": "x"}, np.full((1, 16), 60_000, dtype=np.uint16))}
                case "codes of another shape":
                    sample = {**sample, **token_sample({"__key__": f"k{uid}", "txt": "x"}, np.zeros((2, 16), dtype=np.uint16))}
            written.append(sample)
            uid += 1
        shards.append(write_shard(folder, f"{shard:05d}.tar", written))
    write_manifest(folder, Manifest(shards=tuple(shards), grid=4, vocab_size=50_000, views=("center",)))


@settings(max_examples=10, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=2, max_size=7).filter(lambda sizes: sum(sizes) >= 24),
    worlds=st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]), min_size=1, max_size=6),
    stops=st.lists(st.integers(1, 4), min_size=6, max_size=6),
    window=st.integers(1, 4),
    seed=st.integers(0, 100),
)
def test_any_worlds_and_stops_see_the_same_global_batches(
    text: TextTokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    worlds: list[int],
    stops: list[int],
    window: int,
    seed: int,
) -> None:
    """Any sequence of worlds and stops sees the same global batches."""
    folder = str(tmp_path_factory.mktemp("elastic"))
    write_tokens(folder, sizes)
    how = replace(SETTINGS, seed=seed, global_batch=48, streams=24, window_shards=window)
    whole = TokenStream(source(folder), text, how)
    step = 0
    for world, steps in zip(worlds, stops, strict=False):
        ranks = [TokenStream(source(folder), text, how, rank, world) for rank in range(world)]
        for number in range(step, step + steps):
            expected = tensors(whole.batch(number))
            for rank, part in enumerate(ranks):
                for name, tensor in tensors(part.batch(number)).items():
                    assert torch.equal(tensor, expected[name][rank::world]), (name, number, world, rank)
        step += steps


def log_batches(folder: str, log: str, steps: int, stands_at: int | None = None) -> None:
    """A training without a model: every rank reads its batches, rank 0 writes down the uids of all; resumes where the log ends.

    ``stands_at``: the step that is never done.
    """
    import torch.distributed as dist

    dist.init_process_group("gloo")
    text = train_text_tokenizer([f"a red number {i}" for i in range(40)], 64, 8)
    how = replace(SETTINGS, global_batch=24, streams=12)
    done = [len(Path(log).read_text().splitlines()) if os.path.exists(log) else 0]
    dist.broadcast_object_list(done)
    for batch in TokenStream(source(folder), text, how, dist.get_rank(), dist.get_world_size()).batches(done[0], steps):
        if batch.step == stands_at:
            threading.Event().wait()
        uids: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(uids, [batch.uid_b.tolist(), batch.orders().tolist()])
        if dist.get_rank() == 0:
            together = [[uids[slot % len(uids)][part][slot // len(uids)] for slot in range(24)] for part in (0, 1)]
            with open(log, "a") as file:
                file.write(json.dumps(together) + "\n")
    dist.barrier()


def test_two_ranks_killed_restarted_as_three_log_the_same(tmp_path: Path) -> None:
    """Two ranks killed and restarted as three log what one would have."""
    folder, one, elastic = (str(tmp_path / name) for name in ("tokens", "one", "elastic"))
    write_tokens(folder, [13, 29, 8, 31, 17])
    run_workers(log_batches, 1, folder, one, 16)
    workers = start_workers(log_batches, 2, folder, elastic, 16, 12)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and (not os.path.exists(elastic) or len(Path(elastic).read_text().splitlines()) < 5):
        time.sleep(0.02)
    for worker in workers:
        worker.kill()
        worker.join()
    stopped = len(Path(elastic).read_text().splitlines())
    assert 5 <= stopped < 16
    run_workers(log_batches, 3, folder, elastic, 16)
    assert Path(elastic).read_text() == Path(one).read_text()


def test_loader_processes_change_nothing(tokens: str, text: TextTokenizer) -> None:
    alone = list(stream(tokens, text).batches(3, 10))
    loaded = list(TokenStream(source(tokens), text, SETTINGS, loader_processes=2).batches(3, 10))
    assert [batch.step for batch in loaded] == list(range(3, 10))
    assert all(same(a, b) for a, b in zip(alone, loaded, strict=True))


def load_and_wait(folder: str, text: TextTokenizer, pids: str) -> None:
    batches = TokenStream(source(folder), text, SETTINGS, loader_processes=1).batches(0, 100)
    next(batches)
    Path(pids).write_text(" ".join(str(process.pid) for process in multiprocessing.active_children()))
    threading.Event().wait()


def test_loader_processes_end_with_a_killed_rank(tokens: str, text: TextTokenizer, tmp_path: Path) -> None:
    (worker,) = start_workers(load_and_wait, 1, tokens, text, str(tmp_path / "pids"))
    wait_until(lambda: not worker.is_alive() or ((tmp_path / "pids").exists() and (tmp_path / "pids").read_text()))
    (loader,) = [psutil.Process(int(pid)) for pid in (tmp_path / "pids").read_text().split()]
    worker.kill()
    worker.join()
    wait_until(lambda: not is_alive(loader))


def fail(kind: type[UserError], name: str, shard: OpenShard) -> NDArray[np.uint16]:
    raise kind(f"{name}: the orders cannot be read")


@pytest.mark.parametrize("kind", [UserError, Unreachable])
def test_an_error_of_a_loader_process_is_told_as_it_is(tokens: str, text: TextTokenizer, kind: type[UserError]) -> None:
    loaded = TokenStream(source(tokens, partial(fail, kind)), text, SETTINGS, loader_processes=1).batches(0, 4)
    with pytest.raises(UserError, match=r"^\d+\.tar: the orders cannot be read$") as caught:
        list(loaded)
    assert type(caught.value) is kind


@pytest.mark.parametrize("fault", ["no codes", "no caption", "codes above the vocabulary", "codes of another shape"])
def test_a_broken_sample_is_replaced_alike_and_named(text: TextTokenizer, tmp_path: Path, fault: str) -> None:
    """A broken sample is replaced the same way everywhere and named."""
    write_tokens(str(tmp_path), [20, 20], {27: fault})
    how = replace(SETTINGS, global_batch=8, max_bad_fraction=0.1)
    batches = list(TokenStream(source(str(tmp_path)), text, how).batches(0, 5))
    (bad,) = [sample for batch in batches for sample in batch.bad]
    assert bad.uid == 27 and "sample 'k27'" in bad.fault and "00001.tar" in bad.fault
    uids, codes = torch.cat([b.uid_b for b in batches]), torch.cat([b.codes_bN for b in batches])
    assert torch.equal(codes[uids != 27, 0], uids[uids != 27])
    substitute = int(codes[uids == 27, 0])
    assert substitute != 27
    for rank in range(2):
        half = list(TokenStream(source(str(tmp_path)), text, how, rank, 2).batches(0, 5))
        for part, whole in zip(half, batches, strict=True):
            assert torch.equal(part.codes_bN, whole.codes_bN[rank::2])


def test_a_missing_shard_is_named_its_samples_replaced(text: TextTokenizer, tmp_path: Path) -> None:
    """A shard that is gone is named and all its samples replaced."""
    write_tokens(str(tmp_path), [20, 20, 20, 20])
    os.unlink(tmp_path / "00002.tar")
    batches = list(TokenStream(source(str(tmp_path)), text, replace(SETTINGS, max_bad_fraction=0.5)).batches(0, 10))
    named = [sample for batch in batches for sample in batch.bad]
    assert {sample.uid for sample in named} >= set(range(40, 60))
    assert all("00002.tar" in sample.fault for sample in named)
    codes = torch.cat([batch.codes_bN[:, 0] for batch in batches])
    assert len(codes) == 80 and not ((codes >= 40) & (codes < 60)).any()


def test_an_outage_replaces_no_sample(tokens: str, text: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage that does not answer ends the stream; nothing is wrong with the samples, so what comes after is as it would have been."""
    undisturbed = list(stream(tokens, text).batches(0, 8))
    read, outage = ShardCache.read, threading.Event()

    def read_or_not(self: ShardCache, *shard: Any) -> bytes:
        if outage.is_set():
            raise Unreachable(f"{shard[0]}: no connection to the S3 server")
        return read(self, *shard)

    monkeypatch.setattr(ShardCache, "read", read_or_not)
    outage.set()
    with pytest.raises(Unreachable, match="no connection"):
        next(stream(tokens, text).batches(0, 8))
    outage.clear()
    again = list(stream(tokens, text).batches(0, 8))
    assert all(same(one, two) and not two.bad for one, two in zip(undisturbed, again, strict=True))


def test_too_many_bad_samples_stop_the_stream_and_name_some(text: TextTokenizer, tmp_path: Path) -> None:
    write_tokens(str(tmp_path), [20, 20], dict.fromkeys((3, 9, 11, 24, 33), "no codes"))
    with pytest.raises(UserError, match=r"of \d+ samples could not be used, more than data\.max_bad_fraction = 0\.02") as stopped:
        list(TokenStream(source(str(tmp_path)), text, replace(SETTINGS, max_bad_fraction=0.02)).batches(0, 5))
    assert "sample 'k" in str(stopped.value)


def test_a_resume_just_before_bad_samples_goes_on_as_the_run_would_have(text: TextTokenizer, tmp_path: Path) -> None:
    """Two of 400 are bad, which the limit of 1 % allows, wherever the second epoch is entered."""
    write_tokens(str(tmp_path), [50] * 8, {77: "no codes", 150: "no codes"})
    bad = replace(SETTINGS, max_bad_fraction=0.01)
    for start in range(50, 100):
        assert len(list(TokenStream(source(str(tmp_path)), text, bad).batches(start, 100))) == 100 - start


@pytest.mark.parametrize("limit", [0.0, 0.001])
def test_a_single_bad_sample_stops_the_stream_only_where_none_is_allowed(text: TextTokenizer, tmp_path: Path, limit: float) -> None:
    write_tokens(str(tmp_path), [20, 20], {3: "no codes"})
    batches = TokenStream(source(str(tmp_path)), text, replace(SETTINGS, max_bad_fraction=limit)).batches(0, 5)
    with nullcontext() if limit else pytest.raises(UserError, match="1 of "):
        assert sum(len(batch.bad) for batch in batches) == 1


@pytest.mark.parametrize("fault", ["no codes", "codes of another shape"])
def test_a_first_sample_that_is_bad_costs_its_shard_nothing(text: TextTokenizer, tmp_path: Path, fault: str) -> None:
    write_tokens(str(tmp_path), [20, 20], {20: fault})
    batches = list(TokenStream(source(str(tmp_path)), text, replace(SETTINGS, max_bad_fraction=0.1)).batches(0, 5))
    (bad,) = [sample for batch in batches for sample in batch.bad]
    assert bad.uid == 20 and "sample 'k20'" in bad.fault


def test_data_sets_are_mixed_by_weight_each_with_its_own_samples(text: TextTokenizer, tmp_path: Path) -> None:
    for name, sizes in (("big", [30, 30, 30]), ("small", [12])):
        write_tokens(str(tmp_path / name), sizes)
    sources = [source(str(tmp_path / "big"), weight=4), source(str(tmp_path / "small"), weight=1)]
    batches = list(TokenStream(sources, text, SETTINGS).batches(0, 500))
    uids, codes = torch.cat([b.uid_b for b in batches]), torch.cat([b.codes_bN[:, 0] for b in batches])
    small = uids >= 90
    assert int(small.sum()) == 800
    assert torch.equal(codes, torch.where(small, uids - 90, uids))
    with pytest.raises(UserError, match="a mixture needs one"):
        odd = replace(sources[1], manifest=sources[1].manifest.model_copy(update={"grid": 5}))
        TokenStream([sources[0], odd], text, SETTINGS)


def test_image_shards_are_tokenised_on_the_fly_to_the_same_codes(text: TextTokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vq = VQTokenizer(VQSpec(image_size=16, channels=32, multipliers=(1, 1, 1), res_blocks=1, latent_channels=32, codebook_size=64)).eval()
    noise, written, pictures = np.random.default_rng(0), [], []
    for index in range(20):
        pictures.append(noise.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        Image.fromarray(pictures[-1]).save(tmp_path / "picture.png")
        written.append({"__key__": f"k{index}", "png": (tmp_path / "picture.png").read_bytes(), "txt": f"a red number {index}"})
    write_manifest(str(tmp_path / "images"), Manifest(shards=(write_shard(str(tmp_path / "images"), "00000.tar", written),)))
    images = source(str(tmp_path / "images"), tokenizer=vq, image_views=("center", "center_flip"))
    for batch in TokenStream(images, text, SETTINGS).batches(0, 3):
        for uid, codes_N in zip(batch.uid_b.tolist(), batch.codes_bN, strict=True):
            pixels = torch.from_numpy(pictures[uid])[None]
            expected = [vq.encode(pixels_to_unit(view))[0] for view in (pixels, pixels.flip(2))]
            assert any(torch.equal(codes_N, each) for each in expected)


def test_open_shards_are_bounded(text: TextTokenizer, tmp_path: Path) -> None:
    write_tokens(str(tmp_path), [6] * 40)
    tokens = TokenStream(source(str(tmp_path)), text, replace(SETTINGS, window_shards=3))
    for step in range(60):
        tokens.batch(step)
        assert len(tokens.shards[0]._open) <= 4 * 3 + 2
