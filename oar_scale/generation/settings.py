"""How codes and cells are chosen when images are sampled."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import cast, get_args

from oar_scale.config.run_sections import LARGEST_SETTING, SAMPLE_SCORES, is_guided, why_not_drawn
from oar_scale.config.schema import GuidanceSchedule, SampleConfig, Score
from oar_scale.text import shown


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How codes and cells are chosen. Defaults live in the recipe (``sample``)."""

    guidance: float
    """Scale of classifier-free guidance: 1 is the conditional model alone, 0 ignores the caption."""
    temperature: float
    """Of the code; above 0. ``top_k`` 1 is the greedy choice."""
    top_k: int
    """Codes to choose from; 0 keeps the whole vocabulary."""
    order_temperature: float
    """Gumbel noise on the score of the cells; 0 takes the cell with the best score."""
    top_p: float = 1.0
    """Choose from the fewest codes whose probabilities sum to at least this; 1 keeps all."""
    min_p: float = 0.0
    """Choose from the codes that are at least this times as likely as the most likely one; 0 keeps all."""
    guidance_schedule: GuidanceSchedule = "constant"
    """How the scale changes with the share x of the cells that are placed: not at all, or from ``guidance_start`` to ``guidance``,
    linearly or by (1 - cos(pi x)) / 2."""
    guidance_start: float | None = None
    """Scale for an empty image under a schedule; None: 1."""
    score: Score = "max_prob"
    """By which the next cell is chosen, where the model decides the order (``drawing.draw_most_confident``)."""
    steps: int | None = None
    """Passes through the model for an empty image, later ones placing more cells at once (:func:`cells_per_step`). None: one pass for each
    cell."""
    draft: int = 0
    """Cells of a given order that are drafted ahead and verified in one pass (``generation.drafting``). It changes no image, only the
    number of passes; 0: none."""

    def __post_init__(self) -> None:
        for name in ("guidance", "temperature", "top_k", "order_temperature", "top_p", "min_p", "guidance_start", "draft"):
            value: object = getattr(self, name)
            kind = Integral if name in ("top_k", "draft") else Real
            if value is None and name == "guidance_start":
                continue
            if not isinstance(value, kind) or not 0 <= cast(float, value) <= LARGEST_SETTING:  # false of NaN, too
                whole = "whole " if kind is Integral else ""
                raise ValueError(f"{name} {shown(value)} must be a {whole}number from 0 to {LARGEST_SETTING:,}")
        if self.temperature < 1 / LARGEST_SETTING:
            raise ValueError(f"temperature {self.temperature} must be at least {1 / LARGEST_SETTING:g}; top_k=1 makes the choice greedy")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be above 0 and at most 1, which keeps all codes")
        if self.min_p >= 1:
            raise ValueError(f"min_p {self.min_p} must be below 1; top_k=1 keeps the most likely code alone")
        if self.guidance_schedule not in GUIDANCE_RAMPS:
            raise ValueError(f"guidance_schedule {self.guidance_schedule!r}: there are {', '.join(GUIDANCE_RAMPS)}")
        if self.guidance_start is not None and self.guidance_schedule == "constant":
            raise ValueError(f"guidance_start {self.guidance_start} is where a guidance_schedule starts; constant guidance has no start")
        if self.score not in SAMPLE_SCORES:
            why = why_not_drawn(self.score) if self.score in get_args(Score) else "is unknown"
            raise ValueError(f"score {shown(self.score)} {why}: cells are chosen by {', '.join(SAMPLE_SCORES)}")
        if self.steps is not None and (not isinstance(self.steps, Integral) or not 1 <= self.steps <= LARGEST_SETTING):
            raise ValueError(f"steps {shown(self.steps)} must be a whole number from 1 to {LARGEST_SETTING:,}; None places one cell a step")
        if self.draft and self.steps is not None:
            raise ValueError("draft changes no image, while steps places cells without knowing the ones beside them: choose one of the two")

    @property
    def guided(self) -> bool:
        """Whether the model is also evaluated without the condition (classifier-free guidance)."""
        return is_guided(self.guidance, self.guidance_schedule, self.guidance_start)

    def scale(self, placed: int, cells: int) -> float:
        """Guidance scale once ``placed`` of the cells have their codes."""
        start = 1.0 if self.guidance_start is None else self.guidance_start
        return start + (self.guidance - start) * GUIDANCE_RAMPS[self.guidance_schedule](placed / cells)

    @classmethod
    def from_recipe(cls, sample: SampleConfig) -> SampleSettings:
        """The settings of a recipe's ``sample`` section."""
        return cls(**sample.model_dump(exclude={"images", "order"}))


GUIDANCE_RAMPS: dict[GuidanceSchedule, Callable[[float], float]] = {
    "constant": lambda placed: 1.0,
    "linear": lambda placed: placed,
    "cosine": lambda placed: (1 - math.cos(math.pi * placed)) / 2,
}
"""How far the scale has come from its start to its end, by the share of the cells that are placed."""
