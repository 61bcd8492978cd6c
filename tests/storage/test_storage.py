"""One contract, two storages: each test runs on a local folder and on a real S3 server."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from boto3.s3.transfer import TransferConfig

from oar_scale.errors import UserError
from oar_scale.runtime import retry
from oar_scale.storage import Missing, Storage, Unreachable, fetch, join, open_storage, read_json, s3, write_json


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder of the test's own."""
    if request.param == "local":
        return str(tmp_path / "root")
    return join(request.getfixturevalue("s3_root"), uuid.uuid4().hex[:8])


@pytest.fixture
def storage(root: str) -> Storage:
    return open_storage(root)


def test_what_is_written_is_read_and_ranges_count_from_zero(root: str, storage: Storage) -> None:
    uri = join(root, "a", "b.bin")
    assert storage.write(uri, b"0123456789")
    assert storage.read(uri) == b"0123456789"
    assert storage.read(uri, 3) == b"3456789"
    assert storage.read(uri, 3, 5) == b"34"
    assert storage.read(uri, 8, 100) == b"89"
    assert storage.read(uri, 50, 60) == b""
    assert storage.read(uri, 4, 4) == b""


def test_an_empty_object_is_an_object(root: str, storage: Storage) -> None:
    uri = join(root, "COMMITTED")
    assert storage.write(uri, b"")
    assert storage.exists(uri)
    assert storage.read(uri) == storage.read(uri, 0, 10) == b""


def test_a_second_write_replaces_the_whole_object(root: str, storage: Storage) -> None:
    uri = join(root, "x")
    storage.write(uri, b"long content")
    before = storage.version(uri)
    storage.write(uri, b"short")
    assert storage.read(uri) == b"short"
    assert storage.version(uri) != before


def test_if_absent_changes_nothing_when_the_name_is_taken(root: str, storage: Storage) -> None:
    uri = join(root, "claim")
    assert storage.write(uri, b"first", if_absent=True)
    assert not storage.write(uri, b"second", if_absent=True)
    assert storage.read(uri) == b"first"


def test_if_version_replaces_what_was_looked_at_alone(root: str, storage: Storage) -> None:
    uri = join(root, "table")
    storage.write(uri, b"stale")
    version = storage.version(uri)
    start = threading.Barrier(4)

    def replace(number: int) -> bool:
        start.wait()
        return storage.write(uri, f"new {number}".encode(), if_version=version)

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(replace, range(4)))
    assert sum(won) == 1 and storage.read(uri) == f"new {won.index(True)}".encode()
    assert not storage.write(uri, b"too late", if_version=version)
    storage.delete(uri)
    assert not storage.write(uri, b"gone", if_version=version) and not storage.exists(uri)


def test_large_bytes_are_written_under_a_condition(root: str, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """On S3 in parts, as all large writes; of two writers the first one wins there, too."""
    monkeypatch.setattr(s3, "_TRANSFER", TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20))
    uri, first, second = join(root, "shard.tar"), os.urandom(11 << 20), os.urandom(6 << 20)
    assert storage.write(uri, first, if_absent=True)
    assert not root.startswith("s3://") or storage.version(uri).endswith("-3"), "it went up in one request"
    assert not storage.write(uri, second, if_absent=True)
    assert storage.read(uri) == first
    version = storage.version(uri)
    assert storage.write(uri, second, if_version=version) and not storage.write(uri, first, if_version=version)
    assert storage.read(uri) == second


def test_a_race_of_eight_has_exactly_one_winner(root: str, storage: Storage) -> None:
    for attempt in range(2):
        uri = join(root, f"race-{attempt}")
        start = threading.Barrier(8)

        def claim(number: int, uri: str = uri, start: threading.Barrier = start) -> bool:
            start.wait()
            return storage.write(uri, str(number).encode(), if_absent=True)

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(claim, range(8)))
        assert sum(won) == 1
        assert storage.read(uri) == str(won.index(True)).encode()


def test_a_missing_object_is_named(root: str, storage: Storage, tmp_path: Path) -> None:
    uri = join(root, "nothing")
    attempts: list[Callable[[], object]] = [
        lambda: storage.read(uri),
        lambda: storage.read(uri, 5, 5),
        lambda: storage.download(uri, str(tmp_path / "copy")),
        lambda: storage.version(uri),
        lambda: fetch(uri, str(tmp_path / "cache")),
        lambda: read_json(uri),
    ]
    for attempt in attempts:
        with pytest.raises(Missing) as caught:
            attempt()
        assert caught.value.uri == uri
        assert uri in str(caught.value)
    assert not storage.exists(uri)
    assert not (tmp_path / "copy").exists()
    storage.delete(uri)


