"""Pictures from strangers: read if they are pictures of a bearable size, refused before they are decoded if not."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from foreign_shards import bomb, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from oar_scale.data.images import MAX_PIXELS, decode_image, image_size, on_white, upright
from oar_scale.errors import UserError


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_of_the_three_formats_are_read(kind: str) -> None:
    data = picture(0, (12, 8), kind)
    image = decode_image(memoryview(data), "x")
    assert (image.size, image.mode, image_size(data, "x")) == ((12, 8), "RGB", (12, 8))
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("size", [(9000, 9000), (20_000, 20_000), (65_000, 1100)])
def test_a_bomb_is_refused_without_being_decoded(size: tuple[int, int]) -> None:
    data = bomb(*size)
    assert len(data) < 200_000 and size[0] * size[1] > MAX_PIXELS
    tracemalloc.start()
    with pytest.raises(UserError, match=r"0\.tar: image of sample 'k' cannot be read \(.*pixels"):
        decode_image(data, "0.tar: image of sample 'k'")
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()


def test_the_limit_is_the_callers() -> None:
    assert decode_image(picture(0, (10, 10)), "x", max_pixels=100).size == (10, 10)
    with pytest.raises(UserError, match="it says 10 x 10 pixels, the limit is 99"):
        decode_image(picture(0, (10, 10)), "x", max_pixels=99)


def test_formats_that_are_programs_or_exotic_are_not_tried() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "EPS")
    for data in (buffer.getvalue(), b"", b"GIF89a", b"<svg/>"):
        with pytest.raises(UserError, match="x cannot be read"):
            decode_image(data, "x")


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.data())
def test_a_damaged_picture_is_read_or_refused(kind: str, data: st.DataObject) -> None:
    """300 damaged pictures are tried in each run."""
    damaged = bytearray(picture(1, (16, 16), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode_image(bytes(damaged[: data.draw(st.integers(1, len(damaged)))]), "x")
    except UserError as error:
        assert str(error).startswith("x cannot be read")
    else:
        assert image.width * image.height <= MAX_PIXELS and image.mode == "RGB"


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> list[tuple[int, ...]]:
    """The pixels of an RGB picture, row by row."""
    assert image.mode == "RGB"
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def png(depth: int, kind: int, width: int, rows: list[bytes], *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these bits a sample and this colour type, its rows already packed; Pillow writes only some of them."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0))
    content = (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in (header, *chunks, content, (b"IEND", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_are_upright_whatever_the_camera_wrote(kind: str, orientation: int) -> None:
    """A red corner of a picture that is wider than high lies at the upper left, as in the scene, for all eight orientations."""
    scene = Image.new("RGB", (48, 32), BLUE)
    scene.paste(RED, (0, 0, 16, 16))
    stored_as = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions from the scene to what such a camera stores
    stored = scene if orientation == 1 else scene.transpose(Image.Transpose(stored_as[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, kind, exif=exif.tobytes(), **({"quality": 95} if kind != "PNG" else {}))
    image = decode_image(data, "x")
    assert np.abs(np.asarray(image).astype(int) - np.asarray(scene)).mean() < 8, "lies on its side"
    assert image.size == (48, 32) == upright(image, "x").size, "is turned twice"
    if kind != "PNG":
        assert image_size(data, "x") == (48, 32)


def test_broken_exif_does_not_hide_a_picture() -> None:
    for exif in (b"Exif\0\0", b"Exif\0\0MM\0*" + b"\xff" * 40, b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0"):
        assert decode_image(encoded(Image.new("RGB", (8, 4), RED), "JPEG", exif=exif), "x").size == (8, 4)


def transparent(mode: str) -> Image.Image:
    """Two pixels: opaque red (or dark grey), and one whose hidden colour is not white."""
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (17, 200, 33, 0))
    if mode == "PA":
        image = Image.new("PA", (2, 1))
        image.putpalette([255, 0, 0, 17, 200, 33])
        image.putpixel((0, 0), (0, 255))
        image.putpixel((1, 0), (1, 0))
        return image
    return rgba.convert("LA").convert(mode) if mode == "La" else rgba.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La", "PA"])
def test_transparent_pixels_are_white(mode: str) -> None:
    first, second = pixels(on_white(upright(transparent(mode), "x")))
    assert second == WHITE
    assert first == RED if mode in ("RGBA", "RGBa", "PA") else first == (76, 76, 76)


def test_a_palette_with_alpha_of_its_own_is_laid_over_white() -> None:
    image = transparent("RGBA").quantize(4)
    assert image.mode == "P" and "transparency" not in image.info
    assert pixels(on_white(upright(image, "x")))[1] == WHITE


def test_half_transparent_is_half_white() -> None:
    for kind in ("PNG", "WEBP"):
        data = encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 128)), kind, **({"lossless": True} if kind == "WEBP" else {}))
        assert pixels(decode_image(data, "x"))[0] == (127, 127, 127)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(8, 3, 2, [b"\0\1"], (b"PLTE", bytes((*RED, *GREEN))), (b"tRNS", b"\xff\0")), [RED, WHITE]),
        (png(4, 3, 2, [b"\x01"], (b"PLTE", bytes((*RED, *GREEN))), (b"tRNS", b"\0")), [WHITE, GREEN]),
        (png(8, 0, 2, [b"\x10\x20"], (b"tRNS", b"\0\x20")), [(16, 16, 16), WHITE]),
        (png(1, 0, 2, [b"\x40"], (b"tRNS", b"\0\0")), [WHITE, WHITE]),
        (png(1, 0, 2, [b"\x40"], (b"tRNS", b"\0\1")), [(0, 0, 0), WHITE]),
        (png(2, 0, 2, [b"\x10"], (b"tRNS", b"\0\1")), [(0, 0, 0), WHITE]),
        (png(4, 0, 2, [b"\x35"], (b"tRNS", b"\0\5")), [(51, 51, 51), WHITE]),
        (png(8, 2, 2, [bytes((*RED, *GREEN))], (b"tRNS", b"\0\0\0\xff\0\0")), [RED, WHITE]),
        (png(16, 0, 2, [b"\x80\x01\x80\x02"], (b"tRNS", b"\x80\x02")), [(128, 128, 128), WHITE]),
        (png(16, 2, 2, [b"\xff\x01\0\0\0\0\0\0\xff\x01\0\0"], (b"tRNS", b"\0\0\xff\x01\0\0")), [RED, WHITE]),
        (png(16, 4, 2, [b"\x40\x99\xff\xff\0\0\0\0"]), [(64, 64, 64), WHITE]),
        (png(16, 6, 2, [b"\xff\x99\0\0\0\0\xff\xff\0\0\0\0\0\0\0\0"]), [RED, WHITE]),
    ],
    ids=["palette", "palette4", "grey8", "black1", "white1", "grey2", "grey4", "colour8", "grey16", "colour16", "alpha16", "rgba16"],
)
def test_a_transparent_colour_of_any_depth_is_white(data: bytes, expected: list[tuple[int, ...]]) -> None:
    assert pixels(decode_image(data, "x")) == expected


def test_sixteen_bits_become_the_upper_eight() -> None:
    grey = png(16, 0, 4, [b"\0\0\x01\0\x80\0\xff\xff"])
    colour = png(16, 2, 2, [b"\x80\0\xff\xff\0\0\x12\x34\x56\x78\x9a\xbc"])
    assert [pixel[0] for pixel in pixels(decode_image(grey, "x"))] == [0, 1, 128, 255]
    assert pixels(decode_image(colour, "x")) == [(128, 255, 0), (0x12, 0x56, 0x9A)]


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("<u2", [0, 32768, 65535], [0, 128, 255]),
        ("<i4", [0, 128, 255], [0, 128, 255]),
        ("<i4", [0, 256, 65535], [0, 1, 255]),
        ("<i4", [0, 1 << 30, 2**31 - 1], [0, 128, 255]),
        ("<f4", [0, 0.5, 1], [0, 128, 255]),
        ("<f4", [-0.02, 0.5, 1.04], [0, 128, 255]),
        ("<f4", [0, 128, 255], [0, 128, 255]),
        ("<f4", [0, 32767.5, 65535], [0, 128, 255]),
    ],
)
def test_numbers_are_scaled_by_their_range(kind: str, values: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], dtype=kind))
    assert image.mode in ("I;16", "I", "F")
    assert [pixel[0] for pixel in pixels(on_white(upright(image, "x")))] == expected


@pytest.mark.parametrize("values", [[-1.0, 1.0], [0.0, float("nan")], [0.0, float("inf")]])
def test_numbers_without_a_known_range_are_refused(values: list[float]) -> None:
    with pytest.raises(UserError, match=r"x cannot be read .*scale them"):
        upright(Image.fromarray(np.array([values], dtype=np.float32)), "x")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I;16B"])
def test_every_mode_shows_its_own_colours(mode: str) -> None:
    """White, grey and black in each mode come out as such, within rounding; a web palette has the grey 153."""
    expected = [255, 153, 0] if mode != "1" else [255, 255, 0]
    grey = Image.fromarray(np.array([expected], dtype=np.uint8))
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(grey.convert("RGB"), srgb, lab, outputMode="LAB")
    elif mode == "I;16B":
        image = Image.frombytes("I;16B", (3, 1), b"\xff\xff\x99\x99\0\0")
    else:
        image = grey.convert("RGB").convert(mode)
    assert image is not None and image.mode == mode
    assert np.abs(np.array(pixels(on_white(upright(image, "x")))) - np.array(expected)[:, None]).max() <= 2


def test_cmyk_as_photoshop_writes_it_is_not_a_negative() -> None:
    red = decode_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95), "x")
    assert np.abs(np.asarray(red).astype(int) - RED).max() < 8


def test_of_an_animation_the_first_picture_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    for kind in ("PNG", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))
        assert set(pixels(decode_image(data, "x"))) == {RED}


def test_two_pictures_in_one_jpeg_are_the_first() -> None:
    data = encoded(Image.new("RGB", (8, 8), RED), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8), BLUE)])
    assert np.abs(np.asarray(decode_image(data, "x")).astype(int) - RED).max() < 8


@pytest.mark.parametrize("zeros", [False, True], ids=["short", "zeros"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "lossless", "progressive"])
def test_a_file_that_was_cut_is_an_error(kind: str, zeros: bool) -> None:
    """Cut at any place, and also where the rest is zeros, as a download that reserved its space leaves it."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))
    form, options = {"lossless": ("WEBP", {"lossless": True}), "progressive": ("JPEG", {"progressive": True})}.get(kind, (kind, {}))
    data = encoded(noise, form, **options)
    assert decode_image(data, "x").size == (48, 48)
    for part in (0.2, 0.5, 0.9):
        length = int(len(data) * part)
        with pytest.raises(UserError, match="x cannot be read"):
            decode_image(data[:length] + (bytes(len(data) - length) if zeros else b""), "x")


