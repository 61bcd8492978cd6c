"""ADM's files: written so that numpy reads them, read back to the byte, and refused with a reason where they are something else."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from oar_scale.errors import UserError
from oar_scale.evaluation.adm_batch import read_batch, read_statistics, write_batch, write_statistics
from oar_scale.evaluation.moments import Moments

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)


def test_a_batch_is_what_numpy_reads_and_writes(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.npz", tmp_path / "theirs.npz"
    write_batch(str(ours), iter(IMAGES), 7, (4, 5))
    with np.load(ours) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], IMAGES)
    np.savez(theirs, IMAGES)
    for path in (ours, theirs):
        batch = read_batch(str(path))
        assert batch is not None and batch.shape == IMAGES.shape
        np.testing.assert_array_equal(batch.rows(2, 6), IMAGES[2:6])
        assert read_statistics(str(path)) is None


def test_a_batch_is_there_completely_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "batch.npz"
    with pytest.raises(UserError, match="5 images came instead of 7"):
        write_batch(str(path), iter(IMAGES[:5]), 7, (4, 5))
    with pytest.raises(UserError, match="image 1 is 4 x 3, the first is 5 x 4"):
        write_batch(str(path), iter([IMAGES[0], IMAGES[0][:3, :4]]), 2, (4, 5))
    assert not list(tmp_path.iterdir())


def test_statistics_come_back_as_they_were(tmp_path: Path) -> None:
    """And so does a file of ADM's, which says neither how many images nor which network."""
    rng = np.random.default_rng(1)
    moments = {"pooled": Moments.of(rng.normal(size=(40, 6))), "spatial": Moments.of(rng.normal(size=(40, 3)))}
    path = tmp_path / "statistics.npz"
    write_statistics(str(path), moments, "a network")
    found = read_statistics(str(path))
    assert found is not None and (found.count, found.extractor) == (40, "a network")
    for layer, expected in moments.items():
        mean_D, covariance_DD = found.layers[layer]
        assert np.array_equal(mean_D, expected.mean_D) and np.array_equal(covariance_DD, expected.covariance_DD)
    with np.load(path) as arrays:
        np.savez(tmp_path / "adm.npz", arr_0=IMAGES, mu=arrays["mu"], sigma=arrays["sigma"])
    theirs = read_statistics(str(tmp_path / "adm.npz"))
    assert theirs is not None and (theirs.count, theirs.extractor, list(theirs.layers)) == (None, None, ["pooled"])
    assert read_batch(str(tmp_path / "adm.npz")) is not None


def _savez(**arrays: object) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _claims(shape: str) -> bytes:
    """A small array whose header claims another shape."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + b"\0" * 60)
    return buffer.getvalue()


def _compressed() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, IMAGES)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no zip at all", "not an .npz, or not all of it"),
        (_savez(arr_0=IMAGES)[:-30], "not an .npz, or not all of it"),
        (_compressed(), "compressed, and is read where it lies. Write the file again with np.savez"),
        (_savez(arr_0=IMAGES.astype(np.float32)), r"<f4 \[7, 4, 5, 3\], and images are uint8"),
        (_savez(arr_0=IMAGES[..., :1]), r"\[7, 4, 5, 1\], and images are"),
        (_savez(arr_0=IMAGES[:0]), "and images are uint8"),
        (_savez(arr_0=np.array([print, print])), "and images are uint8"),
        (_claims("(9000000000, 256, 256, 3)"), "it was cut"),
        (_claims("(1, 2, 3, 3)"), "it was cut"),
        (_claims("(-1, 2, 3, 3)"), "cannot be read"),
    ],
)
def test_what_is_no_batch_is_named(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "batch.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        read_batch(str(path))
    assert str(path) in str(error.value)


_EYE = np.eye(4)


@pytest.mark.parametrize(
    ("statistics", "says"),
    [
        ((np.zeros(4), np.eye(5)), r"mean \[4\] and covariance \[5, 5\]"),
        ((np.zeros(4), np.full((4, 4), np.nan)), "no numbers"),
        ((np.full(4, np.inf), _EYE), "no numbers"),
        ((np.zeros(4), -_EYE), "its variance is -1"),
        ((np.zeros(4), np.triu(np.ones((4, 4)))), "not symmetric"),
        ((np.array([None] * 4), _EYE), "Object arrays cannot be loaded"),
        ((np.array(["a"] * 4), _EYE), "cannot be read"),
    ],
)
def test_what_are_no_statistics_is_named(statistics: tuple[NDArray[np.generic], NDArray[np.generic]], says: str, tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    np.savez(path, mu=statistics[0], sigma=statistics[1])
    with pytest.raises(UserError, match=says) as error:
        read_statistics(str(path))
    assert str(path) in str(error.value)


def test_a_mean_alone_is_no_statistic(tmp_path: Path) -> None:
    np.savez(tmp_path / "mean.npz", mu=np.zeros(4))
    assert read_statistics(str(tmp_path / "mean.npz")) is None


def test_an_npz_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"s3://bucket/ref.npz: no such file. An .npz is read from a local disk"):
        read_batch("s3://bucket/ref.npz")