def test_missing_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(Missing("s3://b/k")))
    assert (error.uri, str(error)) == ("s3://b/k", str(Missing("s3://b/k")))


def test_list_is_sorted_deep_and_of_this_folder_only(root: str, storage: Storage) -> None:
    assert storage.list(root) == []
    names = ["o/a-b", "o/a", "o/c/d", "o/c/d.txt", "o2/x", "oo"]
    for name in names:
        storage.write(join(root, name), b".")
    assert storage.list(join(root, "o")) == [join(root, name) for name in ("o/a", "o/a-b", "o/c/d", "o/c/d.txt")]
    assert storage.list(join(root, "o/")) == storage.list(join(root, "o"))
    assert len(storage.list(root)) == 6


def test_sizes_are_those_of_what_is_listed(root: str, storage: Storage) -> None:
    assert storage.sizes(root) == {}
    for name in ("o/a", "o/c/ddd", "o2/x"):
        storage.write(join(root, name), name.encode())
    assert storage.sizes(join(root, "o")) == {join(root, "o/a"): 3, join(root, "o/c/ddd"): 7}


def test_list_goes_past_the_thousand_keys_of_a_page(s3_root: str) -> None:
    folder = join(s3_root, "many")
    storage = open_storage(folder)
    names = [join(folder, f"{number:04}") for number in range(1005)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: storage.write(name, b""), names))
    assert storage.list(folder) == names


def test_a_large_file_goes_up_in_parts_and_comes_down_whole(root: str, storage: Storage, tmp_path: Path) -> None:
    content = os.urandom(1 << 20) * 40  # above the limit of a single put
    source = tmp_path / "big.bin"
    source.write_bytes(content)
    uri = join(root, "checkpoints", "big.bin")
    storage.upload(str(source), uri)
    storage.download(uri, str(tmp_path / "new" / "copy.bin"))
    assert (tmp_path / "new" / "copy.bin").read_bytes() == content
    assert storage.read(uri, 39 << 20) == content[39 << 20 :]
    assert os.listdir(tmp_path / "new") == ["copy.bin"]


def test_large_bytes_go_up_in_parts(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 takes 5 GB in one request at most, and a model may have more."""
    monkeypatch.setattr(s3, "_TRANSFER", TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20))
    uri, content = join(s3_root, uuid.uuid4().hex, "model.safetensors"), os.urandom(12 << 20)
    storage = open_storage(uri)
    storage.write(uri, content)
    assert storage.version(uri).endswith("-3")  # an ETag names the number of parts
    assert storage.read(uri) == content


def test_a_created_object_appears_whole_or_not_at_all(root: str, storage: Storage, tmp_path: Path) -> None:
    """It is written in any order, and nothing of it stays on the local disk."""
    uri, scratch = join(root, "models", "base.safetensors"), str(tmp_path / "scratch")
    with storage.create(uri, scratch=scratch) as file:
        file.seek(4)
        file.write(b"data")
        file.seek(0)
        file.write(b"head")
        assert not storage.exists(uri)
    assert storage.read(uri) == b"headdata"
    with pytest.raises(ZeroDivisionError), storage.create(join(root, "models", "other"), scratch=scratch) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert storage.list(root) == [uri]
    assert not os.path.exists(scratch) or os.listdir(scratch) == []


def test_a_created_object_is_sent_again_after_an_outage(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts, since one request may carry 5 GB; the file is not made again."""
    monkeypatch.setattr(s3, "_TRANSFER", TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20))
    monkeypatch.setattr(retry, "FIRST_S", 0.001)
    uri, content, sends = join(s3_root, uuid.uuid4().hex, "model.safetensors"), os.urandom(12 << 20), list[str]()
    send = s3._send

    def unsteady(descriptor: int, uri: str) -> None:
        sends.append(uri)
        if len(sends) < 3:
            raise Unreachable(uri)
        send(descriptor, uri)

    monkeypatch.setattr(s3, "_send", unsteady)
    storage = open_storage(uri)
    with storage.create(uri, patience_s=600) as file:
        file.write(content)
    assert storage.read(uri) == content and storage.version(uri).endswith("-3") and len(sends) == 3
    with pytest.raises(Unreachable), storage.create(uri) as file:
        sends.clear()
        file.write(b"other")
    assert storage.read(uri) == content


