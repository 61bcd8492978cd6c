"""What counts as a checkpoint and what is kept, on made-up files: no engine is needed to be strict about names."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from crc32c import crc32c

from oar_scale.commands.checkpoint_management import list_checkpoints
from oar_scale.distributed.checkpoints.fetch import check, local_checkpoint
from oar_scale.distributed.checkpoints.layout import (
    DamagedCheckpoint,
    checkpoint_locations,
    commit,
    committed_steps,
    delete,
    give_up,
    new_save,
    read_checkpoint,
    save_started,
    step_uri,
    uncommit,
)
from oar_scale.distributed.checkpoints.restore import _raise_first, _sendable
from oar_scale.distributed.checkpoints.retention import Keep, Retention, prune
from oar_scale.distributed.checkpoints.scratch import Scratch, clear_dead
from oar_scale.errors import Unreachable, UserError
from oar_scale.storage import Storage, join, open_storage

HOUR = 3600.0


def write(checkpoints: str, step: int, *, nll: float | None = None, ago_s: float = 0.0, marked: bool = True, data: bytes = b"shard") -> str:
    """A checkpoint with one file; returns its attempt's name."""
    uri, save = step_uri(checkpoints, step), new_save(time.time() - ago_s)
    open_storage(uri).write(join(uri, save, "mp_rank_00_model_states.pt"), data)
    if marked:
        manifest = {
            "step": step,
            "world_size": 1,
            "zero_stage": 2,
            "state": {"metrics": {} if nll is None else {"nll_random": nll}},
            "files": {"mp_rank_00_model_states.pt": {"bytes": len(data), "crc32c": crc32c(data), "rank": 0}},
        }
        commit(uri, save, manifest)
    return save


@pytest.fixture(params=["local", "s3"])
def checkpoints(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "run" / "checkpoints" / "pretrain")
    return join(request.getfixturevalue("s3_root"), tmp_path.name, "checkpoints", "pretrain")


HUGE = 10**400
"""JSON has such numbers; no float does."""
LIKE_SAVES = ("99999999T999999Z-0123abcd", "20260101T000000Z-0123abcd-x", "٢٠٢٦٠١٠١T000000Z-0123abcd")
"""Nearly the names of attempts."""


@pytest.mark.parametrize(
    "changes", [{"step": HUGE}, {"saved_at": -HUGE}, {"state": {"metrics": {"nll": HUGE}}}, {"state": {"metrics": [["nll", 1.0]]}}]
)
def test_numbers_without_end_are_damage(changes: dict[str, Any], tmp_path: Path) -> None:
    checkpoints = str(tmp_path / "checkpoints" / "pretrain")
    uri, save = step_uri(checkpoints, 4), write(checkpoints, 4, marked=False)
    shard = {"mp_rank_00_model_states.pt": {"bytes": 5, "crc32c": crc32c(b"shard"), "rank": 0}}
    commit(uri, save, {"step": 4, "world_size": 1, "zero_stage": 2, "state": {}, "files": shard, **changes})
    with pytest.raises(DamagedCheckpoint, match="is not a checkpoint's"):
        read_checkpoint(uri)
    assert "damaged" in list_checkpoints(checkpoints)


@pytest.mark.parametrize("marker", [{"crc32c": "Infinity"}, {"save": "99999999T999999Z-0123abcd"}, {"crc32c": "1.5"}, {"crc32c": "true"}])
def test_a_marker_of_anything_else_is_damage(marker: dict[str, str], tmp_path: Path) -> None:
    checkpoints = str(tmp_path / "checkpoints" / "pretrain")
    save = write(checkpoints, 4)
    text = f'{{"save": "{marker.get("save", save)}", "crc32c": {marker.get("crc32c", "1")}}}'
    Path(step_uri(checkpoints, 4), "COMMITTED").write_text(text)
    with pytest.raises(DamagedCheckpoint, match="COMMITTED is damaged"):
        read_checkpoint(step_uri(checkpoints, 4))


def test_what_is_named_nearly_like_an_attempt_is_none(tmp_path: Path) -> None:
    """Somebody else's files are neither listed nor removed."""
    checkpoints = str(tmp_path / "checkpoints" / "pretrain")
    write(checkpoints, 4)
    for name in LIKE_SAVES:
        open_storage(checkpoints).write(join(step_uri(checkpoints, 4), name, "file"), b"mine")
    assert len(list_checkpoints(checkpoints).splitlines()) == 2
    assert kept(checkpoints, Keep(1)) == [4] and prune(checkpoint_locations(checkpoints), Retention(Keep(1)), time.time() + 9 * HOUR) == []


