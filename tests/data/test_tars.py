"""Tars as others write them, and as an attacker would: the same members as Python's own tarfile, or one clear error.

Fuzzing: each run of the suite tries 300 mutated tars and 100 random byte strings. ``OAR_FUZZ=200000 pytest
tests/data/test_tars.py -k fuzz`` tries that many of the first kind and a third of it of the second; 200,000 + 66,666 passed.
"""

from __future__ import annotations

import cProfile
import io
import os
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from oar_scale.data.tar_samples import samples
from oar_scale.data.tars import Member, TarLimits, members
from oar_scale.errors import UserError

FUZZ = int(os.environ.get("OAR_FUZZ", "300"))
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
fuzz = settings(max_examples=FUZZ, deadline=None, suppress_health_check=list(HealthCheck))


def tar(files: list[tuple[str, bytes]], kind: str = "ustar", change: Callable[[tarfile.TarInfo], None] = lambda info: None) -> bytes:
    """A tar of these files, written by Python's tarfile."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[kind], encoding="utf-8", errors="surrogateescape") as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            change(info)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def ours(data: bytes) -> list[Member]:
    return list(members(memoryview(data), "x.tar"))


def standard(data: bytes) -> list[tuple[str, int, int]] | None:
    """What tarfile finds; None where it raises, stops before the archive's end, or finds a file that is cut or sparse."""
    entries = []
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
            for count, info in enumerate(archive):
                if count > len(data) // 512:  # this version of tarfile can run in circles
                    return None
                if info.isfile():
                    entries.append((info.name, info.offset_data, info.size))
                if info.sparse is not None or (info.isfile() and info.offset_data + info.size > len(data)):
                    return None
            end = archive.offset  # type: ignore[attr-defined]
    except (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError, OSError):
        return None
    return entries if data[end : end + 512] == bytes(512) else None


def check(data: bytes) -> bool:
    """Read a tar with both readers; returns whether ours took it."""
    try:
        mine = ours(data)
        keys = [key for key, _ in samples(memoryview(data), "x.tar")]
    except UserError as error:
        assert str(error).startswith("x.tar: ")
        return False
    assert len(keys) <= len(mine)
    assert all(0 <= offset <= offset + size <= len(data) for _, offset, size in mine)
    theirs = standard(data)
    assert theirs is None or [tuple(member) for member in mine] == theirs
    return True


