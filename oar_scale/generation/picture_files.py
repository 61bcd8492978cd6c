"""Drawings as PNG files that say how they were made, so that each can be made again.

    picture, record  --encode_png-->  PNG    iTXt "oar_scale": the record as JSON;  iTXt "Description": the same for people
    PNG              --read_record--> record --Pretrained.again--> the same picture

A record holds all that a drawing depends on: prompt, seed and number (its noise), the weights (by content), dtype, settings and order. It
names no path and no time: the same drawing is the same file, wherever and whenever it is made.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace
from typing import Annotated, Literal, Self

from PIL import Image, PngImagePlugin
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from oar_scale import __version__
from oar_scale.errors import UserError
from oar_scale.generation.settings import SampleSettings
from oar_scale.text import clean_text, shown

KEY, DESCRIPTION = "oar_scale", "Description"
"""Keywords of the two texts; the second is one that the PNG specification registers, so that other programs show it."""
MAX_PROMPT = 100_000
"""Characters of a prompt that a record takes."""
MAX_RECORD = 1 << 20
"""Bytes of a record that are read: a file may come from anybody."""
MAX_EDIT = 32
"""Entries that say what an edit depends on, its regions among them."""
MAX_CELLS = 256**2
"""Cells of the largest grid, as in order tables."""
_BROKEN = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, OverflowError, struct.error, zlib.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)
"""What Pillow raises for broken files, and for pictures of too many pixels."""

DrawingKind = Literal["sample", "edit", "variation", "expand"]
Choice = str | int | float | bool | None


def _clean(prompt: object) -> object:
    return clean_text(prompt) if isinstance(prompt, str) else prompt  # as prompt encoders see it: half a surrogate pair fits into no file


def check_prompt(prompt: object) -> None:
    """Raise UserError for a caption that no record takes."""
    if isinstance(prompt, str) and (length := len(clean_text(prompt))) > MAX_PROMPT:
        raise UserError(f"caption {shown(prompt)} has {length:,} characters, and a picture's record holds {MAX_PROMPT:,}. Shorten it.")


class DrawingRecord(BaseModel):
    """How one picture was drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format: Literal[1] = 1
    library: str = Field(f"oar_scale {__version__}", max_length=100)
    kind: DrawingKind = "sample"
    prompt: Annotated[Annotated[str, Field(max_length=MAX_PROMPT)] | int | None, BeforeValidator(_clean)]
    """A caption or a class label; None where the model was conditioned on an array of features."""
    seed: int = Field(ge=-(2**63), lt=2**64)
    number: int = Field(ge=-(2**63), lt=2**63)
    """Of the picture: with the seed, all its noise depends on it."""
    model: str = Field(max_length=64)
    """First 16 hex digits of the SHA-256 of the weights file (``oar_scale.model.weights.model_id``)."""
    tokenizer: str | None = Field(None, max_length=64)
    """Content hash of the image tokenizer (``oar_scale.tokenizers.vq.vq_id``)."""
    name: str | None = Field(None, max_length=1000)
    """What people call the model: its recipe."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """That the model computed in."""
    order: Annotated[str, Field(max_length=100)] | Annotated[tuple[int, ...], Field(max_length=MAX_CELLS)]
    """An order policy, or the order itself."""
    settings: SampleSettings
    grid: int = Field(ge=1, le=256)
    """Cells per side."""
    size: tuple[int, int]
    """Width and height of the picture."""
    edit: dict[Annotated[str, Field(max_length=100)], Choice] | None = Field(None, max_length=MAX_EDIT)
    """What an edit depends on beside its picture and mask, such as ``strength`` and ``feather``."""

    @model_validator(mode="after")
    def _permutation(self) -> Self:
        if not isinstance(self.order, str) and sorted(self.order) != list(range(self.grid**2)):
            raise ValueError(f"order is no permutation of {self.grid} x {self.grid} cells")
        return self

    def same_picture(self, other: DrawingRecord) -> bool:
        """Whether both are of the same picture: drafts change none, and versions of the library are not meant to."""

        def picture(record: DrawingRecord) -> DrawingRecord:
            return record.model_copy(update={"library": "", "settings": replace(record.settings, draft=0)})

        return picture(self) == picture(other)

    def describe(self) -> str:
        """The same for people, in two lines."""
        settings = SampleSettings(guidance=1, temperature=1, top_k=0, order_temperature=0)
        said = {field: value for field, value in vars(self.settings).items() if value != getattr(settings, field)}
        said |= {field: value for field, value in (self.edit or {}).items() if value is not None}
        order = self.order if isinstance(self.order, str) else "given"
        parts = [f"{field} {value:g}" if isinstance(value, float) else f"{field} {value}" for field, value in said.items()]
        of = f"{self.name} {self.model}" if self.name else self.model
        about = [self.kind, f"seed {self.seed}", f"number {self.number}", f"order {order}", *parts, f"model {of}", self.dtype, self.library]
        prompt = "features" if self.prompt is None else str(self.prompt)
        return f"{prompt}\n{', '.join(about)}"


def encode_png(picture: Image.Image, record: DrawingRecord | None) -> bytes:
    """The picture as a PNG file, with its record where there is one. The same picture and record give the same bytes."""
    texts = PngImagePlugin.PngInfo()
    if record is not None:
        texts.add_itxt(KEY, record.model_dump_json())
        texts.add_itxt(DESCRIPTION, record.describe())
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=texts)
    return buffer.getvalue()


def read_record(png: bytes | memoryview, where: str = "this picture") -> DrawingRecord | None:
    """The record in a PNG file; None where there is none, or the file is no PNG. No pixel is decoded.

    Args:
        where: names the file in errors.

    Raises:
        UserError: there is a record, but not one that this version writes.
    """
    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            text = image.info.get(KEY)
    except _BROKEN:
        return None
    if not isinstance(text, str):
        return None
    try:
        data = text.encode()
        if len(data) > MAX_RECORD:
            raise UserError(f"{where}: its record has {len(data)} bytes, which no drawing needs (limit {MAX_RECORD})")
        return DrawingRecord.model_validate_json(data, strict=True)
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: its record is no text") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = ".".join(map(str, first["loc"])) or "the record"
        raise UserError(
            f"{where}: its record is none that oar_scale {__version__} reads ({shown(at)}: {first['msg']}). "
            "A later version may have drawn it, or another program changed it."
        ) from error
