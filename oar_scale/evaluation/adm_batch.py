"""ADM's ``.npz`` files (Dhariwal & Nichol 2021), in which sets of images and the statistics of their features are exchanged.

    arr_0                uint8 [N, H, W, 3]: images
    mu, sigma            of InceptionV3's pooled features, [2048] and [2048, 2048]
    mu_s, sigma_s        of its spatial features

A reference batch of theirs has all five, the statistics being those of more images than arr_0 has. The statistics that we write have the
same names, and ``count`` and ``extractor`` beside them. Images are read where they lie in the file, a few at a time; nothing is unpickled.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oar_scale.data.scan import npy_header
from oar_scale.data.tars import map_file
from oar_scale.errors import UserError
from oar_scale.evaluation.distances import Matrix, check_covariance
from oar_scale.evaluation.moments import Moments
from oar_scale.storage import open_storage

Pixels = NDArray[np.uint8]
STATISTICS = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
"""The names under which the statistics of a layer are stored."""
IMAGES = "arr_0"
MAX_FEATURES = 16_384
"""A covariance matrix of more features is not read: 2 GB."""
_LOCAL_HEADER = 30


@dataclass(frozen=True)
class Batch:
    """The images of a file."""

    path: str
    shape: tuple[int, int, int, int]
    offset: int
    """Where the first pixel lies."""
    crc32: int
    """Of the array, as the file states it."""

    def rows(self, start: int, stop: int) -> Pixels:
        """Some images, uint8 [n, H, W, 3]."""
        size = int(np.prod(self.shape[1:]))
        data = map_file(self.path)[self.offset + start * size : self.offset + stop * size]
        return np.frombuffer(data, dtype=np.uint8).reshape(-1, *self.shape[1:])


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of the layers of a set of images that may not be at hand."""

    layers: dict[str, tuple[Matrix, Matrix]]
    count: int | None
    """Of the images; None where the file does not say."""
    extractor: str | None
    """The id of the extractor; None in a file of ADM's."""


def read_batch(path: str) -> Batch | None:
    """The images of an ``.npz``; None where it has none.

    Raises:
        UserError: no such file, a damaged one, or an ``arr_0`` that is no array of images.
    """
    with _opened(path) as archive:
        name = f"{IMAGES}.npy"
        if name not in archive.namelist():
            return None
        member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED:
        raise UserError(f"{path}: {IMAGES} is compressed, and is read where it lies. Write the file again with np.savez.")
    data = map_file(path)
    try:
        name_bytes, extra = struct.unpack("<HH", data[member.header_offset + 26 : member.header_offset + _LOCAL_HEADER])
        start = member.header_offset + _LOCAL_HEADER + name_bytes + extra
        shape, dtype, columns_first, begins = npy_header(data[start : start + member.file_size])
    except (struct.error, ValueError) as error:
        raise UserError(f"{path}: {IMAGES} cannot be read ({error}). Copy the file again.") from error
    if dtype not in ("|u1", "u1") or len(shape) != 4 or shape[3] != 3 or columns_first or not all(shape):
        raise UserError(f"{path}: {IMAGES} is {dtype} {list(shape)}, and images are uint8 [N, height, width, 3]")
    if begins + int(np.prod(shape, dtype=object)) != member.file_size or start + member.file_size > len(data):
        raise UserError(f"{path}: {IMAGES} says {list(shape)}, and the file has {member.file_size} bytes of it: it was cut. Copy it again.")
    return Batch(path, (shape[0], shape[1], shape[2], 3), start + begins, member.CRC)


def read_statistics(path: str) -> Statistics | None:
    """The statistics of an ``.npz``; None where it has none.

    Raises:
        UserError: no such file, a damaged one, or arrays that are no mean and covariance.
    """
    with _opened(path) as archive:
        if not {"mu.npy", "sigma.npy"} <= set(archive.namelist()):
            return None
    layers = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for layer, (mean, covariance) in STATISTICS.items():
                if mean in arrays.files and covariance in arrays.files:
                    layers[layer] = _checked(np.asarray(arrays[mean]), np.asarray(arrays[covariance]))
            count = int(arrays["count"]) if "count" in arrays.files else None
            extractor = str(arrays["extractor"]) if "extractor" in arrays.files else None
    except (ValueError, TypeError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: its statistics cannot be read ({error})") from error
    return Statistics(layers, count, extractor)


def write_statistics(uri: str, moments: dict[str, Moments], extractor: str) -> None:
    """Write the statistics of the layers of a set of images, atomically; ADM's own evaluation reads them."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for layer, (mean, covariance) in STATISTICS.items():
        if layer in moments:
            arrays |= {mean: moments[layer].mean_D, covariance: moments[layer].covariance_DD}
    arrays |= {"count": np.array(moments["pooled"].count), "extractor": np.array(extractor)}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # the names are never one of its options
    open_storage(uri).write(uri, buffer.getvalue())


def write_batch(uri: str, images: Iterable[Pixels], count: int, side: tuple[int, int]) -> None:
    """Write images as ``arr_0``, one at a time, atomically.

    Args:
        images: uint8 [H, W, 3], ``count`` of them.
        side: their H and W.

    Raises:
        UserError: an image of another size, or another number of images; nothing is written then.
    """
    written = 0
    with open_storage(uri).create(uri) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo(f"{IMAGES}.npy"), "w", force_zip64=True) as array:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *side, 3)}
            np.lib.format.write_array_header_1_0(array, header)
            for pixels in images:
                if pixels.shape != (*side, 3):
                    raise UserError(
                        f"image {written} is {pixels.shape[1]} x {pixels.shape[0]}, the first is {side[1]} x {side[0]}: --size N"
                    )
                array.write(np.ascontiguousarray(pixels).tobytes())
                written += 1
        if written != count:
            raise UserError(f"{written} images came instead of {count}: the set changed while it was read. Try again.")


def _opened(path: str) -> zipfile.ZipFile:
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file. An .npz is read from a local disk: copy it there.")
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UserError(f"{path}: not an .npz, or not all of it ({error}). Copy it again.") from error


def _checked(mean: NDArray[np.generic], covariance: NDArray[np.generic]) -> tuple[Matrix, Matrix]:
    if mean.size > MAX_FEATURES:
        raise ValueError(f"{mean.size} features, at most {MAX_FEATURES} are read")
    mean_D, covariance_DD = mean.astype(np.float64), covariance.astype(np.float64)
    check_covariance(mean_D, covariance_DD)
    return mean_D, covariance_DD
