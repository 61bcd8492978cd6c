"""Sections of a recipe about the use of a trained model: order extraction, sampling, evaluation; and about observing a run."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from oar_scale.config.locations import Location
from oar_scale.config.section import Added, Count, Operational, PolicyName, RecipeConflict, Section, bounds

Score = Literal["gt_logprob", "max_prob", "neg_entropy", "margin", "sampled", "info_gain"]
GuidanceSchedule = Literal["constant", "linear", "cosine"]
FirstCell = Literal["free", "random"] | Annotated[int, Field(ge=0)]
DRAWING_SCORES: frozenset[Score] = frozenset({"sampled", "info_gain"})
"""Scores that draw: they get a random number for each candidate, and an image's extractions differ."""
SAMPLE_SCORES: tuple[Score, ...] = ("max_prob", "neg_entropy", "margin", "sampled")
"""Scores that cells are chosen by while an image is drawn. ``info_gain`` takes thousands of passes for each."""


def why_not_drawn(score: Score) -> str:
    """Why cells are not chosen by a score while an image is drawn."""
    if score == "gt_logprob":
        return "looks at the code that lies in a cell, and an image that is being drawn has none there yet"
    return "takes thousands of passes for each image: orders can be extracted by it"


def is_guided(guidance: float, schedule: GuidanceSchedule, start: float | None) -> bool:
    """Whether drawing also asks the model without the condition (classifier-free guidance): under a schedule the start decides, too."""
    return guidance != 1 or (schedule != "constant" and start not in (None, 1))


WANDB_REFUSES = "/\\#?%:"
"""Characters that no project of W&B has in its name."""

REMOVED_EXTRACT = {"repulsion_radius": 0, "frontier_random": None, "rescore_radius": None}
"""Fields that ``extract`` once had, with the values at which they changed nothing. Stored recipes of older runs name them, and
``run/stage_markers.py`` still hashes them into the fingerprint of the stage ``extract``: a finished stage is still taken for finished."""


LARGEST_SETTING = 1_000_000
"""Of any number that says how cells and codes are chosen: a float32 holds what comes of it."""


class ExtractConfig(Section):
    """How an order is extracted for every training image, and with how many actors."""

    score: Score = "max_prob"
    guidance: float = Field(1.0, ge=0)
    """Classifier-free guidance scale while scoring; 1 = the conditional model alone."""
    tie_seed: int = 0
    """Seed of everything random: ties, noise, the codes that scores ``sampled`` and ``info_gain`` draw, a random first cell."""
    order_temperature: float = Field(0.0, ge=0, le=LARGEST_SETTING)
    """Gumbel noise on the choice of the next cell, in units of the score; 0 takes the best cell."""
    orders_per_image: int = Field(1, ge=1)
    """Orders that are found for each image, with noise of their own; training takes one of them, another one in each epoch."""
    info_gain_samples: Added[int] = Field(4, ge=0)
    """Codes that score ``info_gain`` tries in each cell, drawn from the model; 0: all codes of the vocabulary, exactly."""
    info_gain_candidates: Added[int | None] = Field(None, ge=1)
    """Cells that ``info_gain`` looks at in a step, those whose code is least certain; more than that is dearer. Default: all empty ones."""
    first_cell: FirstCell = "free"
    """``free``: the best cell; ``random``; or its number in raster order."""
    commit_per_step: int = Field(1, ge=1)
    """Cells placed at each step; more than 1 is cheaper and no longer exact, as is ``cosine_steps`` (docs/orders.md)."""
    cosine_steps: int | None = Field(None, ge=1)
    """Instead: about so many steps, the later ones placing more cells (RandAR's schedule)."""
    views: int = Field(1, ge=1)
    """Orders are extracted for so many of ``tokenizer.views``, from the first one on."""
    mirror: Added[bool] = False
    """Views that are mirror images of these (``center_flip``, half of the crops) have orders, too: those of their originals, mirrored.
    It changes what fine-tuning and its control train on, and no order table."""
    batch: int = Field(64, ge=1)
    actors: Operational[Count] = 2
    """Processes with a model each, or ``{min, max}``: more of them as the cluster has capacity (docs/extraction-pool.md)."""
    gpus_per_actor: Operational[float] = Field(0, ge=0)
    """GPUs an actor takes; 0.5: two actors share one. 0: it computes on ``parallel.cpu_threads`` cores."""
    max_retries: Operational[int] = Field(3, ge=0)
    """Times a shard is tried again, on another actor, before it is set aside as poison."""

    @property
    def min_actors(self) -> int:
        """The number of actors that extraction starts with at least."""
        return bounds(self.actors)[0]

    @property
    def max_actors(self) -> int:
        """The number of actors that extraction has at most."""
        return bounds(self.actors)[1]

    @property
    def guided(self) -> bool:
        """Whether the model is also asked without the condition (classifier-free guidance)."""
        return self.guidance != 1

    @model_validator(mode="before")
    @classmethod
    def _without_removed(cls, given: object) -> object:
        """Read stored recipes of older runs: a removed field is dropped where it changed nothing, and an unknown key otherwise."""
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if key not in REMOVED_EXTRACT or value != REMOVED_EXTRACT[key]}

    @model_validator(mode="after")
    def _shortcuts(self) -> ExtractConfig:
        if self.cosine_steps is not None and self.commit_per_step > 1:
            raise RecipeConflict(
                "extract.cosine_steps", "the cosine schedule says how many cells a step places.\nLeave out commit_per_step."
            )
        if self.score == "info_gain":
            self._looks_ahead()
        if self.orders_per_image > 1 and not (self.order_temperature or self.score in DRAWING_SCORES or self.first_cell == "random"):
            raise RecipeConflict(
                "extract.orders_per_image",
                f"{self.orders_per_image} orders of an image would be the same.\n"
                "Set order_temperature above 0, score: sampled, or first_cell: random; or orders_per_image: 1.",
            )
        return self

    def _looks_ahead(self) -> None:
        """Raises RecipeConflict for what score ``info_gain`` cannot do."""
        if self.guided:
            raise RecipeConflict("extract.guidance", "score info_gain is of the conditional model alone.\nSet 1, or another score.")
        if self.first_cell != "free":
            raise RecipeConflict("extract.first_cell", "score info_gain compares all empty cells.\nSet first_cell: free, or another score.")
        if self.info_gain_candidates is not None and (self.cosine_steps is not None or self.commit_per_step > self.info_gain_candidates):
            raise RecipeConflict(
                "extract.info_gain_candidates",
                "a step may place more cells than are looked at.\nSet it to commit_per_step at least, without cosine_steps.",
            )


