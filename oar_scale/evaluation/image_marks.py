"""Which images of two sets are the same, or belong together: told by hashes of their names, captions and pixels.

    key of cat.png "cat"    a shard's key    the row of an .npz
    caption                 cat.txt, KEY.txt, the prompt in the record of a drawing
    pixels                  as they are compared

Hashes of 64 bits are kept with the features, 24 bytes an image, so that neither is read again.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from oar_scale.errors import UserError
from oar_scale.evaluation.image_sets import SetImage

Marks = NDArray[np.uint64]
"""[n, 3]: key, caption, pixels; a caption of 0 is none."""
Pairing = Literal["caption", "name"]
"""What images of both sets have in common that are about the same thing."""
_COLUMN: dict[Pairing, int] = {"name": 0, "caption": 1}
_PIXELS = 2


def marks_of(images: list[SetImage]) -> Marks:
    """The marks of some images."""
    rows = [
        (
            _hash(image.key.encode()),
            _hash(image.caption.encode()) if image.caption is not None else 0,
            _hash(repr(image.pixels.shape).encode(), image.pixels.tobytes()),
        )
        for image in images
    ]
    return np.array(rows, dtype=np.uint64).reshape(-1, 3)


def repeated(marks_S3: Marks, by: Pairing | None = None) -> int:
    """How many images are, pixel for pixel, the same as another one of their set; or how many have the caption, or name, of another."""
    of_images = marks_S3[:, _PIXELS if by is None else _COLUMN[by]]
    _, counts = np.unique(of_images if by is None else of_images[of_images != 0], return_counts=True)
    return int(counts[counts > 1].sum())


def shared_pixels(samples_S3: Marks, reference_R3: Marks) -> int:
    """How many samples are, pixel for pixel, images of the reference."""
    return int(np.isin(samples_S3[:, _PIXELS], reference_R3[:, _PIXELS]).sum())


def shared(samples_S3: Marks, reference_R3: Marks, by: Pairing) -> int:
    """How many samples have the caption, or the name, of some image of the reference."""
    own_S = samples_S3[:, _COLUMN[by]]
    return int((np.isin(own_S, reference_R3[:, _COLUMN[by]]) & (own_S != 0)).sum())


def groups(samples: tuple[str, Marks], reference: tuple[str, Marks], by: Pairing) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each image of both sets the number of its caption or name.

    Args:
        samples, reference: where the set lies, and its marks.

    Raises:
        UserError: images without a caption, or sets that have none in common.
    """
    for where, marks in (samples, reference):
        if without := int((marks[:, _COLUMN[by]] == 0).sum()):
            raise UserError(
                f"--paired {by}: {without} of {len(marks)} images of {where} have no caption (cat.txt beside cat.png, KEY.txt in "
                "shards, or the record of oar sample). Images of the same name: --paired name."
            )
    if not shared(samples[1], reference[1], by):
        raise UserError(f"--paired {by}: {samples[0]} and {reference[0]} have no {by} in common")
    together = np.concatenate([marks[:, _COLUMN[by]] for _, marks in (samples, reference)])
    _, numbers = np.unique(together, return_inverse=True)
    return numbers[: len(samples[1])], numbers[len(samples[1]) :]


def _hash(*data: bytes) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for each in data:
        digest.update(each)
    return int.from_bytes(digest.digest()) or 1
