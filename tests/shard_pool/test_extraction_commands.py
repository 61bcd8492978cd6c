"""``oar extract`` as a job array without Ray: what it leaves, what it says meanwhile, and how far it is from outside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_run import copy_run, prepare_small_run, small_recipe

from oar_scale.cli import main
from oar_scale.cli.extract import _array_task
from oar_scale.commands.extraction_verify import verify_order_tables
from oar_scale.config.loading import dump_recipe
from oar_scale.data.manifest import read_manifest
from oar_scale.errors import UserError
from oar_scale.observe.events import read_events
from oar_scale.orders.order_table import OrderTable, read_orders, table_name, write_orders
from oar_scale.run.context import Run
from oar_scale.shard_pool import ArrayTask, Ledger
from oar_scale.shard_pool.ledger import LedgerEntry
from oar_scale.stages.extract import run_extract
from oar_scale.storage import open_storage, write_json
from oar_scale.storage.local import LocalStorage


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Ready to be extracted: 96 drawings in shards of 16, an untrained model."""
    run = prepare_small_run(small_recipe(str(tmp_path_factory.mktemp("run")), extract={"views": 2, "batch": 16}))
    open_storage(run.at()).upload(run.model_uri("base"), run.model_uri("any_order"))
    return Run(run.recipe, array=ArrayTask(0, 1))