names = st.one_of(
    st.sampled_from(["a.jpg", "a.txt", "b/c.d.json", "a", ".b", "é.txt", "x" * 99 + ".txt", "d/" * 70 + "e.txt", "f" * 300 + ".npy"]),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12),
    st.binary(min_size=1, max_size=8).map(lambda raw: raw.replace(b"\0", b"\xff").decode("utf-8", "surrogateescape")),
)
fields = st.sampled_from([(0, 100), (124, 136), (124, 136), (148, 156), (156, 157), (156, 157), (257, 265), (345, 350)])
values = st.one_of(
    st.sampled_from(
        [b"0", b"7", b"x", b"g", b"L", b"K", b"S", b"1", b"5", b"\0", b"-0000000001", b"\x80" + bytes(10) + b"\x07", b"\xff" * 12]
    ),
    st.sampled_from(
        [b"00000001_00", b"77777777777\0", b"        12 ", b"../../etc/x.txt\0", b"ustar  \0", b"000000000012", b"9", b"12\0garbage"]
    ),
    st.binary(max_size=12),
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A tar of a few files, folders and links, with headers overwritten (checksums fixed or not), blocks moved, ends cut."""
    kind = draw(st.sampled_from(sorted(FORMATS)))

    def change(info: tarfile.TarInfo) -> None:
        info.mtime = draw(st.sampled_from([0, 1.5]))
        kinds = [tarfile.REGTYPE] * 6 + [tarfile.AREGTYPE, tarfile.CONTTYPE]
        info.type = draw(st.sampled_from(kinds if info.size else [*kinds, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE]))
        info.linkname = "there" if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
        info.pax_headers = draw(st.sampled_from([{}, {}, {"comment": "path=x"}, {"linkpath": "y"}, {"size": "3"}])) if kind == "pax" else {}

    files = draw(st.lists(st.tuples(names, st.sampled_from([b"", b"12 path=a\n", b"x" * 511, b"x" * 513])), max_size=4))
    try:
        data = bytearray(tar(files, kind, change))
    except (ValueError, UnicodeError):  # a name that this format cannot hold
        data = bytearray(tar([("a.txt", b"a")]))
    for _ in range(draw(st.integers(0, 3))):
        block = 512 * draw(st.integers(0, max(0, len(data) // 512 - 18)))
        action = draw(st.sampled_from(["field", "field", "field", "byte", "move", "cut", "drop"]))
        if action == "field":
            (start, end), value = draw(fields), draw(values)
            data[block + start : block + end] = value[: end - start].ljust(end - start, b"\0")
            if draw(st.booleans()):
                total = sum(data[block : block + 512]) - sum(data[block + 148 : block + 156]) + 256
                data[block + 148 : block + 156] = b"%06o\0 " % total
        elif action == "byte" and data:
            data[draw(st.integers(0, len(data) - 1))] ^= draw(st.integers(1, 255))
        elif action == "move":
            at = 512 * draw(st.integers(0, len(data) // 512))
            data[at:at] = data[block : block + 512]
        elif action == "drop":
            del data[block : block + 512]
        else:
            del data[draw(st.integers(0, len(data))) :]
    return bytes(data)


@fuzz
@given(mutated())
def test_fuzzed_tars_are_read_as_tarfile_does_or_refused(data: bytes) -> None:
    """Fuzz mutated tars are read as tarfile reads them or refused."""
    check(data)


@settings(fuzz, max_examples=FUZZ // 3)
@given(st.binary(max_size=3000))
@example(b"")
@example(bytes(512))
@example(b"\xff" * 2048)
def test_fuzz_random_bytes_are_no_tar(data: bytes) -> None:
    taken = check(data)
    assert not taken or data[:512] == bytes(512)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_members_of_tarfile(kind: str) -> None:
    files = [(f"d/{'n' * (i if kind == 'ustar' else 3 * i)}{i}.Txt", bytes([i]) * (i * 37)) for i in range(60)]
    data = tar(
        [*files, ("größe.txt", b"1"), ("b\udcffd.txt", b"2")], kind, lambda info: setattr(info, "mtime", 0 if kind == "ustar" else 1.5)
    )
    result = ours(data)
    assert [tuple(member) for member in result] == standard(data)
    assert [data[offset : offset + size] for _, offset, size in result][:60] == [content for _, content in files]


def test_plain_webdataset_finds_the_same_samples(tmp_path: Path) -> None:
    """Keys with folders and dots, extensions in capitals, files that belong to no sample, its own writer's pax headers."""
    names = ["a.b/7.Codes.npy", "a.b/7.txt", "README", "__meta__/x.txt", "8.JPG", "8.json", "c/9.txt", "8.txt", "d/e.txt.x/1.cls", "y."]
    path = tmp_path / "0.tar"
    path.write_bytes(tar([(name, name.encode()) for name in names], "pax", lambda info: setattr(info, "mtime", 1.5)))
    theirs = [
        (sample["__key__"], {part: value for part, value in sample.items() if part[:2] != "__"})
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    mine = [(key, {part: bytes(view) for part, view in sample.items()}) for key, sample in samples(memoryview(path.read_bytes()), "0.tar")]
    assert mine == theirs
    assert [key for key, _ in mine] == ["a.b/7", "8", "c/9", "8", "d/e.txt.x/1", "y"]


def test_what_other_programs_leave_belongs_to_no_sample() -> None:
    junk = ["._a.jpg", ".DS_Store", "__MACOSX/._a.jpg", "__MACOSX/a.txt", "Thumbs.db", "a.jpg~", ".ipynb_checkpoints/a.jpg", "a.jpg.part"]
    names = ["./a.jpg", "._a.jpg", "./a.txt", "b.png", *junk, "b.txt", "c~1.jpg"]
    passed: list[str] = []
    data = memoryview(tar([(name, b"x") for name in names]))
    found = [(key, list(sample)) for key, sample in samples(data, "0.tar", on_passed=passed.append)]
    assert found == [("./a", ["jpg", "txt"]), ("b", ["png", "txt"]), ("c~1", ["jpg"])]
    assert passed == ["._a.jpg", *junk]


def test_a_doubled_member_is_a_fault_of_its_sample_alone() -> None:
    data = memoryview(tar([("a.txt", b"1"), ("a.TXT", b"2"), ("b.txt", b"3")]))
    assert [(key, bytes(sample["txt"]), sample.doubled) for key, sample in samples(data, "0.tar")] == [("a", b"1", "txt"), ("b", b"3", "")]


def typed(kind: bytes, **more: object) -> Callable[[tarfile.TarInfo], None]:
    def change(info: tarfile.TarInfo) -> None:
        info.type = kind
        for name, value in more.items():
            setattr(info, name, value)

    return change


def patched(start: int, value: bytes, content: bytes = b"hello") -> bytes:
    """A tar of one file with bytes of its header replaced, and a checksum that fits."""
    data = bytearray(tar([("victim.txt", content)]))
    data[start : start + len(value)] = value
    data[148:156] = b"%06o\0 " % (sum(data[:512]) - sum(data[148:156]) + 256)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (b"\x1f\x8b" + bytes(600), "compressed"),
        (b"x" * 5000, "does not begin with the header of a tar"),
        (tar([("a.txt", b"a" * 2000), ("b.txt", b"b" * 2000)])[:4200], r"after member 'a.txt': 'b.txt' has 2000 bytes by its header"),
        (tar([("a.txt", b"a")])[:1024], "after member 'a.txt': it ends at byte 1024 without the zero block"),
        (tar([("a.txt", b"a")]) + tar([("b.txt", b"b")]), "two tars in one file"),
        (tar([("../../etc/passwd.txt", b"a")]), r"'../../etc/passwd.txt' points out of the archive"),
        (tar([("/etc/passwd.txt", b"a")]), "'/etc/passwd.txt' points out of the archive"),
        (patched(124, b"-0000000001\0"), "a size that is no number, or a negative one"),
        (patched(124, b"\xff" * 12), "a size that is no number, or a negative one"),
        (patched(124, b"77777777777\0"), r"'victim.txt' has 8589934591 bytes by its header"),
        (patched(124, b"\x80\x7f" + b"\xff" * 10), r"'victim.txt' has \d+ bytes by its header"),
        (patched(156, b"S"), r"a sparse file \('victim.txt'\)"),
        (tar([("a.txt", b"a")], "pax", typed(b"0", pax_headers={"GNU.sparse.major": "1"})), "GNU.sparse.major"),
        (tar([("a.txt", b"a")], "pax", typed(b"0", pax_headers={"size": "99999999"})), r"'a.txt' has 99999999 bytes by its header"),
    ],
)
def test_what_cannot_be_trusted_is_refused_and_named(data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        list(samples(memoryview(data), "s3://b/0.tar"))
    assert str(caught.value).startswith("s3://b/0.tar: ")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_links_and_devices_are_passed_over(kind: bytes) -> None:
    evil = typed(kind, linkname="/etc/" + "p" * 200)
    data = tar([("evil.txt", b""), ("good.txt", b"g")], "gnu", lambda info: evil(info) if info.name == "evil.txt" else None)
    assert [(member.name, member.size) for member in ours(data)] == [("good.txt", 1)]


def test_sizes_in_base_256_are_read() -> None:
    assert ours(patched(124, b"\x80" + bytes(10) + b"\x05")) == [Member("victim.txt", 512, 5)]


def test_a_tar_without_members_has_no_samples() -> None:
    assert list(samples(memoryview(tar([])), "0.tar")) == []


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (TarLimits(max_members=2), "more than 2 members"),
        (TarLimits(max_member_bytes=9), r"member 'k2.txt' has 11 bytes, the limit is 9"),
        (TarLimits(max_total_bytes=1000), "10240 bytes, the limit for a shard is 1000"),
    ],
)
def test_limits_are_kept(limits: TarLimits, message: str) -> None:
    data = tar([(f"k{i}.txt", b"x" * (9 + i)) for i in range(3)])
    with pytest.raises(UserError, match=message):
        list(samples(memoryview(data), "0.tar", limits))


def calls(data: memoryview) -> int:
    """Function calls that it takes to list the members: the same on every machine."""
    profile = cProfile.Profile()
    profile.runcall(lambda: sum(1 for _ in members(data, "0.tar")))
    return sum(entry.callcount for entry in profile.getstats())


def test_members_cost_a_few_calls_and_bytes_each() -> None:
    """Twenty thousand empty members are listed in 4 MB, and twice the members are twice the work: seconds on any machine.

    So are headers with a checksum in a form that few writers use, which is summed byte by byte.
    """
    one = bytearray(tar([("a.txt", b"")])[:512])
    odd = bytearray(one)
    odd[148:156] = one[148:154].lstrip(b"0").rjust(6) + b"\0 "
    for header, part, each in ((one, 5_000, 20), (odd, 1_000, 600)):
        data = memoryview(bytes(header) * 20_000 + bytes(1024))
        tracemalloc.start()
        assert sum(1 for _ in members(data, "0.tar")) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 4e6
        tracemalloc.stop()
        few, twice = (calls(memoryview(bytes(header) * count + bytes(1024))) for count in (part, 2 * part))
        assert few < each * part and twice < 2.1 * few
