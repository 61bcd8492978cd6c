"""The members of a tar that lies in memory, found without copying a byte of their content.

A tar is a chain: each 512-byte header says how long its file is, and so where the next header begins.

    | header | file, padded to 512 | header | file ... | header of zeros |
      name[0:100] size[124:136] checksum[148:156] type[156] magic[257:265] prefix[345:500]

Why not ``tarfile``: it makes an object of every header, one at a time, and it reads on after faults that a shard should be refused
for. Here the archive is checked while its headers are followed, in two ways:

    fast   nearly all members of nearly all shards are plain: a regular file with an octal size. Those are followed in one tight loop,
           a few thousand headers at a time, and their checksums are compared in one NumPy call (:func:`_plain_run`, :func:`_verified`)
    slow   any other header goes through the rules below, one at a time (:func:`_entry`)

The fast way only accepts; whatever it does not recognise, a fault included, is left to the slow way, which names it. Rules:

    pax headers (x), GNU long names (L)   applied to the member that follows; a size in a global header (g) is refused
    sizes in base 256                     read; negative ones are refused
    folders, links, devices, pipes        skipped
    sparse files, split volumes           refused
    names that leave the archive          refused ("../x", "/etc/x"): nothing is written by name here, but somebody might
    no zero header at the end             refused: the file was cut, or it was never finished
    anything but zeros after it           refused: two tars were put together, and all readers would miss the second

Names are UTF-8; bytes that are not come as lone surrogates (``surrogateescape``), so that no two names fall together. Show
such a name with ``repr``.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from oar_scale.errors import UserError

BLOCK = 512


class Member(NamedTuple):
    """A regular file of the archive."""

    name: str
    offset: int
    """Where its content begins, in bytes."""
    size: int


@dataclass(frozen=True)
class TarLimits:
    """Limits of a shard's headers. They are far above any shard meant for training; a tar above them is a mistake or an attack."""

    max_members: int = 2_000_000
    max_member_bytes: int = 1 << 30
    max_total_bytes: int = 64 << 30


LIMITS = TarLimits()

_HEADER = Struct("<124x11sB20xB188xB")  # digits of the size, the byte after them, type, first byte of the prefix
_CHUNK = 4096
_FILE, _OLD_FILE, _CONTIGUOUS = ord("0"), 0, ord("7")
_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK = ord("x"), ord("g"), ord("L"), ord("K")
_DESCRIBING = frozenset({_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK})
_HARD_LINK, _SPACE = ord("1"), ord(" ")
_NO_DATA = frozenset(b"23456")
"""Symbolic link, devices, folder, pipe."""
_REFUSED = {ord("S"): "a sparse file", ord("M"): "a file split over volumes", ord("X"): "an old Solaris header"}
_MAX_EXTRA = 1 << 20
"""Bytes of a pax header or a long name."""
_PAX_RECORD = re.compile(rb"(\d{1,8}) ([^=]+)=")
_ZEROS = bytes(BLOCK)


Run = tuple[list[str], list[int], list[int]]
"""Names, offsets and sizes of members that follow each other."""


class _Fault(Exception):
    """The fault of an entry; the caller adds the name of the tar and of the member before it."""


def members(data: memoryview, where: str, limits: TarLimits = LIMITS) -> Iterator[Member]:
    """The regular files of a tar, in its order.

    Args:
        data: the whole tar, one byte an item.
        where: names the tar in errors.

    Raises:
        UserError: broken, truncated, compressed or hostile; names the tar, the position and the member.
    """
    for run in runs(data, where, limits):
        yield from map(Member, *run)