@pytest.fixture(scope="module")
def recipe_file(run: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(dump_recipe(run.recipe))
    return str(path)


def test_the_status_before_anything_began(run: Run, recipe_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extract", recipe_file, "--status"]) == 0
    assert ": 0 of 5 shards, 0 of " in capsys.readouterr().out


def test_one_task_of_an_array_extracts_everything_and_says_so(run: Run, recipe_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    results = run_extract(run)
    manifest = read_manifest(run.at("tokens", "train"))
    assert (results["images"], results["actors"], results["found"], results["poison"]) == (manifest.samples, 1, 0, {})
    for shard in manifest.shards:
        table = read_orders(run.at("orders", "train", table_name(shard.name)))
        assert table.views == [0, 1] * shard.samples
    points = [event for event in read_events(run.events, "extract") if event["kind"] == "pool"]
    assert [point["done"] for point in points][-1] == manifest.samples == points[-1]["total"]
    assert points[-1]["images_per_s"] > 0 and points[-1]["actors"] == 1 and points[-1]["retries"] == 0
    capsys.readouterr()
    assert main(["extract", recipe_file, "--status"]) == 0
    output = capsys.readouterr().out
    assert f": {len(manifest.shards)} of {len(manifest.shards)} shards" in output and "(100.0 %)" in output
    assert "none running\n" in output and "actor-hours so far" in output
    assert run_extract(run)["found"] == len(manifest.shards)


def test_damaged_and_lost_tables_are_found_and_made_again(run: Run, recipe_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_extract(run)
    write_json(run.marker("extract"), {})  # the stage is finished
    assert main(["extract", recipe_file, "--verify"]) == 0
    assert ": 5 tables, all of them as they were written" in capsys.readouterr().out
    assert open_storage(run.at()).exists(run.marker("extract"))
    folder = Path(run.at("orders", "train"))
    before = {path.name: path.read_bytes() for path in folder.glob("*.parquet")}
    data = before["00001.parquet"]
    (folder / "00001.parquet").write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    (folder / "00002.parquet").write_bytes(data)
    (folder / "00004.parquet").unlink()
    capsys.readouterr()
    assert main(["extract", recipe_file, "--verify"]) == 1
    output = capsys.readouterr().out
    assert ": 3 of 5 tables are lost or damaged; the next `oar extract RECIPE` makes them again" in output
    assert "00001.tar: other bytes than were written (crc32c)" in output and "00004.tar: there is no table" in output
    assert not open_storage(run.at()).exists(run.marker("extract")), "the next extraction would be skipped"
    assert run_extract(run)["found"] == 2
    assert {path.name: path.read_bytes() for path in folder.glob("*.parquet")} == before


def test_what_the_storage_refuses_is_not_damaged(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials that have expired must not cost the orders of a week."""
    run_extract(run)
    write_json(run.marker("extract"), {})
    ledger, read = Ledger(run.at("orders", "train", "ledger")), LocalStorage.read
    before = ledger.done()

    def refused(storage: LocalStorage, uri: str, *part: int | None) -> bytes:
        if uri.endswith("00001.parquet"):
            raise UserError(f"{uri}: Permission denied")
        return read(storage, uri, *part)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalStorage, "read", refused)
    with pytest.raises(UserError, match="Permission denied"):
        verify_order_tables(run)
    assert ledger.done() == before and open_storage(run.at()).exists(run.marker("extract"))


def test_a_damaged_ledger_entry_is_named_and_made_again(run: Run, recipe_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_extract(run)
    folder = Path(run.at("orders", "train"))
    entry, table = folder / "ledger/00001.tar.json", (folder / "00001.parquet").read_bytes()
    for damaged in ("", entry.read_text()[:40]):
        entry.write_text(damaged)
        capsys.readouterr()
        assert main(["extract", recipe_file, "--status"]) == 0
        output = capsys.readouterr().out
        assert ": 4 of 5 shards" in output and "damaged   00001.tar: its ledger entry is damaged" in output
        if not damaged:
            assert main(["extract", recipe_file, "--verify"]) == 1
            output = capsys.readouterr().out
            assert ": 1 of 5 tables are lost or damaged" in output and "00001.tar: its ledger entry is damaged" in output
        assert run_extract(run)["found"] == 4
        assert (folder / "00001.parquet").read_bytes() == table and "table_crc32c" in entry.read_text()


def test_verify_reads_older_entries_and_drops_other_tokens(run: Run, tmp_path: Path) -> None:
    """The table of an entry without a checksum is read; one that was made from other tokens is dropped."""
    copy = copy_run(run, str(tmp_path / "run"))
    manifest, ledger = read_manifest(copy.at("tokens", "train")), Ledger(copy.at("orders", "train", "ledger"))
    for shard, tokens in zip(manifest.shards, (None, None, "other"), strict=False):
        ledger.enter(shard.name, LedgerEntry({"tokens_crc32c": tokens or shard.crc32c}))
        order = np.arange(64, dtype=np.uint16)[None]
        write_orders(copy.at("orders", "train", table_name(shard.name)), OrderTable(["a"], [0], order, order.astype(np.float32), "m", "s"))
    Path(copy.at("orders", "train", "00001.parquet")).write_bytes(b"PAR1")
    assert verify_order_tables(copy) == 1
    assert ledger.done() == {"00000.tar"}


@pytest.mark.parametrize("what", ["--status", "--verify"])
def test_looking_brings_neither_torch_nor_ray(recipe_file: str, what: str) -> None:
    status = f"main(['extract', {recipe_file!r}, {what!r}])"
    program = f"import sys; from oar_scale.cli import main; {status}; sys.exit(bool({{'torch', 'ray'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_place_in_an_array_is_given_or_slurms(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _array_task("3/8") == (3, 8)
    for name, value in (("SLURM_ARRAY_TASK_ID", "11"), ("SLURM_ARRAY_TASK_COUNT", "4"), ("SLURM_ARRAY_TASK_MIN", "10")):
        monkeypatch.setenv(name, value)
    assert _array_task("") == (1, 4)


def test_a_place_that_is_none_is_refused(recipe_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    for given in ("4/4", "x/2", "1"):
        with pytest.raises(UserError, match="I/N is needed, with I from 0 to N - 1"):
            _array_task(given)
    assert main(["extract", recipe_file, "--array"]) == 2
    assert "SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT are not set" in capsys.readouterr().err


def test_actors_are_a_number_or_bounds(tmp_path: Path) -> None:
    config = small_recipe(str(tmp_path), extract={"actors": {"min": 2, "max": 9}}).extract
    assert (config.min_actors, config.max_actors) == (2, 9)
    assert (small_recipe(str(tmp_path)).extract.min_actors, small_recipe(str(tmp_path)).extract.max_actors) == (2, 2)
    with pytest.raises(ValueError, match="min 3 is above max 2"):
        small_recipe(str(tmp_path), extract={"actors": {"min": 3, "max": 2}})