def test_a_copy_is_whole_and_goes_its_own_way(root: str, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large objects are copied in parts; what replaces the original does not change the copy."""
    monkeypatch.setattr(s3, "_COPY", TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20))
    source, target, content = join(root, "a"), join(root, "deep", "b"), os.urandom(11 << 20)
    for uri, data in ((source, content), (target, b"to be replaced")):
        storage.write(uri, data)
    storage.copy(source, target)
    assert storage.read(target) == storage.read(source) == content
    storage.write(source, b"new")
    assert storage.read(target) == content and storage.list(root) == [source, target]
    with pytest.raises(Missing):
        storage.copy(join(root, "none"), target)
    assert storage.read(target) == content


def test_uploading_a_file_that_is_not_there_names_the_file(root: str, storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(Missing, match="no-such-file"):
        storage.upload(str(tmp_path / "no-such-file"), join(root, "x"))


def test_json_comes_back_and_broken_json_is_named(root: str, storage: Storage) -> None:
    uri = join(root, "stage.json")
    write_json(uri, {"größe": [1, 2.5, None]})
    assert read_json(uri) == {"größe": [1, 2.5, None]}
    for damaged in (b'{"half": ', b"", b"[1]"):
        storage.write(uri, damaged)
        with pytest.raises(UserError, match=r"stage\.json: this is not JSON") as caught:
            read_json(uri)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_fetch_sees_a_replaced_object_and_reuses_others(root: str, storage: Storage, tmp_path: Path) -> None:
    uri, cache = join(root, "model.safetensors"), str(tmp_path / "cache")
    storage.write(uri, b"old")
    first = fetch(uri, cache)
    changed = os.stat(first).st_mtime_ns
    assert fetch(uri, cache) == first and os.stat(first).st_mtime_ns == changed
    storage.write(uri, b"new weights")
    assert Path(fetch(uri, cache)).read_bytes() == b"new weights"
    assert first.endswith("model.safetensors")


def test_a_storage_can_be_forked_and_pickled(root: str, storage: Storage) -> None:
    uri = join(root, "shared")
    storage.write(uri, b"seen")  # the parent's connection is open by now
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.apply(storage.read, (uri,)) == b"seen"


def test_a_writer_that_dies_leaves_nothing_to_read(tmp_path: Path) -> None:
    target = tmp_path / "out" / "x"
    script = (
        "import os\nfrom oar_scale.storage.local import atomic_file\n"
        f"with atomic_file({str(target)!r}) as file:\n    file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert len(os.listdir(target.parent)) == 1  # the half-written file is there, under its hidden name
    assert open_storage(str(tmp_path)).list(str(tmp_path)) == []
    assert open_storage(str(tmp_path)).write(str(target), b"whole", if_absent=True)


def test_a_path_through_a_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/x: .*not a folder"):
        open_storage("x").write(str(tmp_path / "file" / "x"), b"")


@pytest.mark.parametrize("name", ["x" * 300, "loop"])
def test_a_path_that_no_file_can_have_is_explained(name: str, tmp_path: Path) -> None:
    os.symlink("loop", tmp_path / "loop")
    with pytest.raises(UserError, match=r"more than 255 bytes|leads back to itself"):
        open_storage("x").read(str(tmp_path / name / "run.json"))


def test_join_and_schemes() -> None:
    assert join("s3://b/run/", "tokens", "/train/", "", "0.tar") == "s3://b/run/tokens/train/0.tar"
    assert join("/", "x") == "/x"
    assert join("", "x", "y") == "x/y"
    assert join("runs/a/") == "runs/a"
    for uri in ("gs://bucket/x", "s3:/bucket/x", "file:///x"):
        with pytest.raises(UserError, match="Use a local path, or s3://bucket/prefix"):
            open_storage(uri)
    for uri in ("s3://", "s3://bucket", "s3://bucket/"):
        with pytest.raises(UserError, match="s3://bucket/prefix/name"):
            open_storage(uri).read(uri)


def test_a_local_run_never_imports_boto3(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom oar_scale.storage import open_storage\n"
        f"open_storage('x').write({str(tmp_path / 'x')!r}, b'')\nassert 'boto3' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("below", ["", "run"])
def test_a_folder_that_cannot_be_made_is_not_a_missing_file(tmp_path: Path, below: str) -> None:
    """A link to a disk that is not mounted: what is written is not there yet, and no stage would write it first."""
    (tmp_path / "link").symlink_to(tmp_path / "unmounted" / "disk")
    folder = str(tmp_path / "link" / below)
    uri, source = join(folder, "file"), tmp_path / "source"
    source.write_bytes(b"x")
    uses: list[Callable[[], object]] = [
        lambda: open_storage(uri).write(uri, b"x"),
        lambda: open_storage(uri).upload(str(source), uri),
        lambda: open_storage(uri).copy(str(source), uri),
    ]
    for use in uses:
        with pytest.raises(UserError, match="a link that leads nowhere") as raised:
            use()
        assert folder.rstrip("/") in str(raised.value) and not isinstance(raised.value, Missing)