def test_an_attempt_whose_manifest_names_no_files_is_given_up(tmp_path: Path) -> None:
    checkpoints = str(tmp_path / "checkpoints" / "pretrain")
    save = write(checkpoints, 4, marked=False)
    open_storage(checkpoints).write(join(step_uri(checkpoints, 4), save, "manifest.json"), json.dumps({"files": 5}).encode())
    assert give_up(step_uri(checkpoints, 4), save)


def kept(checkpoints: str, keep: Keep, now: float | None = None) -> list[int]:
    prune(checkpoint_locations(checkpoints), Retention(keep), now or time.time())
    return committed_steps(checkpoints)


def test_the_name_of_an_attempt_tells_when_it_began() -> None:
    assert save_started(new_save(1_800_000_000)) == 1_800_000_000
    assert new_save() != new_save()


def test_of_two_attempts_at_a_step_the_first_is_kept(checkpoints: str) -> None:
    first = write(checkpoints, 5, data=b"one")
    with pytest.raises(DamagedCheckpoint, match="another attempt at saving this step was committed before"):
        write(checkpoints, 5, data=b"another")
    state = read_checkpoint(step_uri(checkpoints, 5))
    assert state.save == first and state.bytes == len(b"one")
    check(state, "mp_rank_00_model_states.pt")
    assert kept(checkpoints, Keep(1), time.time() + 2 * HOUR) == [5]
    assert checkpoint_locations(checkpoints)[0].saves == {first}, "the attempt that came second was left over"


def test_a_commit_whose_answer_was_lost_is_repeated(checkpoints: str) -> None:
    save, uri = write(checkpoints, 5), step_uri(checkpoints, 5)
    manifest = read_checkpoint(uri).manifest
    del manifest["format"]
    commit(uri, save, manifest)
    assert read_checkpoint(uri).save == save


def test_an_attempt_that_was_given_up_cannot_commit(checkpoints: str) -> None:
    uri, save = step_uri(checkpoints, 5), write(checkpoints, 5, marked=False)
    assert give_up(uri, save)
    with pytest.raises(DamagedCheckpoint, match="given up"):
        commit(uri, save, {"step": 5, "files": {}})
    assert committed_steps(checkpoints) == []


def test_an_attempt_without_its_marker_only_is_committed(checkpoints: str) -> None:
    uri, save = step_uri(checkpoints, 5), write(checkpoints, 5, ago_s=2 * HOUR)
    delete(uri, ["COMMITTED"])
    assert kept(checkpoints, Keep(1)) == [5]
    assert read_checkpoint(uri).save == save


@pytest.mark.parametrize("broken", ["", "COMMITTED", "manifest.json"])
def test_a_rejected_checkpoint_is_never_committed_again(checkpoints: str, broken: str) -> None:
    """It would count as the newest one, for which an intact one is removed."""
    write(checkpoints, 10, ago_s=3 * HOUR)
    save, uri = write(checkpoints, 20, ago_s=3 * HOUR), step_uri(checkpoints, 20)
    if broken:
        name = join(uri, broken if broken == "COMMITTED" else f"{save}/{broken}")
        open_storage(name).write(name, open_storage(name).read(name).replace(b"1", b"2"))
    uncommit(uri)
    assert committed_steps(checkpoints) == [10]
    write(checkpoints, 15)
    assert kept(checkpoints, Keep(2)) == [10, 15]
    assert kept(checkpoints, Keep(1)) == [15]
    assert [location.step for location in checkpoint_locations(checkpoints)] == [15], "its files are left over"


def test_an_attempt_whose_files_were_removed_is_not_committed(checkpoints: str) -> None:
    save = write(checkpoints, 5, marked=False)
    uri = step_uri(checkpoints, 5)
    delete(uri, [f"{save}/mp_rank_00_model_states.pt"])
    manifest = {"step": 5, "files": {"mp_rank_00_model_states.pt": {"bytes": 5, "crc32c": crc32c(b"shard"), "rank": 0}}}
    with pytest.raises(DamagedCheckpoint, match=r"mp_rank_00_model_states\.pt was removed by someone else"):
        commit(uri, save, manifest)
    assert committed_steps(checkpoints) == []


