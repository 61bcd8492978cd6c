"""Reads what wandb wrote offline: a ``.wandb`` file is a LevelDB log of protobuf records (checked with wandb 0.31)."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAGIC = b":W&B"
HEADER, BLOCK = 7, 32768
FULL, FIRST, LAST = 1, 2, 4


@dataclass
class OfflineRun:
    """What ``wandb sync`` would upload."""

    id: str = ""
    project: str = ""
    name: str = ""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    alerts: list[str] = field(default_factory=list)
    artifacts: list[str] = field(default_factory=list)
    exit_code: int | None = None


def read_offline_run(path: Path) -> OfflineRun:
    run = OfflineRun()
    for record in _records(path.read_bytes()):
        match record.WhichOneof("record_type"):
            case "run":
                fields = record.run
                run.id, run.project, run.name, run.group = fields.run_id, fields.project, fields.display_name, fields.run_group
                run.job_type, run.tags = fields.job_type, list(fields.tags)
                run.config |= _values(fields.config.update)
            case "config":
                run.config |= _values(record.config.update)
            case "history":
                run.history.append(_values(record.history.item))
            case "alert":
                run.alerts.append(record.alert.title)
            case "artifact":
                run.artifacts.append(record.artifact.name)
            case "exit":
                run.exit_code = record.exit.exit_code
    return run


def offline_runs(folder: Path) -> list[OfflineRun]:
    """All runs that were kept offline below a run's local folder, oldest first."""
    return [read_offline_run(path) for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))]


def _values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(data: bytes) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    assert data[:4] == MAGIC, data[:HEADER]
    position, payload = HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:  # too little for another header: padding
            position += left
            continue
        _checksum, size, kind = struct.unpack("<IHB", data[position : position + HEADER])
        if kind == 0:
            position += left
            continue
        chunk = data[position + HEADER : position + HEADER + size]
        position += HEADER + size
        if len(chunk) < size:
            return  # the torn end of a killed run
        payload = chunk if kind in (FULL, FIRST) else payload + chunk
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(payload)
            yield record
