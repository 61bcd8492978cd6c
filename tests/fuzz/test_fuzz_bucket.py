"""Hostile manifests, ledgers, order tables, checkpoints, weights and run records.

Each example is a command of ``oar`` on input that is valid but for something: it ends with one clear error, or with what it could do
(``sandbox.py`` has the list of what it must not). docs/results/fuzz.md has the long runs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from sandbox import oar
from strategies import ESCAPED, PATIENCE, damaged, document, fuzz, json_files, pickles

pytestmark = PATIENCE


@contextmanager
def replaced(path: Path, data: bytes) -> Iterator[None]:
    """A file with other content for a while."""
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(before)


def fuzz_json(path: Path, data: st.DataObject, commands: Callable[[], None]) -> None:
    """Run commands with a hostile version of a JSON file."""
    with replaced(path, data.draw(json_files(json.loads(path.read_bytes())))):
        commands()


@fuzz
@given(data=st.data())
def test_fuzzed_manifests_are_read_or_refused(folder: Path, run: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["tokens", "images"]))

    def commands() -> None:
        for command in (
            ["data", "verify", f"run/{kind}/train"],
            ["data", "stats", f"run/{kind}/train"],
            ["plan", "run.yaml", "--gpu", "h200", "--nodes", "1"],
        ):
            oar(folder, *command)

    fuzz_json(run / kind / "train" / "manifest.json", data, commands)


@fuzz
@given(data=st.data())
def test_fuzzed_ledgers_are_read_or_refused(folder: Path, run: Path, data: st.DataObject) -> None:
    orders, pool = run / "orders" / "ledger", run / "orders" / "ledger-pool"
    shards = sorted(path.name for path in (run / "tokens" / "train").glob("*.tar"))
    entry = {
        "result": {"sha256": "0" * 64, "orders": 16, "crc32c": 1},
        "work": {"actor": "h:1", "host": "h", "holder": "x", "seconds": 1.5, "finished": 1.0},
    }
    claim = {"holder": "x", "host": "h", "pid": 1, "time": 1.0}
    lease = {"host": "h", "pid": 1, "beat": 3, "time": 1.0, "actors": 1, "array": False}
    poison = {"error": "it broke", "holder": "x", "hosts": ["h"]}
    names = {"": entry, "claims": claim, "holders": lease, "poison": poison, "drafts": entry}
    places = list(names.items())
    written = []
    for place, record in data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=3)):
        name = data.draw(
            st.sampled_from(
                [*shards, "x.0", "other", "a.b.c", "..", "\ud83d".encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")]
            )
        )
        path = (
            pool / place if place else orders
        ) / f"{name}{data.draw(st.sampled_from(['.json', '.0.json', '.1.json', '.x.json', '.00000001.json']))}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.draw(json_files(record)))
        written.append(path)
    try:
        oar(folder, "extract", "run.yaml", "--status")
        oar(folder, "status", "run.yaml")
    finally:
        for path in written:
            path.unlink(missing_ok=True)


@fuzz
@given(data=st.data())
def test_fuzzed_order_tables_are_verified(folder: Path, run: Path, data: st.DataObject) -> None:
    from oar_scale.orders.order_table import OrderTable, order_bytes

    shard = sorted((run / "tokens" / "train").glob("*.tar"))[0].stem
    orders = np.stack([np.random.default_rng(0).permutation(64) for _ in range(3)]).astype(np.uint16)
    table = OrderTable(["a", "b", "c"], [0, 0, 0], orders, orders.astype(np.float32), "model", "settings")
    path = run / "orders" / "train" / f"{shard}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.draw(damaged(order_bytes(table))))
    try:
        oar(folder, "extract", "run.yaml", "--verify")
        oar(folder, "orders", "run.yaml")
    finally:
        path.unlink()


@fuzz
@given(data=st.data())
def test_fuzzed_checkpoints_are_read_or_refused(folder: Path, run: Path, data: st.DataObject) -> None:
    """Every byte of a checkpoint is the bucket's: the marker, the manifest with its checksum made right again, the shards."""
    import crc32c

    whole, hostile = run / "checkpoints" / "pretrain", folder / "hostile"
    shutil.rmtree(hostile, ignore_errors=True)
    shutil.copytree(whole, hostile / "checkpoints" / "pretrain")
    (step,) = sorted((hostile / "checkpoints" / "pretrain").iterdir())[-1:]
    marker = step / "COMMITTED"
    save = step / json.loads(marker.read_bytes())["save"]
    manifest = json.loads((save / "manifest.json").read_bytes())
    outside = folder.parent / ESCAPED
    match data.draw(st.sampled_from(["marker", "manifest", "name", "shard", "pickle"])):
        case "marker":
            marker.write_bytes(data.draw(json_files(json.loads(marker.read_bytes()))))
        case "manifest":
            content = data.draw(json_files(manifest))
            (save / "manifest.json").write_bytes(content)
            marker.write_text(json.dumps({"save": save.name, "crc32c": crc32c.crc32c(content)}))
        case how:
            file = data.draw(st.sampled_from(sorted(manifest["files"])))
            new = file
            if how == "name":
                new = data.draw(
                    st.sampled_from([f"../{file}", f"../../../{ESCAPED}", str(outside), f"a/{file}", ".", "", "x\ny", file.upper()])
                )
                manifest["files"][new] = manifest["files"].pop(file)
            content = data.draw(pickles(folder / ESCAPED)) if how == "pickle" else (save / file).read_bytes()
            content = data.draw(damaged(content)) if how == "shard" else content
            (save / file).write_bytes(content)
            manifest["files"][new] |= {"bytes": len(content), "crc32c": crc32c.crc32c(content)}
            text = json.dumps(manifest).encode()
            (save / "manifest.json").write_bytes(text)
            marker.write_text(json.dumps({"save": save.name, "crc32c": crc32c.crc32c(text)}))
    shutil.rmtree(folder / "converted", ignore_errors=True)
    shutil.rmtree(folder / "exported", ignore_errors=True)
    name = str(step.relative_to(folder))
    oar(folder, "checkpoint", "list", "hostile")
    oar(folder, "checkpoint", "verify", "hostile")
    command = data.draw(st.sampled_from(["diff", "convert", "export", "prune"]))
    rest = {
        "diff": [str((whole / step.name).relative_to(folder))],
        "convert": ["--out", "converted"],
        "export": ["--out", "exported"],
        "prune": ["--keep", "1"],
    }
    oar(folder, "checkpoint", command, "hostile" if command == "prune" else name, *rest[command])
    assert not (folder / ESCAPED).exists(), "a payload ran"


