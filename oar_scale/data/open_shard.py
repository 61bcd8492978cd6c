"""An open shard: an index of where each sample's members lie in the bytes of the tar; members are decoded when they are read.

    token shards   KEY.codes.npy (uint16 [views, N], raster order)  KEY.txt  KEY.json  [KEY.features.npy (float16 [T, F])]
    image shards   KEY.png|jpg|jpeg|webp                            KEY.txt  KEY.json  [KEY.features.npy]

A class label is ``label`` in ``KEY.json``, or ``KEY.cls``.

Opening reads the headers of the tar (:mod:`oar_scale.data.tar_samples`) and keeps two integers for each member: the byte offsets at which
its content begins and ends. A shard of 10,000 samples is open in milliseconds and takes some hundred kilobytes beside its (mapped) bytes.

A shard or sample that cannot be used raises :class:`UnusableSample`. The stream replaces such samples; every other reader stops.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from oar_scale.data.images import EXTENSIONS, decode_image
from oar_scale.data.labels import label_of, stored_label
from oar_scale.data.scan import npy_header
from oar_scale.data.tar_samples import data_runs, key_and_extension
from oar_scale.data.views import make_view
from oar_scale.errors import UserError
from oar_scale.json_object import JsonObject, parse_object
from oar_scale.text import NotText, decode_text, is_missing
from oar_scale.tokenizers.prompts import Field, Prompt

Codes = NDArray[np.uint16]


class UnusableSample(UserError):
    """A sample, or a whole shard, cannot be used; the message names the shard and, where it is one sample, its key."""


class OpenShard:
    """The S samples of a shard by row (their index in the tar): what image and token shards have in common."""

    def __init__(self, data: memoryview, where: str) -> None:
        """Index a tar.

        Args:
            data: the whole tar.
            where: names the shard in errors.

        Raises:
            UserError: the tar cannot be read.
        """
        self.where = where
        self.keys: list[str] = []
        self._data = data
        self._offsets: dict[str, array[int]] = {}
        """For each extension, two numbers a sample: where its member begins and ends; 0, 0 for none (a member never begins at byte 0)."""
        self._doubled: dict[int, str] = {}
        """Rows of samples with two members of one extension: nobody can say which is meant."""
        for name, offset, size in chain.from_iterable(zip(*run, strict=True) for run in data_runs(data, where)):
            key, extension = key_and_extension(name)
            if not key:
                continue
            if not self.keys or self.keys[-1] != key:
                self.keys.append(key)
            offsets = self._offsets.setdefault(extension, array("q"))
            offsets.extend([0] * (2 * len(self.keys) - 2 - len(offsets)))  # samples before this one without such a member
            if len(offsets) < 2 * len(self.keys):
                offsets.extend((offset, offset + size))
            else:
                self._doubled[len(self.keys) - 1] = extension

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def captions(self) -> list[str]:
        """All captions, by row. Raises UnusableSample where one is missing, or no text."""
        return [self.caption(row) for row in range(len(self))]

    def caption(self, row: int) -> str:
        """The caption of a sample; of one that has a label instead, ``class 3``. Raises UnusableSample where there is none, or no text."""
        data = self.find(row, ("txt",))
        try:
            text = None if data is None else decode_text(data)
        except NotText as error:
            raise self.fault(row, f"cannot be used: its caption {error}") from error
        if text is not None and not is_missing(text):
            return text
        label = self._label(row)
        if is_missing(label):
            raise self.fault(row, "has no .txt" if text is None else "has no caption: its .txt says nothing")
        try:
            return f"class {label_of(label)}"
        except ValueError as error:
            raise self.fault(row, f"cannot be used: no caption, and {error}") from error

    def prompts(self, field: Field) -> list[Prompt]:
        """The prompts of all samples, by row. Raises as :meth:`prompt`."""
        return [self.prompt(row, field) for row in range(len(self))]

    def prompt(self, row: int, field: Field) -> Prompt:
        """The prompt of a sample: its caption, its class label, or features [T, F]. Raises UnusableSample where it has none."""
        if field == "txt":
            return self.caption(row)
        if field == "features":
            return self.array(row, "features.npy")
        try:
            return label_of(self._label(row))
        except ValueError as error:
            raise self.fault(row, f"cannot be used: {error}, and tokenizer.text asks for one (label in its .json, or its .cls)") from error

    def _label(self, row: int) -> object:
        return stored_label(self.metadata(row), self.find(row, ("cls",)))

    def metadata(self, row: int) -> JsonObject:
        """The object in a sample's ``.json``; empty where it has none. Raises UnusableSample where that is something else."""
        try:
            return parse_object(bytes(self.find(row, ("json",)) or b"{}"))
        except ValueError as error:
            raise self.fault(row, f"has a .json that is none ({error})") from error

    def part(self, row: int, extension: str) -> memoryview:
        """The bytes of one member of a sample. Raises UnusableSample where it has none."""
        content = self.find(row, (extension,))
        if content is None:
            raise self.fault(row, f"has no .{extension}")
        return content

    def find(self, row: int, extensions: Sequence[str]) -> memoryview | None:
        """The bytes of the first of these members that a sample has; None where it has none. Raises UnusableSample where one is doubled."""
        if row in self._doubled:
            raise self.fault(row, f"has two members .{self._doubled[row]}; write the shard again with a key for each")
        for extension in extensions:
            offsets = self._offsets.get(extension)
            if offsets is not None and 2 * row + 1 < len(offsets) and offsets[2 * row]:
                return self._data[offsets[2 * row] : offsets[2 * row + 1]]
        return None

    def array(self, row: int, extension: str) -> NDArray[np.generic]:
        """A ``.npy`` member as an array. Raises UnusableSample where there is none, or something else."""
        part = self.part(row, extension)
        try:
            shape, dtype, columns_first, start = npy_header(part)
            # A view of the bytes that are there: memory for the shape that a hostile header claims is never allocated.
            flat: NDArray[np.generic] = np.frombuffer(part[start:], dtype=np.dtype(dtype))
            return flat.reshape(shape, order="F" if columns_first else "C")
        except (ValueError, TypeError) as error:
            raise self.fault(row, f"has a .{extension} that is no array ({error})") from error

    def fault(self, row: int, what: str) -> UnusableSample:
        """The error that a sample cannot be used; ``what`` continues "sample KEY"."""
        return UnusableSample(f"{self.where}: sample {self.keys[row]!r} {what}")


