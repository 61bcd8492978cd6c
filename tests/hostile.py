"""What somebody who may write to a bucket could put into it: files that run a program when they are unpickled, and forged manifests."""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
from collections.abc import Callable
from typing import Any

import torch
from crc32c import crc32c

from oar_scale.distributed.checkpoints.layout import MANIFEST, MARKER, read_checkpoint
from oar_scale.storage import join, open_storage


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path: str, how: str = "os.system") -> None:
        self.path, self.how = path, how

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if self.how == "exec":
            return builtins.exec, (f"open({self.path!r}, 'w').close()",)
        if self.how == "open":
            return io.open, (self.path, "w")
        return os.system, (f"touch '{self.path}'",)


def hostile_files(path: str) -> dict[str, bytes]:
    """Files that touch ``path`` when they are unpickled, by the way in which they are made."""
    files = {f"protocol {protocol}": pickle.dumps({"module": Payload(path)}, protocol) for protocol in (0, 2, 4)}
    for name, new in (("zip", True), ("before zip", False)):
        file = io.BytesIO()
        torch.save({"module": {"weight": torch.zeros(2)}, "extra": Payload(path)}, file, _use_new_zipfile_serialization=new)
        files[name] = file.getvalue()
    for how in ("exec", "open"):
        file = io.BytesIO()
        torch.save({"module": {}, "extra": Payload(path, how)}, file)
        files[how] = file.getvalue()
    return files


def forge_file(step_uri: str, name: str, data: bytes) -> None:
    """Replace a file of a committed checkpoint, with the checksum that belongs to it."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] |= {"bytes": len(data), "crc32c": crc32c(data)}

    checkpoint = read_checkpoint(step_uri)
    open_storage(step_uri).write(join(checkpoint.folder, name), data)
    forge_manifest(step_uri, change)


def forge_manifest(step_uri: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest of a committed checkpoint, and its marker with it."""
    storage = open_storage(step_uri)
    save = json.loads(storage.read(join(step_uri, MARKER)))["save"]
    manifest = json.loads(storage.read(join(step_uri, save, MANIFEST)))
    change(manifest)
    data = json.dumps(manifest).encode()
    storage.write(join(step_uri, save, MANIFEST), data)
    storage.write(join(step_uri, MARKER), json.dumps({"save": save, "crc32c": crc32c(data)}).encode())
