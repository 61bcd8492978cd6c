"""A bucket in which somebody else has written: no name from it becomes a path, nothing in it ends a command with a traceback.

Each test takes a fresh prefix of the real S3 server, and a machine whose home, working folder and temporary folder are empty. Afterwards
they hold nothing but what the command was asked for.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from crc32c import crc32c

from oar_scale.cli import main
from oar_scale.data import scan
from oar_scale.distributed.checkpoints.layout import new_save
from oar_scale.errors import UserError
from oar_scale.names import file_name, relative_path
from oar_scale.observe.mirror import pull, run_id
from oar_scale.storage.s3_client import client, split

ESCAPES = ("/{outside}/victim", "../victim", "a/../../victim", "..", ".", "", "a//b", "x\n", "x\0y", "\ud800", "v" * 300)
"""Names that lead elsewhere, or nowhere."""
DEEP = b"[" * 100_000 + b"]" * 100_000
KEPT = "as it was"


@pytest.fixture
def root(s3_root: str) -> str:
    return f"{s3_root}/{uuid.uuid4().hex[:8]}"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that a command may reach, and one file that must stay as it is."""
    for variable, name in (("HOME", "home"), ("TMPDIR", "tmp")):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / name))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "work").mkdir()
    (tmp_path / "victim").write_text(KEPT)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def untouched(machine: Path) -> bool:
    """Without what a command keeps in its temporary folder as long as it runs."""
    files = [path for path in machine.rglob("*") if path.is_file() and machine / "tmp" not in path.parents]
    return files == [machine / "victim"] and files[0].read_text() == KEPT


def put(uri: str, content: object) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    bucket, key = split(uri)
    client().put_object(Bucket=bucket, Key=key, Body=data)


def names(machine: Path) -> list[str]:
    return [name.format(outside=str(machine).strip("/")) for name in ESCAPES]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """The error of a command that ends as it does for what a user can fix."""
    assert main(list(arguments)) == code, arguments
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed.err or printed.out


def checkpoint(root: str, files: object, raw: bytes = b"", **other: object) -> str:
    """A committed checkpoint whose manifest says what it likes."""
    step, save = f"{root}/checkpoints/pretrain/step-00000001", new_save()
    plain = {"format": 2, "step": 1, "world_size": 1, "zero_stage": 2, "state": {}, "identity": {}, "model_spec": {}}
    manifest = raw or json.dumps({**plain, "files": files, **other}).encode()
    put(f"{step}/{save}/manifest.json", manifest)
    put(f"{step}/COMMITTED", {"save": save, "crc32c": crc32c(manifest)})
    return step


def test_names_are_parts_of_a_path_or_refused() -> None:
    for name in ("00000.tar", "mp_rank_00_model_states.pt", "ä b", "..a", "a..b", "-"):
        assert file_name(name) == relative_path(name) == name
    assert relative_path("part-0/00000.tar") == "part-0/00000.tar"
    for name in (*ESCAPES, None, 7, b"x"):
        with pytest.raises(ValueError):
            file_name(name)
    for name in ESCAPES:
        with pytest.raises(ValueError):
            relative_path(name)