def test_zeros_behind_a_whole_jpeg_are_harmless() -> None:
    assert decode_image(picture(0) + bytes(512), "x").size == (12, 8)


def test_what_cameras_write_behind_a_whole_jpeg_is_harmless() -> None:
    """A film, as of a motion photo: any bytes, a marker of a JPEG among them, the last of them zero."""
    assert decode_image(picture(0) + b"ftypmp42 \xff\xda" + bytes(range(256)) + b"\0", "x").size == (12, 8)


@pytest.mark.parametrize("part", [0.1, 0.3, 0.6, 0.9, 0.95])
def test_a_flat_png_that_ends_in_zeros_is_an_error(part: float) -> None:
    data = encoded(Image.fromarray(np.indices((256, 256)).sum(0).astype(np.uint8)).convert("RGB"))
    length = int(len(data) * part)
    with pytest.raises(UserError, match="x cannot be read"):
        decode_image(data[:length] + bytes(len(data) - length), "x")


def test_a_palette_picture_without_its_palette_is_refused() -> None:
    with pytest.raises(UserError, match="x cannot be read"):
        decode_image(png(8, 3, 2, [b"\0\1", b"\1\0"]), "x")


def test_the_size_is_that_of_the_upright_picture() -> None:
    """Also where ImageMagick wrote the EXIF of a PNG: as text."""
    exif = Image.Exif()
    exif[0x112] = 6
    text = b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n%8d\n" % len(exif.tobytes()) + exif.tobytes().hex().encode() + b"\n")
    data = png(8, 0, 4, [bytes(4)] * 2, (b"zTXt", text))
    assert image_size(data, "x") == decode_image(data, "x").size == (2, 4)


def test_a_colour_profile_leaves_the_numbers_alone() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encoded(Image.new("RGB", (4, 4), (9, 99, 199)), icc_profile=profile)
    assert set(pixels(decode_image(data, "x"))) == {(9, 99, 199)}