def test_the_newest_every_mth_and_the_best_are_kept(checkpoints: str) -> None:
    for step, nll in [(10, 4.0), (20, 2.0), (30, None), (40, 2.5), (50, 3.0), (60, 3.1)]:
        write(checkpoints, step, nll=nll)
    assert kept(checkpoints, Keep(newest=2, every=30, best=2)) == [20, 30, 40, 50, 60]
    assert kept(checkpoints, Keep(newest=2, best=1)) == [20, 50, 60]
    assert kept(checkpoints, Keep(newest=1)) == [60]
    assert [location.step for location in checkpoint_locations(checkpoints)] == [60], "files of removed checkpoints are still there"


def test_the_newest_committed_one_is_never_removed(tmp_path: Path) -> None:
    checkpoints = str(tmp_path)
    write(checkpoints, 10)
    write(checkpoints, 20, marked=False)
    assert kept(checkpoints, Keep(newest=0)) == [10]


def test_leftovers_of_a_save_are_removed_after_an_hour(tmp_path: Path) -> None:
    checkpoints = str(tmp_path)
    write(checkpoints, 10, ago_s=3 * HOUR)
    dead, alive = write(checkpoints, 10, marked=False, ago_s=2 * HOUR), write(checkpoints, 20, marked=False, ago_s=0.5 * HOUR)
    kept(checkpoints, Keep(1))
    assert {save for location in checkpoint_locations(checkpoints) for save in location.saves} >= {alive} and not (
        tmp_path / "step-00000010" / dead
    ).exists()
    assert kept(checkpoints, Keep(1), time.time() + HOUR) == [10]
    assert os.listdir(tmp_path) == ["step-00000010"]


def test_a_removal_that_breaks_off_leaves_no_half_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, removed = str(tmp_path), []
    for step in (1, 2):
        write(checkpoints, step)
    storage: type[Storage] = type(open_storage(checkpoints))
    whole_delete = storage.delete

    def delete_once(self: Any, uri: str) -> None:
        if removed:
            raise OSError("killed")
        removed.append(uri)
        whole_delete(self, uri)

    monkeypatch.setattr(storage, "delete", delete_once)
    with pytest.raises(OSError, match="killed"):
        kept(checkpoints, Keep(1))
    assert committed_steps(checkpoints) == [2]


def test_a_file_that_grew_or_shrank_or_changed_is_named(checkpoints: str) -> None:
    name = "mp_rank_00_model_states.pt"
    for step, (data, fault) in enumerate([(b"sharD", "crc32c"), (b"shards", "6 bytes"), (b"shar", "4 bytes"), (b"", "0 bytes")]):
        save = write(checkpoints, step)
        uri = step_uri(checkpoints, step)
        open_storage(uri).write(join(uri, save, name), data)
        with pytest.raises(DamagedCheckpoint, match=rf"{name} is damaged .*{fault}.*the manifest says 5 bytes"):
            check(read_checkpoint(uri), name)
        with pytest.raises(UserError, match=rf"step-0000000{step}: {name} is damaged"), local_checkpoint(uri):
            pass


def test_scratch_of_a_dead_process_is_removed_a_living_ones_not(tmp_path: Path) -> None:
    parent = str(tmp_path / "scratch")
    mine = Scratch(parent, "mine")
    if (child := os.fork()) == 0:
        Path(Scratch(parent, "dead").path, "shard").write_bytes(b"half")
        os._exit(0)
    os.waitpid(child, 0)
    Path(tmp_path / "scratch" / "other").mkdir()
    clear_dead(parent)
    assert sorted(os.listdir(parent)) == ["checkpoint-mine", "checkpoint-mine.lock", "other"]
    mine.remove()
    mine.remove()
    assert os.listdir(parent) == ["other"]


@pytest.mark.parametrize("error", [Unreachable("s3://b/x: no answer"), UserError("s3://b/x: no such bucket"), ValueError("x")])
def test_another_ranks_error_stays_what_it_is(error: Exception) -> None:
    """Workers are restarted after an outage, and not after what only a user can fix."""
    sent = _sendable(error)
    with pytest.raises(RuntimeError if isinstance(error, ValueError) else type(error), match=str(error)) as caught:
        _raise_first(None, [None, sent])
    assert isinstance(error, ValueError) or type(caught.value) is type(error)