def test_no_file_of_a_checkpoint_lies_elsewhere(root: str, machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [*names(machine), "zero_pp_rank_0_mp_rank_00_optim_states.pt/..", "latest", "layer_1_expert_1_mp_rank_00_model_states.pt"]:
        step = checkpoint(root, {name: {"bytes": 4, "crc32c": crc32c(b"evil"), "rank": 0}})
        for arguments in (["diff", step, step], ["convert", step, "--out", "out"], ["export", step, "--out", "out"]):
            assert "is not the name of a checkpoint's file" in refused(capsys, "checkpoint", *arguments), name
        assert "is not the name of a checkpoint's file" in refused(capsys, "checkpoint", "verify", root, code=1)
        assert main(["checkpoint", "list", root]) == 0 and "damaged" in capsys.readouterr().out
    assert untouched(machine)


def test_a_manifest_of_anything_else_is_damaged(root: str, machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = {"bytes": 1, "crc32c": 0, "rank": 0}
    shard = "mp_rank_00_model_states.pt"
    wrong = [{"files": {shard: {**entry, "bytes": bad}}} for bad in ("1", -1, None, True, 1.5)]
    wrong += [{"files": []}, {"files": {shard: []}}, {"files": {}, "step": "1"}, {"files": {}, "state": []}, {"files": {}, "raw": DEEP}]
    wrong += [{"files": {shard: {"bytes": 1}}}, {"files": {}, "saved_at": "now"}]
    wrong.append({"files": {}, "raw": json.dumps({"format": 2, "files": {}}).encode()})
    for each in [*wrong, {"files": {}, "raw": b"[]"}, {"files": {}, "raw": b"\xff"}, {"files": {}, "raw": b"{}"}]:
        step = checkpoint(root, each["files"], **{name: value for name, value in each.items() if name != "files"})
        assert "is not a checkpoint's" in refused(capsys, "checkpoint", "diff", step, step), each
        assert main(["checkpoint", "verify", step]) in (0, 1) and main(["checkpoint", "list", step]) == 0, each
        assert "Traceback" not in capsys.readouterr().err
    put(f"{step}/COMMITTED", DEEP)
    assert "COMMITTED is damaged" in refused(capsys, "checkpoint", "diff", step, step)
    assert untouched(machine)


def test_no_shard_lies_elsewhere(root: str, machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither by the manifest nor by the listing of the bucket, where a key may be whatever it likes."""
    for name in names(machine):
        put(f"{root}/manifest.json", {"shards": [{"name": name, "bytes": 1, "samples": 1, "crc32c": 1}]})
        for arguments in (["stats", root], ["verify", root], ["tokenize", root, "--out", "out", "--tokenizer", "vq.safetensors"]):
            assert "manifest" in refused(capsys, "data", *arguments) or name == "\ud800", name
    assert untouched(machine)


def test_no_listing_leads_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key may be whatever it likes; this server refuses such keys, others take them."""
    for name in ("../evil.tar", "a/../../evil.tar", "/evil.tar", "a//evil.tar", "x\n.tar"):
        monkeypatch.setattr(scan, "files_below", lambda folder, notes, name=name: ["00000.tar", name])
        with pytest.raises(UserError, match="does not lead to a file below this folder"):
            scan.list_shards("s3://bucket/images")


def test_events_name_no_files_but_their_pictures(root: str, machine: Path) -> None:
    """A reader on another host brings them into the run's folder: they must not replace its recipe, nor anything outside."""
    wanted = [
        *names(machine),
        "recipe.yaml",
        "jobs/1-run/job.sbatch",
        "samples/../recipe.yaml",
        "samples/a/b.png",
        "samples/.x.png",
        "samples/x.sh",
    ]
    lines = [{"time": 1.0, "stage": "pretrain", "kind": "samples", "step": 1, "image": name} for name in [*wanted, "samples/a-1.png"]]
    put(f"{root}/events/pretrain-000/000000000000.jsonl", b"".join(json.dumps(line).encode() + b"\n" for line in lines) + DEEP + b"\n")
    for name in ("..-000/000000000000.jsonl", "a/x-000/000000000000.jsonl", ".x-001/000000000000.jsonl"):
        put(f"{root}/events/{name}", b"{}\n")
    for name in ("victim", "recipe.yaml", "jobs/1-run/job.sbatch", "samples/a-1.png", "samples/x.sh", "samples/a/b.png"):
        put(f"{root}/events/files/{name}", b"evil")
    events = machine / "work" / "run" / "events"
    pull(root, str(events))
    here = {str(path.relative_to(machine / "work" / "run")) for path in (machine / "work").rglob("*") if path.is_file()}
    assert {name for name in here if not name.startswith("events/")} == {"samples/a-1.png"}
    assert all(os.path.dirname(name) == "events" for name in here if name.startswith("events/"))
    assert (machine / "victim").read_text() == KEPT


@pytest.mark.parametrize("name", [b"../../victim", b"*", b"", b"a/b", b"a b", b"\xff", b"x" * 65])
def test_the_name_of_a_run_is_no_path(name: bytes, root: str, machine: Path) -> None:
    """W&B's files carry it, and older ones of the same name are removed."""
    put(f"{root}/events/run.id", name)
    with pytest.raises(UserError, match=r"run\.id: .* is not the name of a run"):
        run_id(str(machine / "work"), root)
    assert untouched(machine)


def test_weights_in_several_files_lie_in_one_folder(root: str, machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = json.dumps({"kind": "model", "spec": "{}", "tensors": {}, "id": "x"})
    for name in [*names(machine), 7, None, ["a"]]:
        put(f"{root}/model.safetensors.index.json", {"metadata": {"oar_scale": entry}, "weight_map": {"a": name}})
        refused(capsys, "checkpoint", "export", f"{root}/model.safetensors", "--out", "out")
        error = refused(capsys, "checkpoint", "import", "randar", f"{root}/model.safetensors.index.json", "--out", "out")
        assert "outside its folder" in error or "not an index" in error, name
    assert untouched(machine)


NO_DOCUMENTS = {
    "deep": DEEP,
    "cut off": b"{",
    "a list": b"[]",
    "empty": b"{}",
    "null": b"null",
    "infinite": b'{"a": 1e999}',
    "no text": b"\xff\xfe{",
    "deep header": len(DEEP).to_bytes(8, "little") + DEEP,
}
DOCUMENTS: dict[str, Callable[[str], list[str]]] = {
    "manifest.json": lambda root: ["data", "stats", root],
    "stages/pretrain.json": lambda root: ["status", root],
    "config.json": lambda root: ["checkpoint", "export", root, "--out", "out"],
    "model.safetensors.index.json": lambda root: ["checkpoint", "export", f"{root}/model.safetensors", "--out", "out"],
    "model.safetensors": lambda root: ["checkpoint", "export", f"{root}/model.safetensors", "--out", "out"],
}
"""Files that a command reads, and that command."""


@pytest.mark.parametrize("file", DOCUMENTS)
@pytest.mark.parametrize("content", NO_DOCUMENTS.values(), ids=NO_DOCUMENTS)
def test_json_that_is_none_is_one_error(file: str, content: bytes, root: str, machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(f"{root}/{file}", content)
    assert refused(capsys, *DOCUMENTS[file](root))
    assert untouched(machine)