class TokenShard(OpenShard):
    """A shard of codes, uint16 [views, N] a sample.

    Args:
        expected: views and cells that its samples should have; those of others are the bad ones then, also where the first one is.
    """

    def __init__(self, data: memoryview, where: str, expected: tuple[int, int] | None = None) -> None:
        super().__init__(data, where)
        self._expected = expected

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Views and cells of every sample's codes, as the first sample with codes has them. Raises UnusableSample where there are none."""
        return self._first[1]

    def codes(self, row: int, view: int) -> bytes:
        """One view's codes as the bytes of little-endian uint16 [N]: a batch joins them and reads them all at once.

        Raises:
            UnusableSample: the sample has none, or others than the first one with codes has.
        """
        header, (views, cells) = self._first
        data = self.part(row, "codes.npy")
        if len(data) != len(header) + 2 * views * cells or data[: len(header)] != header:
            raise self.fault(row, f"has no codes uint16 {[views, cells]} (views, cells) as the first ones of the shard are")
        start = len(header) + 2 * cells * view
        return bytes(data[start : start + 2 * cells])

    def view(self, number: int) -> Codes:
        """One view's codes of all samples, [S, N]. Raises as :meth:`codes`."""
        joined = b"".join(self.codes(row, number) for row in range(len(self)))
        return np.frombuffer(joined, dtype="<u2").reshape(len(self), self.shape[1])

    @cached_property
    def _first(self) -> tuple[bytes, tuple[int, int]]:
        """The ``.npy`` header of the shard's codes, and their shape (views, cells), as the first sample with (the expected) codes says.

        All samples of a shard have the same header, so reading codes is one comparison of bytes and a slice, without parsing.
        """
        first_fault: UnusableSample | None = None
        other: tuple[bytes, tuple[int, int]] | None = None
        for row in range(len(self)):
            try:
                found = self._layout(row)
            except UnusableSample as fault:  # one bad sample is no fault of those behind it
                first_fault = first_fault or fault
                continue
            if self._expected in (None, found[1]):
                return found
            other = other or found
        if other is not None:
            return other
        raise first_fault or UnusableSample(f"{self.where}: holds no sample")

    def _layout(self, row: int) -> tuple[bytes, tuple[int, int]]:
        """The header and the shape of one sample's codes."""
        data = self.find(row, ("codes.npy",))
        if data is None:
            raise self.fault(row, "has no .codes.npy; is this a folder of token shards?")
        codes = self.array(row, "codes.npy")
        if codes.ndim != 2 or codes.dtype != np.dtype("<u2") or not codes.flags.c_contiguous:
            raise self.fault(row, f"has codes {codes.dtype} {list(codes.shape)} instead of uint16 [views, cells]")
        return bytes(data[: len(data) - codes.nbytes]), (codes.shape[0], codes.shape[1])


class ImageShard(OpenShard):
    """A shard of pictures."""

    def picture(self, row: int) -> Image.Image:
        """A sample's picture. Raises UnusableSample where there is none that can be read."""
        data = self.find(row, EXTENSIONS)
        if data is None:
            raise self.fault(row, f"has no image ({', '.join('.' + extension for extension in EXTENSIONS)})")
        try:
            return decode_image(data, f"{self.where}: image of sample {self.keys[row]!r}")
        except UserError as error:
            raise UnusableSample(str(error)) from error

    def pixels(self, row: int, view: str, size: int) -> NDArray[np.uint8]:
        """One view of a picture, uint8 [size, size, 3]. Raises UnusableSample as :meth:`picture`."""
        return np.asarray(make_view(self.picture(row), view, self.keys[row], size))

    def repeated(self, row: int) -> bool:
        """Whether another sample of the shard has the same key, as where the members of a sample are not next to each other."""
        return self._times[self.keys[row]] > 1

    @cached_property
    def _times(self) -> Counter[str]:
        return Counter(self.keys)
