"""Which fields may change when a run is resumed: exactly those that are marked; what this is to a finished stage; old fingerprints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from oar_scale.config.schema import Recipe
from oar_scale.config.section import Section, added_fields, changeable_fields, limit_fields, operational_fields
from oar_scale.run.stage_markers import stage_fingerprint, stage_settings

TRAINING = {
    "checkpoint_every",
    "evaluate_every",
    "evaluate_orders",
    "keep_best",
    "keep_checkpoints",
    "keep_every",
    "log_every",
    "sample_every",
}
OPERATIONAL = {
    "data": {"loader_processes", "prepare_threads"},
    "extract": {"actors", "gpus_per_actor", "max_retries"},
    "pretrain": TRAINING,
    "finetune": TRAINING,
    "sample": {"draft"},  # the same images in fewer passes
}
DATA, TOKENIZER, TOKENS, PRETRAIN = "671fc747df3c47d8", "12fc9335046fca88", "a74f774eae974d67", "9d8ea1a7fa229f9f"
EXTRACT, FINETUNE = "cdaafdfab93f8dc9", "7ff00a6f94d13f8f"
STORED: list[tuple[dict[str, Any], list[str]]] = [
    ({}, [DATA, TOKENIZER, TOKENS, PRETRAIN, EXTRACT, FINETUNE, "7b87bcb217434094", "14f457619aa34cd4", "1c4c8f115b6d08f6"]),
    ({"model": {"layout": "raster"}}, [DATA, TOKENIZER, TOKENS, "d50f9fdde1e1932c"]),
    (
        {"pipeline": {"control": False}, "data": {"prepare_threads": 7, "loader_processes": 1}, "pretrain": {"log_every": 9}},
        [DATA, TOKENIZER, TOKENS, PRETRAIN, EXTRACT, FINETUNE, "d7843b18d544e829", "b9ab8fabab469042"],
    ),
    (
        {
            "seed": 3,
            "tokenizer": {
                "views": ["center", "center_flip"],
                "text": {"type": "open_clip", "architecture": "ViT-B-32", "weights": "openai"},
            },
            "extract": {"views": 2, "actors": 3},
            "finetune": {"lr": 0.0005, "ema_decay": 0.99, "keep_best": 2},
        },
        [
            DATA,
            "5738361b331137ca",
            "1e635cee525ba5f6",
            "3df3680c06e74054",
            "62981457163f58e5",
            "fa93488e528bfa05",
            "379956eb73508220",
            "c6ee886edec89749",
            "49685b9b0658681e",
        ],
    ),
]
"""Changes to a recipe, and the fingerprints of its stages that version 0.1.0 wrote, before fields were marked."""


def marked(fields_of: Callable[[type[Section]], frozenset[str]]) -> dict[str, set[str]]:
    sections = ((name, field.annotation) for name, field in Recipe.model_fields.items())
    fields = {name: set(fields_of(kind)) for name, kind in sections if isinstance(kind, type) and issubclass(kind, Section)}
    return {name: names for name, names in fields.items() if names}


def test_these_fields_are_operational_and_no_others() -> None:
    assert marked(operational_fields) == OPERATIONAL


def test_these_fields_are_younger_than_runs_that_are_read() -> None:
    assert marked(added_fields) == {
        "data": {"split_by", "test_fraction"},
        "pretrain": {"group_steps"},
        "finetune": {"group_steps", "any_view_share", "orders_of", "distinct_orders"},
        "extract": {"mirror", "info_gain_samples", "info_gain_candidates"},
        "pipeline": {"seeds", "arms"},
        "sample": {"guidance_schedule", "guidance_start", "top_p", "min_p", "score", "steps"},
        "evaluate": {"features"},
    }


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("pretrain", "group_steps", [64, 8]),
        ("finetune", "group_steps", [64, 8]),
        ("sample", "guidance_schedule", "linear"),
        ("sample", "steps", 4),
        ("sample", "score", "sampled"),
    ],
)
def test_a_younger_field_counts_once_it_is_set(section: str, field: str, value: object) -> None:
    plain = Recipe.model_validate({"name": "a", "model": {"layout": "grouped"}})
    changed = Recipe.model_validate({"name": "a", "model": {"layout": "grouped"}, section: {field: value}})
    stage = next(stage for stage in plain.stages() if section in stage.sections)
    assert f"{section}.{field}" not in stage_settings(plain, stage)
    assert stage_settings(changed, stage)[f"{section}.{field}"] == value
    assert stage_fingerprint(changed, stage) != stage_fingerprint(plain, stage)


def test_these_fields_may_change_in_a_training_and_no_others() -> None:
    rate = {"lr", "warmup_steps", "schedule", "tail_fraction", "final_lr_fraction"}
    training = {"steps", "weight_decay", "clip_norm", *rate}
    assert marked(changeable_fields) == {
        "data": {"canonical_streams", "shuffle_window_shards"},
        "pretrain": training,
        "finetune": training,
        "parallel": {"gradient_dtype"},
    }
    limits = {"max_non_finite", "spike_guard", "spike_sigmas"}
    assert marked(limit_fields) == {"data": {"max_bad_fraction"}, "pretrain": limits, "finetune": limits}


@pytest.mark.parametrize(("changes", "stored"), STORED)
def test_fingerprints_of_older_runs_still_hold(changes: dict[str, Any], stored: list[str]) -> None:
    extract = {"score": "gt_logprob", **changes.get("extract", {})}  # their default
    recipe = Recipe.model_validate({"name": "stored", **changes, "extract": extract})
    assert [stage_fingerprint(recipe, stage) for stage in recipe.stages()] == stored
