"""What all sections of a recipe are made of."""

from __future__ import annotations

from enum import Enum
from functools import cache
from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator


class Section(BaseModel):
    """Base of all recipe sections: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


T = TypeVar("T")


class _Mark(Enum):
    """What a field is to a run that is resumed, or was made by an older version."""

    OPERATIONAL = "operational"
    CHANGEABLE = "changeable"
    LIMIT = "limit"
    ADDED = "added"


Operational = Annotated[T, _Mark.OPERATIONAL]
"""The type of a field that says who does the work, or how often it is logged, saved or watched. It changes no result, so it is no
part of a stage's fingerprint, and a run may be resumed with another value: ``log_every: Operational[int] = Field(5, ge=1)``."""
Changeable = Annotated[T, _Mark.CHANGEABLE]
"""The type of a field that shapes the steps still to come. A training goes on from its checkpoint with another value, which is logged
(event ``settings_changed``); a finished training is continued with it where it also gets more steps."""
Limit = Annotated[T, _Mark.LIMIT]
"""The type of a field that says when a stage stops or steps in. It may change as a :data:`Changeable` one may, and a finished stage
stays finished: it came to its end."""
Added = Annotated[T, _Mark.ADDED]
"""The type of a field that recipes of older versions had not. At its default it says what those did, and is no part of a stage's
fingerprint, so that runs of theirs are still the same runs."""


def operational_fields(section: type[Section]) -> frozenset[str]:
    """The names of a section's own fields that are marked :data:`Operational`; those of sections within it are not looked at."""
    return _marked(section, _Mark.OPERATIONAL)


def changeable_fields(section: type[Section]) -> frozenset[str]:
    """The same for :data:`Changeable`."""
    return _marked(section, _Mark.CHANGEABLE)


def limit_fields(section: type[Section]) -> frozenset[str]:
    """The same for :data:`Limit`."""
    return _marked(section, _Mark.LIMIT)


def added_fields(section: type[Section]) -> frozenset[str]:
    """The same for :data:`Added`."""
    return _marked(section, _Mark.ADDED)


def silent_fields(section: Section) -> frozenset[str]:
    """The names of a section's own fields that tell nothing of its results: operational ones, and :data:`Added` ones at their default."""
    kind = type(section)
    return operational_fields(kind) | {name for name in added_fields(kind) if getattr(section, name) == kind.model_fields[name].default}


@cache
def _marked(section: type[Section], mark: _Mark) -> frozenset[str]:
    return frozenset(name for name, field in section.model_fields.items() if mark in field.metadata)


class Range(Section):
    """A number: as many as there is capacity for, between two bounds."""

    min: int = Field(ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


def _count_kind(given: object) -> str:
    return RANGE if isinstance(given, dict | Range) else NUMBER


NUMBER, RANGE = "a number", "a range"
Count = Annotated[Annotated[int, Field(ge=1), Tag(NUMBER)] | Annotated[Range, Tag(RANGE)], Discriminator(_count_kind)]
"""A number of processes, or ``{min, max}``."""


def bounds(count: int | Range) -> tuple[int, int]:
    """The least and the most of a :data:`Count`."""
    return (count, count) if isinstance(count, int) else (count.min, count.max)


def _with_hyphens(given: object) -> object:
    return given.replace("_", "-") if isinstance(given, str) else given


PolicyName = Annotated[str, BeforeValidator(_with_hyphens), Field(pattern=r"^[a-z]+(-[a-z]+)*$")]
"""An order policy: a module of ``oar_scale.orders.policies``, which builds the policy when the stage begins. Underscores are hyphens."""


class RecipeConflict(ValueError):
    """Two fields contradict each other; ``key`` is the one to name to the user."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(text)
        self.key = key

    def __reduce__(self) -> tuple[type[RecipeConflict], tuple[str, str]]:
        return RecipeConflict, (self.key, str(self))  # as it was made: it may come from another process


def divisors(n: int) -> list[int]:
    """All divisors of ``n``, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]