class OrderHeadConfig(Section):
    """The order head (docs/order-policies.md): a small network that predicts a whole order at once."""

    first: int = Field(0, ge=0)
    """Cells that are placed before the order head predicts the rest, in the checkerboard order; 0: it sees the text alone."""
    width: int = Field(128, ge=1)
    steps: int = Field(600, ge=1)
    batch: int = Field(64, ge=1)
    lr: float = Field(2e-3, gt=0)
    heldout_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the training images that it is measured on instead of trained."""
    heldout_images: int = Field(512, ge=1)
    """At most so many of them are used."""


class SampleConfig(Section):
    """How images are drawn from a model."""

    images: int = Field(16, ge=1)
    """Held-out captions drawn in the report."""
    guidance: float = Field(2.0, ge=0, le=LARGEST_SETTING)
    guidance_schedule: Added[GuidanceSchedule] = "constant"
    """``linear`` and ``cosine`` let the scale grow from ``guidance_start`` to ``guidance`` while cells are placed."""
    guidance_start: Added[float | None] = Field(None, ge=0, le=LARGEST_SETTING)
    """Where a ``guidance_schedule`` starts. Default: 1."""
    temperature: float = Field(1.0, ge=1 / LARGEST_SETTING, le=LARGEST_SETTING)
    top_k: int = Field(0, ge=0, le=LARGEST_SETTING)
    """0 keeps the whole vocabulary."""
    top_p: Added[float] = Field(1.0, gt=0, le=1)
    """Draw from the fewest codes whose probabilities sum to at least this; 1 keeps all."""
    min_p: Added[float] = Field(0.0, ge=0, lt=1)
    """Draw from the codes that are at least this times as likely as the most likely one; 0 keeps all."""
    score: Added[Score] = "max_prob"
    """By which the model chooses the next cell, where it decides the order: ``max_prob``, ``neg_entropy``, ``margin`` or ``sampled``."""
    order_temperature: float = Field(0.0, ge=0, le=LARGEST_SETTING)
    """Gumbel noise on the choice of the next cell, in units of the score; 0 takes the cell with the best score."""
    order: PolicyName | None = None
    """An order policy (docs/order-policies.md). Default: the model decides; a raster model draws in raster order."""
    steps: Added[int | None] = Field(None, ge=1, le=LARGEST_SETTING)
    """Passes for an image, later ones placing more cells at once without knowing those beside them. Default: a cell a pass."""
    draft: Operational[int] = Field(0, ge=0, le=LARGEST_SETTING)
    """Cells of a given order that are drafted ahead and verified in one pass: the same images in fewer passes."""

    @property
    def guided(self) -> bool:
        """Whether the model is also asked without the condition (:func:`is_guided`)."""
        return is_guided(self.guidance, self.guidance_schedule, self.guidance_start)

    @model_validator(mode="after")
    def _choices(self) -> SampleConfig:
        if self.guidance_start is not None and self.guidance_schedule == "constant":
            raise RecipeConflict(
                "sample.guidance_start", "is where a guidance_schedule starts, and constant guidance has no start.\nSet linear or cosine."
            )
        if self.score not in SAMPLE_SCORES:
            raise RecipeConflict("sample.score", f"{why_not_drawn(self.score)}.\nSet one of {', '.join(SAMPLE_SCORES)}.")
        if self.draft and self.steps is not None:
            raise RecipeConflict("sample.draft", "steps and draft are two ways to place several cells in a pass.\nLeave one of them out.")
        if self.draft and self.order in (None, "confidence"):
            raise RecipeConflict(
                "sample.draft",
                "cells are drafted along an order that is known beforehand; here the model decides while it draws.\n"
                "Name an order (docs/order-policies.md), or leave draft out.",
            )
        return self


class ExtractorConfig(Section):
    """The network whose features sets of images are compared by (docs/evaluation.md)."""

    name: str = Field("efflite0", pattern=r"^(efflite0|inception|(openclip|timm):[^\s]+)$")
    """``efflite0``, ``inception``, ``openclip:MODEL`` or ``timm:MODEL``."""
    weights: Location | None = None
    """A local file; all but ``efflite0`` need one."""
    sha256: str | None = Field(None, pattern="^[0-9a-fA-F]{64}$")
    """The hash of the weights, where it is not that of the published ones."""


class EvaluateConfig(Section):
    """How many images the stage ``evaluate`` measures on, and by which features it compares them."""

    nll_images: int = Field(192, ge=2)
    feature_images: int = Field(256, ge=8)
    """Generated and held-out images compared by KID and Frechet distance, the same number of each."""
    features: Added[ExtractorConfig] = ExtractorConfig()
    """What KID and Frechet distance compare; their names end in its name."""


AlertKind = Literal[
    "failed", "driver_lost", "worker_failure", "restarts", "stall", "pending", "non_finite", "spike",
    "checkpoint_failed", "rejected_checkpoint", "slow", "data_wait", "straggler",
]  # fmt: skip
"""What somebody should know of at once: an event of that kind, or what ``oar_scale.observe.alarms`` makes of several events."""


class NotifyConfig(Section):
    """Who is told about alerts: a command, a webhook, or both. Each alert is one JSON object (docs/observability.md)."""

    command: tuple[str, ...] = ()
    """A program and its arguments; it gets the alert on its standard input."""
    webhook: str | None = None
    """``$NAME``: the environment variable that holds the address to POST to. The address is a secret, and recipes are copied and shown."""
    kinds: tuple[AlertKind, ...] = get_args(AlertKind)

    @model_validator(mode="after")
    def _webhook_is_no_address(self) -> NotifyConfig:
        if self.webhook is not None and not re.fullmatch(r"\$[A-Za-z_][A-Za-z0-9_]*", self.webhook):
            # The key is that of the section, so that the error does not repeat the address.
            raise RecipeConflict(
                "observe.notify",
                "webhook must be $NAME: the environment variable that holds the address. The address itself is a secret, and a recipe is "
                "copied into the run's folder, its events and W&B.",
            )
        return self


class ObserveConfig(Section):
    """Who may watch a run (docs/observability.md). None of it changes a result, or can stop a run."""

    wandb: Literal["off", "offline", "online"] = "off"
    """``online`` without a key or an answer is kept offline; ``wandb sync`` uploads it later."""
    wandb_project: str = "oar_scale"
    wandb_tags: tuple[str, ...] = ()
    wandb_artifacts: bool = False
    """Log each stage's exported model as an artifact; the end of the stage then waits for its upload, up to ten minutes."""
    metrics_port: int | None = Field(None, ge=0, le=65535)
    """Serve ``/metrics`` and ``/healthz`` for Prometheus while a stage runs; 0: any free port. Default: no server."""
    metrics_address: str = "127.0.0.1"
    """Whom the server answers; ``0.0.0.0``: every host that reaches this one."""
    stall_s: float = Field(600.0, gt=0)
    """Silence of a stage that counts as a stall."""
    notify: NotifyConfig = NotifyConfig()
    """Who is told about alerts. Default: nobody."""
    mirror_s: float = Field(30.0, gt=0)
    """Between two copies of the events to ``storage.root``, where that is in S3."""

    @model_validator(mode="after")
    def _names_that_wandb_takes(self) -> ObserveConfig:
        if self.wandb == "off":
            return self
        refused = sorted({character for character in self.wandb_project if character in WANDB_REFUSES or not character.isprintable()})
        if refused or not 1 <= len(self.wandb_project.strip()) <= 128:
            why = f"it holds {' '.join(map(repr, refused))}" if refused else f"it has {len(self.wandb_project.strip())}"
            raise RecipeConflict(
                "observe.wandb_project",
                f"W&B takes project names of 1 to 128 characters, none of them {' '.join(WANDB_REFUSES)}; {why}.\n"
                "The team (entity) that a project belongs to is set with the variable WANDB_ENTITY.",
            )
        if any(not 1 <= len(tag) <= 64 for tag in self.wandb_tags):
            raise RecipeConflict("observe.wandb_tags", "W&B takes tags of 1 to 64 characters.")
        return self
