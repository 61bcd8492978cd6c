"""The section ``pipeline``: optional stages, and the arms and seeds of a run.

An *arm* is one more fine-tuning of the run's any-order model, which differs from the ordered model's in the orders of its samples and in
nothing else: same start, samples, views, dropped captions, dropout and number of updates. A *seed* is a repetition of every fine-tuning,
the control's included, with all of these drawn anew:

    pipeline:
      seeds: 3
      arms:
        gt:     {extract: {score: gt_logprob}}    orders of an extraction of its own
        raster: {order: raster}

Each pair of an arm and a seed is a stage of the run, and each different extraction is one (:func:`stages_of`). docs/arms.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

from pydantic import Field, JsonValue, ValidationError

from oar_scale.config.fingerprint import fingerprint
from oar_scale.config.run_sections import ExtractConfig
from oar_scale.config.section import Added, PolicyName, RecipeConflict, Section, operational_fields, silent_fields
from oar_scale.config.training_sections import FinetuneConfig
from oar_scale.registry import EXTRACTION, MODELS, STAGES, Stage, arm_extraction, fine_tuning

FROM_EXTRACTION = ("stored", "mean", "order-head")
"""The order policies that rest on extracted orders: an arm with another one does not wait for the extraction."""
OF_THE_RUN = frozenset({"views", "mirror"})
"""Fields of ``extract`` that say which views have orders: all arms see the same."""
ALL_ARMS = "all"
"""Stands for every arm of a run where one is named, and so is the name of none."""
ARM_NAME, LONGEST_NAME = r"[a-z0-9_]+", 40


class ArmConfig(Section):
    """An arm: what of ``extract`` and of ``finetune`` it has otherwise than the ordered model. Nothing but orders depends on it."""

    extract: dict[str, JsonValue] = Field({})
    """Other settings of ``extract`` than the recipe's: an extraction of its own, which arms with the same settings share."""
    order: PolicyName | None = None
    """Default: ``finetune.order``."""
    random_share: float | None = Field(None, ge=0, le=1)
    """Default: ``finetune.random_share``."""
    orders_of: Literal["own", "other_images"] | None = None
    """Default: ``finetune.orders_of``."""
    distinct_orders: int | None = Field(None, ge=1)
    """Default: ``finetune.distinct_orders``."""

    def finetune(self, base: FinetuneConfig) -> FinetuneConfig:
        """The settings of its fine-tuning, where the recipe's are ``base``."""
        given = {name: value for name, value in self.model_dump(exclude={"extract"}).items() if value is not None}
        if self.random_share is not None and base.any_view_share is None and self.random_share != base.random_share:
            given["any_view_share"] = base.random_share  # another share of random orders, and the same views
        return base.model_copy(update=given)

    def extraction(self, base: ExtractConfig) -> ExtractConfig:
        """The settings of its extraction, where the recipe's are ``base``. Raises ValidationError where they do not fit together."""
        return _merged(base.model_dump_json(), json.dumps(self.extract)) if self.extract else base


class PipelineConfig(Section):
    """Which optional stages a run has."""

    control: bool = True
    """Also fine-tune on random orders with the same budget: what the orders themselves are worth."""
    seeds: Added[int] = Field(1, ge=1, le=100)
    """Fine-tunings of each kind. In number 0 all is drawn by the recipe's ``seed``; in number k samples, views, dropped captions,
    dropout and random orders are drawn anew. The any-order model and the extracted orders are the same in all."""
    arms: Added[dict[str, ArmConfig]] = Field({})
    """More fine-tunings, by name, which differ in their orders alone (docs/arms.md)."""


def stages_of(pipeline: PipelineConfig, extract: ExtractConfig, finetune: FinetuneConfig) -> Iterator[Stage]:
    """The stages of a recipe whose layout is not ``raster``, each after those it needs; those of one seed before those of the next."""
    extractions = _extractions(pipeline, extract, finetune)
    for stage in STAGES.values():
        if stage.name == "extract":
            yield stage
            yield from (arm_extraction(name) for name in pipeline.arms if extractions[name] == EXTRACTION + name)
        elif stage.name == "finetune":
            for seed in range(pipeline.seeds):
                yield fine_tuning("", seed)
                yield from [fine_tuning("", seed, kind="control")] if pipeline.control else []
                yield from (fine_tuning(name, seed, extraction=extractions[name]) for name in pipeline.arms)
        elif stage.name != "control":
            yield stage


def _extractions(pipeline: PipelineConfig, extract: ExtractConfig, finetune: FinetuneConfig) -> dict[str, str]:
    """The stage that extracts each arm's orders; empty where the arm rests on none."""
    stage_of, chosen = {_identity(extract): "extract"}, dict[str, str]()
    for name, arm in pipeline.arms.items():
        if (arm.finetune(finetune).order or "stored") in FROM_EXTRACTION:
            chosen[name] = stage_of.setdefault(_identity(arm.extraction(extract)), EXTRACTION + name)
        else:
            chosen[name] = ""
    return chosen


