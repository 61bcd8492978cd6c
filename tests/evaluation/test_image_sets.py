"""Sets of images as they lie: a folder, shards, an .npz; the same images are the same set of pixels, and any other byte another set."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from oar_scale.data.manifest import Manifest, write_manifest
from oar_scale.data.shards import shard_name, write_shard
from oar_scale.errors import UserError
from oar_scale.evaluation import image_sets
from oar_scale.evaluation.adm_batch import write_batch
from oar_scale.evaluation.image_sets import ImageSet, SetImage, find_images
from oar_scale.generation.picture_files import DrawingRecord, encode_png
from oar_scale.generation.settings import SampleSettings

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3), dtype=np.uint8)


def png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def folder_of_images(folder: Path) -> Path:
    folder.mkdir()
    for index, pixels in enumerate(PIXELS):
        (folder / f"{index}.png").write_bytes(png(pixels))
    (folder / "3.txt").write_text("a cat\n")
    return folder


def folder_of_shards(folder: Path, *, manifest: bool = False) -> Path:
    samples = [{"__key__": f"{index}", "png": png(pixels), "txt": f"picture {index}"} for index, pixels in enumerate(PIXELS)]
    shards = [write_shard(str(folder), shard_name(number), samples[3 * number : 3 * number + 3]) for number in range(2)]
    if manifest:
        write_manifest(str(folder), Manifest(shards=tuple(shards)))
    return folder


def batch(path: Path) -> Path:
    write_batch(str(path), iter(PIXELS), 5, (6, 6))
    return path


def read(images: ImageSet) -> list[SetImage]:
    return [image for part in images.parts for image in images.read(part)]


def test_a_drawing_says_its_caption_and_a_text_beside_it_says_more(tmp_path: Path) -> None:
    """The text beside a picture is part of the set: another one is another set."""
    settings = SampleSettings(guidance=1, temperature=1, top_k=0, order_temperature=0)
    record = DrawingRecord(prompt="a red apple", seed=0, number=0, model="a" * 16, order="halton", settings=settings, grid=2, size=(6, 6))
    for name, drawn in (("drawn.png", record), ("label.png", record.model_copy(update={"prompt": 7})), ("plain.png", None)):
        (tmp_path / name).write_bytes(encode_png(Image.fromarray(PIXELS[0]), drawn))
    before = find_images(str(tmp_path))
    assert [(image.key, image.caption) for image in read(before)] == [("drawn", "a red apple"), ("label", None), ("plain", None)]
    (tmp_path / "drawn.txt").write_text("a green apple\n")
    after = find_images(str(tmp_path))
    assert read(after)[0].caption == "a green apple" and after.fingerprint != before.fingerprint


def test_images_are_the_same_wherever_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_sets, "PART_IMAGES", 2)
    places = [folder_of_images(tmp_path / "a"), folder_of_shards(tmp_path / "b"), batch(tmp_path / "c.npz")]
    sets = [find_images(str(place)) for place in places]
    for images, parts in zip(sets, (3, 2, 3), strict=True):
        assert len(images.parts) == parts
        np.testing.assert_array_equal(np.stack([image.pixels for image in read(images)]), PIXELS)
    assert [image.caption for image in read(sets[0])] == [None, None, None, "a cat", None]
    assert [image.caption for image in read(sets[1])] == [f"picture {index}" for index in range(5)]


def test_another_byte_is_another_set(tmp_path: Path) -> None:
    changed = PIXELS.copy()
    changed[4, 5, 5, 2] ^= 1
    for make in (folder_of_images, folder_of_shards, lambda folder: batch(folder.with_suffix(".npz"))):
        place = make(tmp_path / make.__name__.strip("<>"))
        before = find_images(str(place))
        assert find_images(str(place)).fingerprint == before.fingerprint
        assert find_images(str(place), size=4).fingerprint != before.fingerprint
        if place.suffix:
            write_batch(str(place), iter(changed), 5, (6, 6))
        elif (place / "4.png").exists():
            (place / "4.png").write_bytes(png(changed[4]))
        else:
            write_shard(str(place), shard_name(1), [{"__key__": "4", "png": png(changed[4])}])
        assert find_images(str(place)).fingerprint != before.fingerprint


def test_a_manifest_says_which_shards_belong_to_a_set(tmp_path: Path) -> None:
    place = folder_of_shards(tmp_path / "shards", manifest=True)
    (place / "99999.tar").write_bytes(b"of somebody else")
    images = find_images(str(place))
    assert [part.name for part in images.parts] == ["00000.tar", "00001.tar"] and len(read(images)) == 5


def test_a_shard_that_is_not_its_manifests_is_named(tmp_path: Path) -> None:
    """Of another size before features of what was there would be taken for its own; of the same size when it is read."""
    place = folder_of_shards(tmp_path / "shards", manifest=True)
    images, tar = find_images(str(place)), place / "00001.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(b"picture 4")] ^= 1
    tar.write_bytes(data)
    with pytest.raises(UserError, match=r"00001\.tar: not the bytes that manifest\.json states.* oar data index .*shards --force"):
        read(images)
    tar.write_bytes(data + bytes(512))
    with pytest.raises(UserError, match=r"00001\.tar: not the bytes that manifest\.json states"):
        find_images(str(place))


def test_images_are_brought_to_their_middle_square(tmp_path: Path) -> None:
    (tmp_path / "wide.png").write_bytes(png(np.concatenate([PIXELS[0], PIXELS[1], PIXELS[2]], axis=1)))
    [image] = read(find_images(str(tmp_path), size=6))
    np.testing.assert_array_equal(image.pixels, PIXELS[1])


def test_a_place_without_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    np.savez(tmp_path / "other.npz", labels=np.zeros(3))
    with pytest.raises(UserError, match=r"holds no images .* and no shards"):
        find_images(str(tmp_path))
    with pytest.raises(UserError, match="nowhere: no such folder"):
        find_images(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"other\.npz: holds no images \(no arr_0\)"):
        find_images(str(tmp_path / "other.npz"))


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    folder = folder_of_images(tmp_path / "a")
    (folder / "2.png").write_bytes(png(PIXELS[2])[:40])
    with pytest.raises(UserError, match=r"a/2\.png cannot be read"):
        read(find_images(str(folder)))
