"""Credentials that expired and were renewed since are read again by every verb."""

from __future__ import annotations

from pathlib import Path

import pytest

from oar_scale.storage import open_storage
from oar_scale.storage.s3_client import client
from tests.fault_proxy import FaultProxy
from tests.shard_files import Shard


@pytest.mark.parametrize("verb", ["write", "claim", "upload", "download", "list", "delete", "copy", "create"])
def test_each_verb_reads_expired_credentials_again(verb: str, renewed: FaultProxy, shard: Shard, tmp_path: Path) -> None:
    client()
    renewed.spoil({"expired": 1.0}, at_most=1, methods=("GET", "PUT", "POST", "DELETE") if verb not in ("download", "copy") else ("HEAD",))
    storage, other, path = open_storage(shard.uri), f"{shard.uri}.{verb}", tmp_path / "file"
    path.write_bytes(b"x")

    def create() -> None:
        with storage.create(other) as file:
            file.write(b"x")

    {
        "write": lambda: storage.write(other, b"x"),
        "claim": lambda: storage.write(other, b"x", if_absent=True),
        "upload": lambda: storage.upload(str(path), other),
        "download": lambda: storage.download(shard.uri, str(path)),
        "list": lambda: storage.list(shard.uri.rpartition("/")[0]),
        "delete": lambda: storage.delete(other),
        "copy": lambda: storage.copy(shard.uri, other),
        "create": create,
    }[verb]()
    assert renewed.injected["expired"] == 1
    if verb not in ("download", "list", "delete"):
        assert storage.exists(other)