def check_arms(pipeline: PipelineConfig, extract: ExtractConfig, finetune: FinetuneConfig) -> None:
    """Raise RecipeConflict for a name that is taken, an extraction that cannot be, or an arm that is the same as another fine-tuning."""
    for name, arm in pipeline.arms.items():
        _check_name(name)
        _check_extraction(name, arm, extract)
        check_orders(f"pipeline.arms.{name}", arm.finetune(finetune), own_extraction=bool(arm.extract))
    extractions = _extractions(pipeline, extract, finetune)
    for name, arm in pipeline.arms.items():
        if arm.finetune(finetune).order == "order-head" and extractions[name].startswith(EXTRACTION):
            raise RecipeConflict(
                f"pipeline.arms.{name}.extract",
                "an order head learns from, and predicts for, the run's own extraction only.\n"
                "Leave it out, or give a run of its own that extraction (extract) and finetune.order order-head.",
            )
    same: dict[str, str] = {_same(finetune, "extract"): "the ordered model (stage finetune)"}
    if pipeline.control:
        same[_same(finetune.model_copy(update={"order": "random"}), "")] = "the control"
    for name, arm in pipeline.arms.items():
        key = _same(arm.finetune(finetune), extractions[name])
        if key in same:
            raise RecipeConflict(
                f"pipeline.arms.{name}", f"has the same orders as {same[key]}.\nLeave it out, or change what it is to differ in."
            )
        same[key] = f"arm {name}"


def check_orders(key: str, finetune: FinetuneConfig, *, own_extraction: bool = False) -> None:
    """Raise RecipeConflict for settings of stored orders where a fine-tuning takes others; ``key`` is where in the recipe it is set."""
    order = finetune.order or "stored"
    of_stored = [name for name in ("orders_of", "distinct_orders") if name not in silent_fields(finetune)]
    if order != "stored" and of_stored:
        raise RecipeConflict(
            f"{key}.{of_stored[0]}", f"says which stored orders are taken, and {key}.order is {order!r}.\nLeave one of them out."
        )
    if order not in FROM_EXTRACTION and own_extraction:
        raise RecipeConflict(
            f"{key}.extract", f"would find orders that nothing is trained on: {key}.order is {order!r}.\nLeave one of them out."
        )


def _check_name(name: str) -> None:
    key, taken = f"pipeline.arms.{name}", {ALL_ARMS, *STAGES, *MODELS, *(old for model in MODELS.values() for old in model.old_names)}
    if not re.fullmatch(ARM_NAME, name) or len(name) > LONGEST_NAME:
        raise RecipeConflict(key, f"the name of an arm is made of a-z, 0-9 and _, at most {LONGEST_NAME} of them: files are named by it.")
    if name in taken or name.startswith(EXTRACTION):
        why = (
            f"begins with {EXTRACTION}, as stages do that extract for an arm"
            if name not in taken
            else "stands for something of every run: a stage, a model, or all arms"
        )
        raise RecipeConflict(key, f"this name {why}.\nChoose another one.")


def _check_extraction(name: str, arm: ArmConfig, base: ExtractConfig) -> None:
    key = f"pipeline.arms.{name}.extract"
    for field in arm.extract:
        if field in OF_THE_RUN or field in operational_fields(ExtractConfig):
            raise RecipeConflict(f"{key}.{field}", f"is the same for all arms.\nSet extract.{field}.")
    try:
        arm.extraction(base)
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, RecipeConflict):
            raise RecipeConflict(f"pipeline.arms.{name}.{cause.key}", str(cause)) from error
        field = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            fields = sorted(set(ExtractConfig.model_fields) - operational_fields(ExtractConfig) - OF_THE_RUN)
            raise RecipeConflict(f"{key}.{field}", f"unknown key. Keys here: {', '.join(fields)}.") from error
        raise RecipeConflict(f"{key}.{field}", re.sub("^Input should", "must", first["msg"]) + ".") from error


def _same(finetune: FinetuneConfig, extraction: str) -> str:
    """What its orders come from, which is all that a fine-tuning differs from others in."""
    if finetune.order == "random" or finetune.random_share == 1:
        return "random"
    return fingerprint(
        {
            "order": [finetune.order or "stored", finetune.random_share, finetune.orders_of, finetune.distinct_orders],
            "extraction": extraction,
        }
    )


def _identity(extract: ExtractConfig) -> str:
    """What the orders depend on: not on how another score than its own would be computed."""
    unused = set() if extract.score == "info_gain" else {"info_gain_samples", "info_gain_candidates"}
    return fingerprint(extract.model_dump(mode="json", exclude={*silent_fields(extract), *unused}))


@lru_cache
def _merged(base: str, changes: str) -> ExtractConfig:
    return ExtractConfig.model_validate_json(json.dumps({**json.loads(base), **json.loads(changes)}), strict=True)
