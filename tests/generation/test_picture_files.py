"""PNG files that say how they were drawn: drawn again they are the same, and a file from anybody is read with care."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

import oar_scale
from oar_scale.errors import UserError
from oar_scale.generation.picture_files import DESCRIPTION, KEY, MAX_PROMPT, MAX_RECORD, DrawingRecord, encode_png, read_record
from oar_scale.generation.pretrained import Choices, Pretrained
from oar_scale.generation.settings import SampleSettings
from oar_scale.storage import read_json

EMOJI = "recipes/weights/emoji"
PROMPTS = ["a red apple", "قطة مبتسمة 😺", "<script>alert(1)</script>\n\0 \ud83d"]


@pytest.fixture(scope="module")
def emoji() -> Pretrained:
    return oar_scale.load(EMOJI)


@pytest.mark.parametrize("order", [None, "random", [*range(63, -1, -1)]], ids=["confidence", "random", "given"])
def test_picture_is_made_again_from_its_file(emoji: Pretrained, order: Any) -> None:
    choices: Choices = {"guidance": 3.0, "guidance_schedule": "cosine", "top_p": 0.9, "steps": 8, "score": "sampled"}
    settings = emoji.settings(**choices)
    drawn = emoji.sample(PROMPTS, seed=5, images=[7, 8, 2**40], order=order, **choices)
    for prompt, number, picture in zip(PROMPTS, [7, 8, 2**40], drawn, strict=True):
        file = encode_png(picture, emoji.record(prompt, number, settings, seed=5, order=order))
        record = read_record(file)
        assert record is not None
        assert emoji.again(record).tobytes() == Image.open(io.BytesIO(file)).tobytes() == picture.tobytes()
        assert encode_png(picture, record) == file


def test_drafts_of_the_recipe_do_not_keep_a_picture_from_being_made_again(emoji: Pretrained) -> None:
    """They are of its order; this picture was drawn in the model's own."""
    record = emoji.record(PROMPTS[0], 0, emoji.settings(draft=4), seed=1)
    assert emoji.again(record).tobytes() == emoji.sample(PROMPTS[:1], seed=1)[0].tobytes()


def test_file_tells_people_and_programs(emoji: Pretrained) -> None:
    record = emoji.record(PROMPTS[1], 4, emoji.settings(top_k=9, guidance=2.0, temperature=1.0), seed=-1)
    texts = Image.open(io.BytesIO(encode_png(Image.new("RGB", (32, 32)), record))).info
    assert texts[DESCRIPTION].startswith(f"{PROMPTS[1]}\nsample, seed -1, number 4, order confidence, guidance 2, top_k 9, model emoji ")
    told = json.loads(texts[KEY])
    assert told["prompt"] == PROMPTS[1] and told["settings"]["top_k"] == 9
    assert told["tokenizer"] == read_json(f"{EMOJI}/config.json")["vq"]["id"]


def test_a_caption_that_no_record_takes_is_refused_before_it_is_drawn(emoji: Pretrained) -> None:
    long = "red " * (MAX_PROMPT // 4)
    assert emoji.record(long, 0, emoji.settings(), seed=0).prompt == long
    assert emoji.encode(["apple", long]).shape[0] == 2
    for refuse in (lambda: emoji.encode(["apple", long + "!"]), lambda: emoji.record(long + "!", 0, emoji.settings(), seed=0)):
        with pytest.raises(UserError, match=r"^caption 'red red .* has 100,001 characters, and a picture's record holds 100,000\."):
            refuse()


def test_other_model_or_kind_is_not_drawn_again(emoji: Pretrained) -> None:
    record = emoji.record("a red apple", 0, emoji.settings(), seed=0)
    for change, says in (
        ({"model": "0123456789abcdef"}, "another model: 0123456789abcdef"),
        ({"kind": "edit"}, "of kind edit"),
        ({"prompt": None}, "features"),
        ({"dtype": "bfloat16"}, "drawn in bfloat16"),
    ):
        with pytest.raises(UserError, match=says):
            emoji.again(record.model_copy(update=change))


def test_file_without_a_record_has_none(emoji: Pretrained) -> None:
    picture = Image.new("RGBA", (3, 3))
    jpeg = io.BytesIO()
    Image.new("RGB", (3, 3)).save(jpeg, format="JPEG")
    assert [read_record(each) for each in (encode_png(picture, None), jpeg.getvalue(), b"", b"\x89PNG\r\n\x1a\n")] == [None] * 4


def with_record(text: str) -> bytes:
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt(KEY, text)
    file = io.BytesIO()
    Image.new("RGB", (3, 3)).save(file, format="PNG", pnginfo=texts)
    return file.getvalue()


@pytest.mark.parametrize(
    "change",
    [
        *({"later": 1}, {"format": 2}, {"kind": "film"}, {"number": 2**70}, {"number": "0"}, {"prompt": "x" * 200_000}),
        *({"order": [0, 1]}, {"order": [-1] * 64}, {"grid": 10**9}, {"edit": {"a": []}}, {"seed": True}, {"size": [1]}),
        *({"settings": {"guidance": value}} for value in (float("nan"), -1, "2", None, 1e999)),
        *({"settings": {"later": 1}}, {"settings": {"top_k": 1.5}}, {"settings": {"draft": 2, "steps": 2}}),
    ],
    ids=str,
)
def test_record_that_is_none_is_refused(change: dict[str, Any]) -> None:
    settings = SampleSettings(guidance=2, temperature=1, top_k=0, order_temperature=0)
    good = DrawingRecord(prompt="x", seed=0, number=0, model="m", order="raster", settings=settings, grid=8, size=(32, 32))
    told = json.loads(good.model_dump_json())
    assert read_record(with_record(json.dumps(told))) == good
    told |= change | ({"settings": told["settings"] | change["settings"]} if "settings" in change else {})
    with pytest.raises(UserError, match=r"^one\.png: its record is none that oar_scale .* reads"):
        read_record(with_record(json.dumps(told)), "one.png")


@pytest.mark.parametrize("text", ["", "[]", "no JSON", "[" * 100_000, '{"a":' * 5_000, " " * (MAX_RECORD + 1)], ids=range(6))
def test_text_that_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^this picture: its record"):
        read_record(with_record(text))


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8), st.integers(1, 10_000))
def test_damaged_file_gives_a_record_or_one_error(changes: list[tuple[int, int]], kept: int) -> None:
    settings = SampleSettings(guidance=2, temperature=1, top_k=0, order_temperature=0)
    record = DrawingRecord(prompt="x", seed=0, number=0, model="m", order="raster", settings=settings, grid=8, size=(32, 32))
    file = bytearray(encode_png(Image.new("RGB", (32, 32)), record))[:kept]
    for place, value in changes:
        file[place % len(file)] = value
    try:
        assert isinstance(read_record(bytes(file)), DrawingRecord | None)
    except UserError as error:
        assert "its record" in str(error)
