"""Shards as other programs write them."""

from __future__ import annotations

import io
import json
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (12, 8), kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@cache
def bomb(width: int, height: int) -> bytes:
    """A small PNG of so many black pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row, packer = bytes(1 + (width + 7) // 8), zlib.compressobj(9)
    pixels = b"".join(packer.compress(row * 64) for _ in range(height // 64)) + packer.compress(row * (height % 64)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def img2dataset_sample(number: int, **changes: Any) -> dict[str, Any]:
    """KEY.jpg, KEY.txt and KEY.json with the fields that img2dataset writes; a change to None leaves a member out."""
    key = f"{number:09d}"
    metadata = {"caption": f"photo {number}", "url": f"https://example.org/{number}.jpg", "key": key, "status": "success", "width": 12}
    sample = {"__key__": key, "jpg": picture(number), "txt": f"photo {number}", "json": json.dumps(metadata), **changes}
    return {part: value for part, value in sample.items() if value is not None}


def token_sample(number: int, codes: Any = None, views: int = 2, cells: int = 16, **changes: Any) -> dict[str, Any]:
    """KEY.codes.npy (below 100), KEY.txt and KEY.json."""
    if codes is None:
        codes = np.random.default_rng(number).integers(0, 100, (views, cells)).astype(np.uint16)
    buffer = io.BytesIO()
    np.save(buffer, codes)
    return {"__key__": f"{number:09d}", "codes.npy": buffer.getvalue(), "txt": f"photo {number}", "json": "{}", **changes}


def write_tar(path: Path, samples: list[dict[str, Any]]) -> None:
    """With WebDataset's own writer, whose tars carry a pax header with the time before each member."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)


def img2dataset_folder(folder: Path, shards: int = 3, samples: int = 4) -> Path:
    for shard in range(shards):
        write_tar(folder / f"{shard:05d}.tar", [img2dataset_sample(shard * 10_000 + number) for number in range(samples)])
        (folder / f"{shard:05d}_stats.json").write_text("{}")  # lies beside each shard there
    return folder


def token_folder(folder: Path, shards: int = 3, samples: int = 4) -> Path:
    for shard in range(shards):
        write_tar(folder / f"{shard:05d}.tar", [token_sample(shard * 10_000 + number) for number in range(samples)])
    return folder


def upload(folder: Path, target: str) -> str:
    """Copy a folder to another storage."""
    from oar_scale.storage import join, open_storage

    for path in sorted(folder.rglob("*")):
        if path.is_file():
            open_storage(target).upload(str(path), join(target, str(path.relative_to(folder))))
    return target