def map_file(path: str) -> memoryview:
    """The content of a local file without reading it into memory; mapped as long as the view, or a part of it, is in use.

    A pipe or device counts as empty. Raises UserError where the file cannot be read.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:  # a pipe would wait for a writer
            empty = os.fstat(file.fileno()).st_size == 0  # which cannot be mapped
            return memoryview(b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({os.strerror(error.errno or 0)})") from error


def runs(data: memoryview, where: str, limits: TarLimits = LIMITS) -> Iterator[Run]:
    """The members of a tar in runs of a bounded number: fast ones, and single members from slow entries. Raises as :func:`members`."""
    if len(data) > limits.max_total_bytes:
        raise UserError(f"{where}: {len(data)} bytes, the limit for a shard is {limits.max_total_bytes}. Write smaller shards.")
    count, at, last = 0, 0, ""
    while True:
        run, at = _plain_run(data, at)
        count += len(run[0])
        if count > limits.max_members:
            raise UserError(f"{where}: more than {limits.max_members} members. Write smaller shards.")
        yield _checked(run, where, limits)
        last = run[0][-1] if run[0] else last
        try:
            entry, at = _entry(data, at)
        except _Fault as fault:
            after = f" after member {last!r}" if last else ""
            raise UserError(f"{where}: truncated or broken tar{after}: {fault}. Write or copy the shard again.") from None
        if entry is _END:
            return
        if isinstance(entry, Member):
            yield _checked(([entry.name], [entry.offset], [entry.size]), where, limits)
            count, last = count + 1, entry.name


def _checked(run: Run, where: str, limits: TarLimits) -> Run:
    """The run itself, after a check that all names stay inside the archive and no size is above the limit."""
    names, _, sizes = run
    if max(sizes, default=0) > limits.max_member_bytes:
        name = names[sizes.index(max(sizes))]
        raise UserError(f"{where}: member {name!r} has {max(sizes)} bytes, the limit is {limits.max_member_bytes}. This is no sample.")
    together = "\0" + "\0".join(names)
    if "\0/" in together or ".." in together:  # one search for all names; only where it hits, one by one
        for name in names:
            if name.startswith("/") or ".." in name.split("/"):
                raise UserError(f"{where}: member {name!r} points out of the archive. Do not trust this tar; write it with relative names.")
    return run


def _plain_run(data: memoryview, at: int) -> tuple[Run, int]:
    """Follow plain members from byte ``at``, at most a chunk of them; returns them and where the next other header lies.

    Pax headers that change neither name nor size (WebDataset's writer puts one with the time before each member) are passed over.
    The sizes read here are provisional: :func:`_verified` keeps the members up to the first header whose checksum does not match.
    """
    total, unpack = len(data) - BLOCK, _HEADER.unpack_from
    headers: list[int] = []
    sizes: list[int] = []
    while at <= total and len(headers) < _CHUNK:
        digits, end, kind, prefix = unpack(data, at)
        if prefix or end > _SPACE or (kind != _FILE and kind != _PAX):
            break
        try:
            size = int(digits, 8)
        except ValueError:
            break
        following = at + BLOCK + (size + 511 & -512)
        if size < 0 or following > total + BLOCK:
            break
        if kind == _PAX and (size > _MAX_EXTRA or _changes_name_or_size(data[at + BLOCK : following].tobytes())):
            break
        headers.append(at)
        sizes.append(size)
        at = following
    return _verified(data, headers, sizes, at)


def _verified(data: memoryview, headers: list[int], sizes: list[int], at: int) -> tuple[Run, int]:
    """The files among these headers, up to the first header that is invalid, and where that one lies; ``at`` if all are valid."""
    blocks = np.frombuffer(data[: len(data) // BLOCK * BLOCK], dtype=np.uint8).reshape(-1, BLOCK)
    at_H = np.array(headers, dtype=np.int64)
    rows_H512 = blocks[at_H // BLOCK]
    digits_H11 = rows_H512[:, 124:135]
    octal_H = (((digits_H11 >= ord("0")) & (digits_H11 < ord("8"))) | (digits_H11 == ord(" "))).all(axis=1)  # int() accepts "1_0", too
    octal_H &= (rows_H512[:, 135] == 0) | (rows_H512[:, 135] == ord(" "))
    good_H = octal_H & _usual_checksums(rows_H512)
    # Checksums in a rarer form are compared one by one; the first header that fails ends the run.
    good = len(headers)
    for row in np.flatnonzero(~good_H).tolist():
        if not octal_H[row] or not _checksum_fits(data, headers[row]):
            good, at = row, headers[row]
            break
    files = np.flatnonzero(rows_H512[:good, 156] == _FILE)
    names = [name.partition(b"\0")[0] for name in rows_H512[files, :100].reshape(-1).view("S100").tolist()]
    text = b"\0".join(names).decode("utf-8", "surrogateescape").split("\0") if names else []
    return (text, (at_H[files] + BLOCK).tolist(), np.array(sizes, dtype=np.int64)[files].tolist()), at


def _entry(data: memoryview, at: int) -> tuple[Member | object, int]:
    """One member of any kind with all headers that belong to it; ``_END`` at the end, ``_SKIPPED`` for what is no regular file."""
    name: bytes | None = None
    size: int | None = None
    while True:
        header = data[at : at + BLOCK].tobytes()
        if header == _ZEROS:  # the end; readers stop at the first block of zeros
            if name is not None or size is not None:
                raise _Fault(f"a long name or size without its file at byte {at}")
            _check_end(data, at)
            return _END, at
        _require_header(data, at)
        kind, stored = header[156], _number(header[124:136], at)
        if kind in _REFUSED:
            raise _Fault(f"{_REFUSED[kind]} ({_text(header[:100])!r}) at byte {at} cannot be used as a sample")
        if kind not in _DESCRIBING:
            return _file(data, at, kind, header, name, stored if size is None else size)
        new_name, new_size, at = _description(data, at, kind, stored)
        if (new_name is not None and name is not None) or (new_size is not None and size is not None):
            raise _Fault(f"two long names or sizes for one file before byte {at}")
        name, size = new_name if name is None else name, new_size if size is None else size


def _description(data: memoryview, at: int, kind: int, size: int) -> tuple[bytes | None, int | None, int]:
    """The next member's name and size from the header at ``at``, and the offset of the next header."""
    content = at + BLOCK
    following = content + (size + 511 & -512)
    if size > _MAX_EXTRA or following > len(data):
        raise _Fault(f"a header of {size} bytes at byte {at}")
    padded = data[content:following].tobytes()
    if kind == _LONG_LINK:
        return None, None, following
    if kind == _LONG_NAME:
        name = padded.partition(b"\0")[0]
        if len(name) > size:
            raise _Fault(f"a long name that is longer than it says at byte {at}")
        return name, None, following
    if not _changes_name_or_size(padded):
        return None, None, following
    name_size = _read_pax(padded, size, at)
    if kind == _PAX_GLOBAL and name_size != (None, None):
        raise _Fault(f"a name or size for all files at byte {at}")
    return *name_size, following


def _file(data: memoryview, at: int, kind: int, header: bytes, name: bytes | None, size: int) -> tuple[Member | object, int]:
    """The entry whose own header lies at ``at``, with the name and size that are known by now."""
    short, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    folder = kind in _NO_DATA or (kind == _OLD_FILE and short.endswith(b"/"))
    if header[345]:
        if not header[257:].startswith(b"ustar\0"):
            raise _Fault(f"a header of an unknown kind at byte {at}")
        short = prefix + b"/" + short
    full = _text(short if name is None else name)
    if kind == _HARD_LINK:
        if size:
            raise _Fault(f"a hard link with content ({full!r}) at byte {at}")
        folder = True
    content = at + BLOCK
    if folder:
        return _SKIPPED, content
    following = content + (size + 511 & -512)
    if following > len(data):
        raise _Fault(f"{full!r} has {size} bytes by its header at byte {at}, the file has {len(data) - content} more")
    if kind not in (_FILE, _OLD_FILE, _CONTIGUOUS):
        return _SKIPPED, following
    return Member(full, content, size), following


_END, _SKIPPED = object(), object()


def _check_end(data: memoryview, at: int) -> None:
    """Raise a fault unless only zeros follow the end of the archive."""
    for start in range(at, len(data), 1 << 20):
        if np.frombuffer(data[start : start + (1 << 20)], dtype=np.uint8).any():
            raise _Fault(f"the archive ends at byte {at}, and more follows that no reader would see (two tars in one file?)")


def _changes_name_or_size(pax: bytes) -> bool:
    """Whether a pax header may override the name or the size of its member (a quick search; :func:`_read_pax` decides)."""
    return b"path=" in pax or b"size=" in pax or b"GNU.sparse" in pax


def _read_pax(pax: bytes, size: int, at: int) -> tuple[bytes | None, int | None]:
    """Name and size in a pax header: records of ``LENGTH KEY=VALUE\\n``, the length in bytes and of all of the record."""
    records: dict[bytes, bytes] = {}
    start = 0
    while start < size:  # only records that are exact: readers disagree about the others, and would disagree about the members
        record = _PAX_RECORD.match(pax, start)
        end = start + int(record[1]) if record else 0
        if record is None or end > size or end <= record.end() or pax[end - 1] != ord("\n"):
            raise _Fault(f"a broken pax header at byte {at}")
        if record[2] in records or record[2].startswith(b"GNU.sparse"):
            raise _Fault(f"a pax header with {_text(record[2])!r} at byte {at}")
        records[record[2]] = pax[record.end() : end - 1]
        start = end
    if pax[size:].strip(b"\0"):
        raise _Fault(f"a pax header longer than it says at byte {at}")
    name, digits = records.get(b"path"), records.get(b"size")
    if (name is not None and b"\0" in name) or (digits is not None and not (digits.isdigit() and len(digits) < 20)):
        raise _Fault(f"a pax header with an impossible name or size at byte {at}")
    return None if name is None else name.rstrip(b"/"), None if digits is None else int(digits)


def _text(name: bytes) -> str:
    """A name up to its first zero byte; bytes that are not UTF-8 become lone surrogates."""
    return name.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _number(field: bytes, at: int) -> int:
    """A size: octal digits, or, from a first byte of 0x80, a big number in base 256."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    if not re.fullmatch(rb"[0-7]*", digits):
        raise _Fault(f"a size that is no number, or a negative one, at byte {at}")
    return int(digits or b"0", 8)


def _usual_checksums(rows_H512: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which headers carry the sum of their bytes as six octal digits, as nearly all do; the eight bytes of the sum count as spaces."""
    stored_H8 = rows_H512[:, 148:156]
    actual_H = rows_H512.sum(axis=1, dtype=np.uint32) - stored_H8.sum(axis=1, dtype=np.uint32) + 8 * ord(" ")
    digits_H6 = stored_H8[:, :6] - np.uint8(ord("0"))  # what is below "0" wraps to something large
    claimed_H = digits_H6 @ (8 ** np.arange(5, -1, -1))
    usual_H: NDArray[np.bool_] = (digits_H6 < 8).all(axis=1) & (stored_H8[:, 6] == 0) & (claimed_H == actual_H)
    return usual_H


def _checksum_fits(data: memoryview, at: int) -> bool:
    """Whether a header carries its sum in any form; some old writers summed signed bytes."""
    header = data[at : at + BLOCK].tobytes()
    digits = header[148:156].partition(b"\0")[0].strip(b" ")
    plain = header[:148] + b" " * 8 + header[156:]
    sums = (sum(plain), sum(byte - 256 if byte > 127 else byte for byte in plain))
    return re.fullmatch(rb"[0-7]+", digits) is not None and int(digits, 8) in sums


def _require_header(data: memoryview, at: int) -> None:
    """Raise a fault unless a header with a matching checksum begins at byte ``at``; the fault names what is there instead."""
    if len(data) < at + BLOCK:
        raise _Fault(f"it ends at byte {len(data)} without the zero block of a finished tar" if len(data) else "it is empty")
    if not _checksum_fits(data, at):
        if at == 0 and data[:2].tobytes() in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5"):
            raise _Fault("it is compressed; unpack it (pictures do not get smaller)")
        raise _Fault(f"no header at byte {at} (wrong checksum)" if at else "it does not begin with the header of a tar")
