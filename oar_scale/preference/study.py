"""A study: its comparisons, in one file (``study.json``) that also says which pictures belong to them.

    STUDY/study.json            question, arms, comparisons, seed, a fingerprint of all that
    STUDY/pictures/HASH.png     pixels alone, named by their content: neither name nor file says which arm drew it
    STUDY/answers.sqlite        written by ``oar study serve``
    STUDY/serve.lock            locked by it, and says where it runs

Whatever is random is a hash of the study's seed and of what it is for, so that a rater who comes back sees the same comparison, with the
same sides, whatever happened to the server meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from oar_scale.errors import UserError
from oar_scale.json_object import JsonObject
from oar_scale.storage import join, read_json
from oar_scale.text import shown

MANIFEST, PICTURES, ANSWERS, LOCK = "study.json", "pictures", "answers.sqlite", "serve.lock"
CAPTION = "{caption}"
"""Stands for the caption in a question."""
LONGEST_QUESTION = 1000
"""Characters."""

Hash = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
"""First 32 hex digits of a SHA-256."""


class Arm(BaseModel):
    """One side of the study: a folder of drawings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=60)
    left_out: int = Field(ge=0)
    """Pictures of the folder that other arms have no counterpart of."""
    models: tuple[str, ...] = ()
    """Of the records in its pictures: hashes of weights. Empty where they have none."""
    orders: tuple[str, ...] = ()


class Comparison(BaseModel):
    """Two pictures of the same caption, of two arms; or an attention check, whose first picture is the right answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Hash
    caption: str | None
    item: int = Field(ge=0)
    """Number of what both pictures show, among all that the arms share."""
    pictures: tuple[Hash, Hash]
    arms: tuple[int, int] | None
    """None: an attention check."""
    family: str | None = None
    """What both pictures are variants of, where files beside the pictures say so: captions of one family are no independent ones."""

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: SerializerFunctionWrapHandler) -> JsonObject:
        """Without a family as before there were any: a study keeps its fingerprint."""
        content: JsonObject = serialize(self)
        return content if self.family is not None else {name: value for name, value in content.items() if name != "family"}


class Study(BaseModel):
    """What ``study.json`` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    question: str = Field(min_length=1, max_length=LONGEST_QUESTION)
    seed: int
    per_rater: int = Field(ge=1)
    """Pairs that a rater is shown, attention checks not counted."""
    arms: tuple[Arm, ...] = Field(min_length=2)
    pairs: tuple[Comparison, ...] = Field(min_length=1)
    checks: tuple[Comparison, ...]
    identical: int = Field(0, ge=0)
    """Pairs that were left out because both pictures are the same."""
    fingerprint: Hash

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        ids = [each.id for each in (*self.pairs, *self.checks)]
        if len(set(ids)) != len(ids):
            raise ValueError("two comparisons have the same id")
        for each in self.pairs:
            if each.arms is None or not 0 <= min(each.arms) < max(each.arms) < len(self.arms):
                raise ValueError(f"pair {each.id} is not of two of the arms")
        if any(each.arms is not None for each in self.checks):
            raise ValueError("an attention check names arms")
        if self.fingerprint != fingerprint_of(self.model_dump(mode="json")):
            raise ValueError("its fingerprint is that of another study: the file has been changed")
        return self

    @classmethod
    def make(cls, **content: Any) -> Study:
        """A study of this content, with its fingerprint."""
        draft = cls.model_construct(_fields_set=None, **content, fingerprint="")
        return cls(**content, fingerprint=fingerprint_of(draft.model_dump(mode="json")))

    def digest(self, purpose: str, *keys: object) -> int:
        """A number of 64 bits that is random but always the same for this study, purpose and keys."""
        return digest(self.seed, purpose, *keys)

    def swapped(self, rater: str, comparison: str) -> bool:
        """Whether this rater sees the first picture of a comparison on the right."""
        return bool(self.digest("side", rater, comparison) & 1)

    def pictures(self) -> set[str]:
        """The names of all pictures."""
        return {name for each in (*self.pairs, *self.checks) for name in each.pictures}

    def question_for(self, comparison: Comparison) -> str:
        """What a rater is asked about it."""
        return self.question.replace(CAPTION, comparison.caption or "")


def digest(seed: int, purpose: str, *keys: object) -> int:
    """A hash of 64 bits."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, purpose, *keys]).encode()).digest()[:8])


def content_hash(data: bytes) -> str:
    """The name of a picture's file without its ending."""
    return hashlib.sha256(data).hexdigest()[:32]


def fingerprint_of(manifest: JsonObject) -> str:
    """Of all that a manifest says, its own fingerprint excepted."""
    rest = {name: value for name, value in manifest.items() if name != "fingerprint"}
    return content_hash(json.dumps(rest, sort_keys=True).encode())


def read_study(folder: str) -> Study:
    """The study in a folder.

    Raises:
        UserError: there is none, or its file was cut or changed.
    """
    path = join(folder, MANIFEST)
    if not os.path.isfile(path):
        raise UserError(f"{folder}: no study is here (no {MANIFEST}). oar study build NAME=FOLDER NAME=FOLDER --out {folder} makes one.")
    try:
        return Study.model_validate_json(json.dumps(read_json(path)), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = ".".join(map(str, first["loc"])) or "the study"
        raise UserError(
            f"{path}: cannot be read ({shown(at)}: {first['msg']}). Take the file as oar study build has written it."
        ) from error


def read_pictures(folder: str, study: Study) -> dict[str, bytes]:
    """The PNG files of a study by name. Raises UserError for one that is missing, or is not what it was."""
    return dict(_checked(folder, study))


def _checked(folder: str, study: Study) -> Iterator[tuple[str, bytes]]:
    for name in sorted(study.pictures()):
        path = join(folder, PICTURES, f"{name}.png")
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}), and the study needs it. Copy the whole folder again.") from error
        if content_hash(data) != name:
            raise UserError(f"{path}: is not the picture that the study was built with. Copy the whole folder again.")
        yield name, data