@fuzz
@given(data=st.data())
def test_fuzzed_weights_are_read_or_refused(folder: Path, run: Path, data: st.DataObject) -> None:
    model = (run / "models" / "any_order.safetensors").read_bytes()
    kind = data.draw(st.sampled_from(["randar", "llamagen-vq", "maskgit-vq"]))
    suffix = data.draw(st.sampled_from([".safetensors", ".pt"]))
    content = data.draw(damaged(model)) if suffix == ".safetensors" else data.draw(pickles(folder / ESCAPED))
    (folder / f"weights{suffix}").write_bytes(content)
    for target in ("imported", "exported"):
        shutil.rmtree(folder / target, ignore_errors=True)
    oar(folder, "checkpoint", "import", kind, f"weights{suffix}", "--out", "imported")
    oar(folder, "checkpoint", "export", f"weights{suffix}", "--out", "exported")
    assert not (folder / ESCAPED).exists(), "a payload ran"


@fuzz
@given(data=st.data())
def test_fuzzed_run_records_are_shown_or_refused(folder: Path, run: Path, data: st.DataObject) -> None:
    records = [
        *sorted(run.glob("*.json")),
        *sorted((run / "stages").glob("*.json")),
        *sorted((run / "events").rglob("*.jsonl")),
        run / "recipe.yaml",
    ]
    path = data.draw(st.sampled_from([record for record in records if record.exists()]))
    content = path.read_bytes()
    if path.suffix == ".jsonl":
        lines = content.splitlines()
        index = data.draw(st.integers(0, len(lines) - 1))
        lines[index] = data.draw(json_files(json.loads(lines[index]))).replace(b"\n", b" ")
        content = b"\n".join(lines) + b"\n"
    elif path.suffix == ".json":
        content = data.draw(json_files(json.loads(content)))
    else:
        content = data.draw(json_files(document(path)))
    with replaced(path, content):
        oar(folder, "status", "run")
        oar(folder, "tail", "run", "-n", "100")
        oar(folder, "jobs", "run")
        oar(folder, "checkpoint", "list", "run")
