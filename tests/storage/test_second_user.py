"""A second user of the same machine, who has made something where we are about to write."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from second_user import UID, as_second_user

from oar_scale.distributed.checkpoints.scratch import Scratch
from oar_scale.errors import UserError
from oar_scale.launch.submissions import locked
from oar_scale.observe.mirror import pull
from oar_scale.storage import fetch, storage_of
from oar_scale.storage.cache_folder import CacheFolder, CacheUnusable
from oar_scale.storage.local import LocalStorage
from oar_scale.storage.own_folder import foreign_part


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """As ``/tmp``: everyone may make something in it."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    for above in (tmp_path, *tmp_path.parents):  # pytest's own folders let nobody else in
        if above.stat().st_uid == os.geteuid() and "pytest" in str(above):
            above.chmod(0o755)
    yield folder


def test_a_folder_that_somebody_else_made_is_not_used(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one inside of it, nor a link: for shards, checkpoints, models."""
    own = shared / "own"
    own.mkdir()
    (shared / "victim").mkdir()
    made = as_second_user(["sh", "-c", f"mkdir -m 777 {shared}/cache; ln -s {own} {shared}/link; mkdir -p {shared}/cache/inner"])
    assert made.returncode == 0, made.stderr
    assert foreign_part(str(own)) is None and foreign_part(str(shared / "new" / "folder")) is None
    monkeypatch.setattr(storage_of("s3").__class__, "version", lambda self, uri: "1")
    for name in ("cache", "cache/inner", "cache/new", "link", "link/new"):
        folder = str(shared / name)
        with pytest.raises(CacheUnusable, match="was made by another user"):
            CacheFolder(folder, None).obtain("digest", None, 10)
        assert "was made by another user" in str(Scratch(folder, "x").fault)
        with pytest.raises(UserError, match="was made by another user"):
            fetch("s3://bucket/model.safetensors", folder)
    assert not list(own.iterdir()) and {path.name for path in (shared / "cache").iterdir()} == {"inner"}


def test_a_folder_of_the_team_is_used(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A colleague has made it in ``/scratch``; not one of another group, one to which everyone may write, a link, nor the folder itself."""
    team = shared / "team"
    made = as_second_user(["sh", "-c", f"mkdir -m 2770 {team}; ln -s {team} {shared}/link"])
    assert made.returncode == 0, made.stderr
    (team / "mine").mkdir()
    monkeypatch.setattr(os, "getgroups", lambda: [UID])
    assert foreign_part(str(team / "mine" / "cache")) is None and foreign_part(str(team / "new")) is None
    assert Scratch(str(team / "mine"), "x").fault is None
    assert foreign_part(str(team)) == str(team)
    assert foreign_part(str(shared / "link" / "mine")) == str(shared / "link")
    team.chmod(0o2777)
    assert foreign_part(str(team / "mine")) == str(team)
    team.chmod(0o2770)
    monkeypatch.setattr(os, "getgroups", lambda: [])
    assert foreign_part(str(team / "mine")) == str(team)


def test_a_link_in_place_of_a_file_is_not_written_through(tmp_path: Path) -> None:
    """Made beforehand, in a folder that is ours: names in a cache can be guessed."""
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in ("digest.part", ".lock"):
        (cache / name).symlink_to(victim)
        with pytest.raises(CacheUnusable):
            CacheFolder(str(cache), 1000).obtain("digest", None, 10)
        (cache / name).unlink()
    (cache / "checkpoint-x.lock").symlink_to(victim)
    assert Scratch(str(cache), "x").fault is not None
    assert victim.read_text() == "as it was"


def test_what_is_written_replaces_a_link(tmp_path: Path) -> None:
    """A symlink in a run's folder is replaced, and what it points to stays."""
    victim, link = tmp_path / "victim", tmp_path / "events.json"
    victim.write_text("as it was")
    link.symlink_to(victim)
    LocalStorage().write(str(link), b"new")
    assert link.read_text() == "new" and not link.is_symlink()
    for name in ("run/jobs/.lock", "run/events/.pull.lock"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"), locked(str(tmp_path / "run")):
        pass
    with pytest.raises(OSError, match="symbolic link"):
        pull(str(tmp_path / "nothing"), str(tmp_path / "run" / "events"))
    assert victim.read_text() == "as it was"
