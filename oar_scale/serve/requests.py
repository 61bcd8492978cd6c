"""What clients ask for, as pydantic models: field by field checked before anything is drawn."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from oar_scale.config.schema import GuidanceSchedule, Score
from oar_scale.generation.pretrained import Choices
from oar_scale.serve.api_errors import bad_request

DATA_URL = "data:image/png;base64,"
SEEDS = 2**53
"""Seeds lie below it: JavaScript knows all whole numbers up to there."""

RequestPrompt = StrictStr | StrictInt | list[list[float]]
"""A caption, a class label, or the features of a caption, a list for each of its rows."""


class Settings(BaseModel):
    """How codes and cells are chosen (docs/sampling.md). What is left out, or null, is as the model's own recipe says."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: RequestPrompt
    seed: Annotated[int | None, Field(ge=0, lt=SEEDS)] = None
    """Null: a new one, which the answer names."""
    order: str | None = None
    """An order policy."""
    guidance: Annotated[float | None, Field(ge=0)] = None
    guidance_schedule: GuidanceSchedule | None = None
    guidance_start: Annotated[float | None, Field(ge=0)] = None
    temperature: Annotated[float | None, Field(gt=0)] = None
    top_k: Annotated[int | None, Field(ge=0)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    min_p: Annotated[float | None, Field(ge=0, lt=1)] = None
    score: Score | None = None
    order_temperature: Annotated[float | None, Field(ge=0)] = None
    steps: Annotated[int | None, Field(ge=1)] = None

    def choices(self) -> Choices:
        """Those settings that differ from the recipe's; drafts are the engine's own business."""
        return cast(Choices, {**self.model_dump(include=set(Choices.__annotations__), exclude_none=True), "draft": 0})


class EditSettings(Settings):
    """The same for a part of a picture (docs/editing.md)."""

    strength: Annotated[float, Field(gt=0, le=1)] = 1.0
    feather: Annotated[float, Field(ge=0, le=1024)] = 0.0


EDIT_FIELDS = EditSettings.model_fields.keys() - Settings.model_fields.keys()


class JobAsk(EditSettings):
    """``POST /api/jobs``."""

    kind: Literal["sample", "edit"] = "sample"
    count: Annotated[int, Field(ge=1)] = 1
    """Images, each with noise of its own."""
    image: str | None = None
    """Of an edit: a data URL."""
    mask: str | None = None
    """A data URL; white is drawn, black kept. Null: the fully transparent pixels of the image are drawn."""


class _OpenAI(BaseModel):
    """Fields of OpenAI's clients. Those that mean nothing to a model like ours are taken and not looked at."""

    model: str | None = None
    n: Annotated[int | None, Field(ge=1)] = None
    size: str | None = None
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Literal["png"] | None = None
    background: Literal["auto", "opaque"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int | None, Field(ge=0, le=3)] = None
    quality: str | None = None
    style: str | None = None
    moderation: str | None = None
    output_compression: int | None = None
    input_fidelity: str | None = None
    user: str | None = None
    safety_identifier: str | None = None


class GenerationAsk(_OpenAI, Settings):
    """``POST /v1/images/generations``."""


class EditAsk(_OpenAI, EditSettings):
    """The fields of ``POST /v1/images/edits`` beside its files."""


def from_data_url(url: str, param: str) -> bytes:
    """The bytes of a data URL in base64. Raises ApiError for anything else."""
    head, _, data = url.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise bad_request(f"{param} must be a data URL of a picture, data:image/png;base64,...", param)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad_request(f"{param}: its base64 is damaged ({error})", param) from error


def data_url(png: bytes) -> str:
    """A PNG as a data URL."""
    return DATA_URL + base64.b64encode(png).decode()
