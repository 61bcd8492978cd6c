"""Whatever differs from the manifest is found and named, and what does not is not blamed."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from foreign_shards import img2dataset_folder, img2dataset_sample, token_folder, token_sample, upload, write_tar

from oar_scale.cli import main
from oar_scale.data import verify
from oar_scale.data.index import IndexJob, index_folder
from oar_scale.data.manifest import Manifest, ShardInfo, read_manifest, write_manifest
from oar_scale.data.scan import FAULTS_KEPT, scan_shard
from oar_scale.data.shards import token_sample as our_sample
from oar_scale.data.shards import write_shard
from oar_scale.data.verify import verify_folder
from oar_scale.errors import Unreachable


def _write_as_known(folder: Path, name: str, samples: list[dict[str, object]]) -> None:
    """Write a shard and put what it is into the manifest: only its samples can be at fault."""
    write_tar(folder / name, samples)
    scan = scan_shard(str(folder / name))
    info = ShardInfo(name=name, bytes=scan.bytes, samples=scan.samples, crc32c=scan.crc32c)
    manifest = read_manifest(str(folder))
    shards = [info if shard.name == name else shard for shard in manifest.shards]
    write_manifest(str(folder), manifest.model_copy(update={"shards": tuple(shards)}))


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _content_of_first_file(folder: Path) -> None:
    """A bit of the codes: the tar stays readable."""
    _flip(folder / "00001.tar", 1024 + 512 + 140)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three token shards of four samples, and their manifest."""
    token_folder(tmp_path)
    index_folder(IndexJob(str(tmp_path), vocab_size=100))
    return tmp_path


def test_what_the_manifest_says_is_confirmed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = verify_folder(str(folder))
    assert (result.fault_count, result.faults, result.shards, result.samples) == (0, [], 3, 12)
    assert result.bytes == sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert main(["data", "verify", str(folder)]) == 0
    assert "3 shards, 12 samples" in (shown := capsys.readouterr().out) and "all as the manifest says" in shown


def test_a_server_that_goes_away_is_no_fault_of_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(uri: str, *_: object) -> None:
        raise Unreachable(f"{uri}: no connection to the S3 server")

    monkeypatch.setattr(verify, "scan_shard", gone)
    with pytest.raises(Unreachable, match="no connection"):
        verify_folder(str(folder))


def test_our_own_shards_are_confirmed(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(0, 64, (6, 1, 16)).astype(np.uint16)
    samples = [our_sample({"__key__": f"k{i}", "txt": f"caption {i}"}, codes[i]) for i in range(6)]
    write_manifest(
        str(tmp_path), Manifest(shards=(write_shard(str(tmp_path), "00000.tar", samples),), grid=4, vocab_size=64, views=("center",))
    )
    assert verify_folder(str(tmp_path)).faults == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_content_of_first_file, r"00001\.tar: crc32c [0-9a-f]{8}, the manifest says [0-9a-f]{8}"),
        (lambda folder: _flip(folder / "00001.tar", 3), r"00001\.tar: truncated or broken tar"),
        (lambda folder: (folder / "00001.tar").write_bytes((folder / "00001.tar").read_bytes()[:5000]), r"00001\.tar: truncated or broken"),
        (lambda folder: (folder / "00001.tar").unlink(), r"00001\.tar: there is nothing here"),
        (lambda folder: write_tar(folder / "00001.tar", [token_sample(1)]), r"00001\.tar: \d+ bytes, the manifest says \d+"),
        (lambda folder: write_tar(folder / "00007.tar", [token_sample(1)]), r"00007\.tar: lies here, but is not in the manifest"),
        (
            lambda folder: _write_as_known(folder, "00002.tar", [token_sample(1), token_sample(2), token_sample(1)]),
            r"00002\.tar: key '000000001' comes twice",
        ),
        (
            lambda folder: _write_as_known(folder, "00002.tar", [token_sample(1), token_sample(2, np.full((2, 16), 100, dtype=np.uint16))]),
            r"00002\.tar: sample '000000002' has code 100, the vocabulary has 100",
        ),
        (
            lambda folder: _write_as_known(folder, "00002.tar", [token_sample(1, cells=25)]),
            r"00002\.tar: codes \[2, 25\] \(views, cells\), the manifest says \[2, 16\]",
        ),
        (
            lambda folder: _write_as_known(folder, "00002.tar", [token_sample(n) for n in range(3)] + [token_sample(3, views=1)]),
            r"00002\.tar: codes of sample '000000003' are \[1, 16\] \(views, cells\), those before it \[2, 16\]",
        ),
        (
            lambda folder: _write_as_known(folder, "00002.tar", [{"__key__": "x", "txt": "no codes"}]),
            r"00002\.tar: sample 'x' has no image or codes",
        ),
        (
            lambda folder: _write_as_known(
                folder, "00002.tar", [token_sample(n) for n in range(3)] + [{k: v for k, v in token_sample(9).items() if k != "txt"}]
            ),
            r"00002\.tar: sample '000000009' has no txt",
        ),
    ],
)
def test_each_kind_of_damage_is_named_with_shard_and_key(
    folder: Path, damage: Callable[[Path], object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    assert main(["data", "verify", str(folder), "--workers", "2"]) == 1
    shown = capsys.readouterr().out
    assert re.search(message, shown), shown
    blamed = {line.split(":")[0] for line in shown.splitlines()[:-1]}
    assert blamed == {message.split(":")[0].replace("\\", "")}


def test_every_flipped_bit_is_found(folder: Path) -> None:
    path = folder / "00000.tar"
    good = path.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(good), 40).tolist():
        _flip(path, at)
        assert verify_folder(str(folder)).fault_count >= 1, at
        path.write_bytes(good)
    assert verify_folder(str(folder)).fault_count == 0


def test_many_faults_are_counted_and_a_bounded_number_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = np.full((2, 16), 999, dtype=np.uint16)
    for shard in range(3):
        _write_as_known(folder, f"{shard:05d}.tar", [token_sample(number, bad) for number in range(100)])
    result = verify_folder(str(folder))
    assert result.fault_count == 300 and len(result.faults) == 3 * FAULTS_KEPT
    assert main(["data", "verify", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 52 and "and 250 more" in lines[-2] and "300 faults" in lines[-1]


def test_mixed_formats_and_broken_utf8_are_no_faults(tmp_path: Path) -> None:
    """Pictures of several formats may share a shard and captions need not be utf8."""
    png = img2dataset_sample(3, jpg=None, png=b"x", txt=b"caf\xe9")
    write_tar(tmp_path / "0.tar", [*(img2dataset_sample(number) for number in range(3)), png])
    index_folder(IndexJob(str(tmp_path)))
    result = verify_folder(str(tmp_path))
    assert (result.faults, result.bad_captions) == ([], 1)


def test_no_manifest_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", str(img2dataset_folder(tmp_path))]) == 2
    assert "manifest.json" in capsys.readouterr().err


def test_shards_on_s3_are_verified(s3_root: str, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = upload(folder, f"{s3_root}/{uuid.uuid4().hex[:8]}")
    assert main(["data", "verify", target]) == 0
    assert main(["data", "verify", target, "--manifest", str(folder / "manifest.json")]) == 0
    _flip(folder / "00002.tar", 2000)
    upload(folder, target)
    assert main(["data", "verify", target]) == 1
    assert "00002.tar: crc32c" in capsys.readouterr().out
