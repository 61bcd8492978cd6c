"""A manifest for shards of others: each shard read once, whatever interrupts it, and none replaced behind anybody's back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from pathlib import Path

import crc32c
import numpy as np
import pytest
from foreign_shards import img2dataset_folder, img2dataset_sample, token_folder, token_sample, upload, write_tar
from hypothesis import given
from hypothesis import strategies as st

from oar_scale.cli import main
from oar_scale.data import scan
from oar_scale.data.index import IndexJob, index_folder
from oar_scale.data.manifest import Manifest, read_manifest, write_manifest
from oar_scale.data.scan import list_shards, scan_shard
from oar_scale.errors import UserError


def test_img2dataset_shards_get_the_manifest_of_their_bytes(tmp_path: Path) -> None:
    folder = img2dataset_folder(tmp_path / "shards")
    index = index_folder(IndexJob(str(folder)))
    assert index.manifest == read_manifest(str(folder))
    assert [shard.name for shard in index.manifest.shards] == ["00000.tar", "00001.tar", "00002.tar"]
    for shard in index.manifest.shards:
        data = (folder / shard.name).read_bytes()
        assert (shard.bytes, shard.crc32c, shard.samples) == (len(data), crc32c.crc32c(data), 4)
    assert index.manifest.grid is None and index.manifest.views == ()
    assert (index.read, index.faults, index.extensions) == (3, 0, {"jpg": 12, "json": 12, "txt": 12})
    assert {path.name for path in folder.iterdir() if path.suffix != ".tar"} == {
        *(f"{i:05d}_stats.json" for i in range(3)),
        "manifest.json",
    }


def test_token_shards_say_their_grid_and_bound_their_vocabulary(tmp_path: Path) -> None:
    folder = token_folder(tmp_path)
    largest = max(int(np.load(str(path)).max()) for path in _codes(folder, tmp_path / "codes"))
    manifest = index_folder(IndexJob(str(folder))).manifest
    assert (manifest.grid, manifest.vocab_size, manifest.views, manifest.tokenizer_id) == (4, largest + 1, ("view0", "view1"), None)
    given = IndexJob(str(folder), vocab_size=512, views=("center", "center_flip"), tokenizer_id="abc", force=True)
    manifest = index_folder(given).manifest
    assert (manifest.grid, manifest.vocab_size, manifest.views, manifest.tokenizer_id) == (4, 512, ("center", "center_flip"), "abc")


def _codes(folder: Path, target: Path) -> list[Path]:
    """The codes of all shards as files, unpacked by tar(1)."""
    target.mkdir()
    for path in sorted(folder.glob("*.tar")):
        subprocess.run(["tar", "-xf", str(path), "-C", str(target)], check=True)
    return sorted(target.glob("*.codes.npy"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vocab_size": 50}, r"code 9\d, but --vocab-size is 50"),
        ({"grid": 5}, "an image has 16 codes, not 5 x 5"),
        ({"views": ("center",)}, "codes of 2 views, --views names 1"),
        ({"pattern": "*.tgz"}, r"none of the \d+ objects below it matches '\*\.tgz'"),
    ],
)
def test_options_that_do_not_fit_the_codes_are_refused(tmp_path: Path, changes: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        index_folder(IndexJob(str(token_folder(tmp_path)), **changes))  # type: ignore[arg-type]


def test_picture_and_token_shards_do_not_share_a_manifest(tmp_path: Path) -> None:
    write_tar(token_folder(tmp_path) / "00003.tar", [img2dataset_sample(0)])
    with pytest.raises(UserError, match=r"00003\.tar: no codes, 00000\.tar has \[2, 16\]"):
        index_folder(IndexJob(str(tmp_path)))
    assert len(index_folder(IndexJob(str(tmp_path), pattern="0000[0-2].tar")).manifest.shards) == 3


def test_a_folder_that_is_not_there_is_not_called_empty(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, says in (("nowhere", "nowhere: no such folder"), ("file", "file: is a file, and a folder is wanted")):
        with pytest.raises(UserError, match=says):
            index_folder(IndexJob(str(tmp_path / name)))


def test_shards_come_in_the_natural_order_of_their_numbers(tmp_path: Path) -> None:
    names = ["b-2.tar", "b-10.tar", "a/1.tar", "b-9.tar", "b-007.tar", "a/12.tar", "b-7.tar", "10.tar", "9.tar"]
    for name in names:
        write_tar(tmp_path / name, [img2dataset_sample(0)])
    in_order = ["9.tar", "10.tar", "a/1.tar", "a/12.tar", "b-2.tar", "b-007.tar", "b-7.tar", "b-9.tar", "b-10.tar"]
    assert list_shards(str(tmp_path)) == in_order
    assert [shard.name for shard in index_folder(IndexJob(str(tmp_path))).manifest.shards] == in_order


def test_shards_with_long_names_of_other_alphabets_are_indexed(tmp_path: Path) -> None:
    names = [f"{'文' * 25}/{'件' * 25}{number}.tar" for number in range(3)]
    for name in names:
        write_tar(tmp_path / name, [img2dataset_sample(0)])
    (tmp_path / "broken.tar").write_bytes(b"none")
    with pytest.raises(UserError, match="1 of 4 shards cannot be read"):
        index_folder(IndexJob(str(tmp_path)))
    (tmp_path / "broken.tar").unlink()
    index = index_folder(IndexJob(str(tmp_path)))
    assert ([shard.name for shard in index.manifest.shards], index.read) == (names, 0)


def test_a_shard_whose_name_is_no_utf8_is_one_clear_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "caf\udce9.tar", [img2dataset_sample(0)])
    with pytest.raises(UserError, match=r"the name 'caf\\+udce9\.tar' is not UTF-8"):
        index_folder(IndexJob(str(tmp_path)))


@given(st.lists(st.text("0129ab-é²", min_size=1, max_size=6), unique=True))
def test_names_are_in_order_however_they_were_listed(names: list[str]) -> None:
    """The order of names does not depend on how they were listed."""
    assert sorted(names, key=scan._natural) == sorted(sorted(names, reverse=True), key=scan._natural)


def test_each_shard_is_read_once_also_with_many_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Counter[str]()
    real = scan.open_bytes
    monkeypatch.setattr(scan, "open_bytes", lambda uri: (opened.update([uri]), real(uri))[1])
    progress: list[tuple[int, int]] = []
    index_folder(IndexJob(str(img2dataset_folder(tmp_path, shards=20, samples=1)), workers=8), lambda *at: progress.append(at))
    assert len(opened) == 20 and set(opened.values()) == {1}
    assert progress == [(done, 20) for done in range(21)]


def test_a_kill_in_the_middle_costs_no_shard_a_second_reading(tmp_path: Path) -> None:
    """After the kill, shards that are in the ledger are spoiled without a change of size or time: reading one again would show."""
    folder = img2dataset_folder(tmp_path, shards=400, samples=1)
    expected = {path.name: crc32c.crc32c(path.read_bytes()) for path in folder.glob("*.tar")}
    ledger = folder / "index.partial"
    late = folder / "00200.tar"
    data = late.read_bytes()
    late.unlink()
    os.mkfifo(late)  # who reads it waits for ever: not all is done before the kill
    process = subprocess.Popen([sys.executable, "-m", "oar_scale.cli", "data", "index", str(folder), "--workers", "2"])
    deadline = time.monotonic() + 600
    while not ledger.exists() or len(list(ledger.glob("*.json"))) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    late.unlink()
    late.write_bytes(data)
    done = {path.name.removesuffix(".json") for path in ledger.glob("*.json")}
    assert 5 <= len(done) < 400 and not (folder / "manifest.json").exists()
    for left in (b"", b'{"shard": "0'):  # what a full disk leaves of an entry: the shard is read again
        (ledger / f"{done.pop()}.json").write_bytes(left)
    for name in done:
        path = folder / name
        before = path.stat()
        with open(path, "r+b") as file:
            file.write(b"spoiled!")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    index = index_folder(IndexJob(str(folder)))
    assert index.read == 400 - len(done)
    assert {shard.name: shard.crc32c for shard in index.manifest.shards} == expected
    assert not ledger.exists()


def test_a_shard_that_changed_in_between_is_read_again(tmp_path: Path) -> None:
    """A shard that changed after an interrupted run is read again."""
    folder = img2dataset_folder(tmp_path)
    good = (folder / "00002.tar").read_bytes()
    (folder / "00002.tar").write_bytes(good[:1000])
    with pytest.raises(UserError, match=r"1 of 3 shards cannot be read:\n.*00002\.tar: truncated or broken tar(.|\n)*others will not"):
        index_folder(IndexJob(str(folder)))
    write_tar(folder / "00000.tar", [img2dataset_sample(77)])
    (folder / "00002.tar").write_bytes(good)
    index = index_folder(IndexJob(str(folder)))
    assert index.read == 2 and [shard.samples for shard in index.manifest.shards] == [1, 4, 4]


def test_another_manifest_is_not_replaced_without_force(tmp_path: Path) -> None:
    folder = str(img2dataset_folder(tmp_path))
    first = index_folder(IndexJob(folder)).manifest
    index_folder(IndexJob(folder))  # the same again changes nothing
    write_tar(tmp_path / "00001.tar", [img2dataset_sample(5)])
    with pytest.raises(UserError, match=r"there is another manifest: shards or settings differ\.(.|\n)*--force"):
        index_folder(IndexJob(folder))
    write_tar(tmp_path / "00003.tar", [img2dataset_sample(6)])
    with pytest.raises(UserError, match="it lists 3 shards, here are 4"):
        index_folder(IndexJob(folder))
    assert read_manifest(folder) == first
    assert [shard.samples for shard in index_folder(IndexJob(folder, force=True)).manifest.shards] == [4, 1, 4, 1]


def test_force_keeps_the_attribution(tmp_path: Path) -> None:
    folder = str(img2dataset_folder(tmp_path))
    write_manifest(folder, Manifest(shards=(), attribution="by somebody"))
    assert index_folder(IndexJob(folder, force=True)).manifest.attribution == "by somebody"


def test_faults_are_counted_and_hostile_codes_allocate_nothing(tmp_path: Path) -> None:
    """Samples with faults are counted and hostile codes allocate nothing."""
    huge = token_sample(3)
    huge["codes.npy"] = huge["codes.npy"].replace(b"(2, 16), }     ", b"(2, 99999999)}")
    samples = [
        token_sample(0),
        token_sample(1, np.zeros((2, 16), dtype=np.int64)),
        token_sample(2, np.zeros(16, dtype=np.uint16)),
        huge,
        token_sample(4, **{"codes.npy": b"no array"}),
        token_sample(5, np.zeros((1, 16), dtype=np.uint16)),
        token_sample(6, np.asfortranarray(np.zeros((2, 16), dtype=np.uint16))),
        token_sample(7, txt=b"caf\xe9"),
    ]
    write_tar(tmp_path / "0.tar", samples)
    scan = scan_shard(str(tmp_path / "0.tar"))
    assert (scan.samples, scan.codes_shape, scan.fault_count, scan.bad_captions) == (8, (2, 16), 6, 1)
    for number, expected in [
        (1, "<i8"),
        (2, r"<u2 [16]"),
        (3, "99999999"),
        (4, "no .npy"),
        (5, "[1, 16] (views, cells)"),
        (6, "<u2 [2, 16]"),
    ]:
        assert any(f"{number:09d}" in fault and expected in fault for fault in scan.faults), (number, scan.faults)


def test_shards_on_s3_are_indexed_in_place_or_elsewhere(s3_root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = upload(img2dataset_folder(tmp_path / "shards"), f"{s3_root}/{uuid.uuid4().hex[:8]}")
    out = tmp_path / "elsewhere" / "manifest.json"
    assert main(["data", "index", target, "--out", str(out), "--workers", "3"]) == 0
    assert main(["data", "index", target]) == 0
    shown = capsys.readouterr().out
    assert f"{target}/manifest.json: 3 shards (3 read now), 12 samples" in shown and ".jpg 12" in shown
    assert read_manifest(target) == read_manifest(str(out.parent)) == index_folder(IndexJob(str(tmp_path / "shards"))).manifest
    assert main(["data", "index", target + "/nothing"]) == 2
    assert "matches '*.tar'" in capsys.readouterr().err
