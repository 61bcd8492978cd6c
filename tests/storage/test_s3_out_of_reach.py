"""A server that breaks off, or goes away, is out of reach, whatever library noticed it: one waits for it, and then says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from oar_scale.errors import Unreachable
from oar_scale.storage import join, open_storage
from oar_scale.storage.patience import patient
from tests.fault_proxy import FaultProxy
from tests.shard_files import Shard, content


def test_a_download_that_breaks_again_and_again_is_a_storage_out_of_reach(proxy: FaultProxy, shard: Shard, tmp_path: Path) -> None:
    proxy.spoil({"cut": 1.0})
    with pytest.raises(Unreachable):
        open_storage(shard.uri).download(shard.uri, str(tmp_path / "copy"))
    proxy.spoil({"cut": 1.0}, at_most=7)
    with patient(60):
        open_storage(shard.uri).download(shard.uri, str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == content(0)


def test_a_server_that_goes_away_after_a_404_is_out_of_reach(proxy: FaultProxy, s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    uri = join(s3_root, "nothing")
    assert not open_storage(uri).exists(uri)
    heads = list[str]()
    monkeypatch.setattr(
        proxy,
        "_choose",
        lambda method, path, head: heads.append(path) or ("refused" if path.count("/") < 2 or path.endswith("/oar-tests") else ""),
    )
    with pytest.raises(Unreachable):
        open_storage(uri).exists(uri)
    assert len(heads) == 2
