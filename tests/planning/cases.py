"""Plans of the shipped recipes, for tests that ask about parts of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oar_scale.config.loading import load_recipe
from oar_scale.model.spec import ClassSpec, FeatureSpec, ModelSpec, TextSpec
from oar_scale.planning.case import Case
from oar_scale.planning.plan import PlanOptions, case_of

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SHIPPED = sorted([*RECIPES.glob("*.yaml"), *(RECIPES / "evidence").glob("*.yaml")])

L = {"dim": 1024, "layers": 24, "heads": 16, "ffn_hidden": 2816, "vocab_size": 16384, "grid": 16, "dropout": 0.1}
GROUPED_QUERIES = {"dim": 512, "layers": 8, "heads": 8, "kv_heads": 2, "ffn_hidden": 1536, "vocab_size": 1024, "grid": 16}
SPECS: dict[str, ModelSpec] = {
    "instructed, class": ModelSpec(layout="instructed", condition=ClassSpec(classes=1000), **L),
    "raster, class": ModelSpec(layout="raster", condition=ClassSpec(classes=1000), **L),
    "dual, grouped queries, text, no dropout": ModelSpec(layout="dual", condition=TextSpec(vocab=2000, rows=24), **GROUPED_QUERIES),
    "instructed, features": ModelSpec(
        layout="instructed",
        dim=768,
        layers=12,
        heads=12,
        ffn_hidden=2048,
        vocab_size=16384,
        grid=16,
        dropout=0.1,
        condition=FeatureSpec(width=768, rows=77),
    ),
    "decoupled, class": ModelSpec(layout="decoupled", condition=ClassSpec(classes=1000), **L),
    "decoupled, grouped queries, text": ModelSpec(
        layout="decoupled", dropout=0.1, condition=TextSpec(vocab=2000, rows=24), **GROUPED_QUERIES
    ),
    "grouped, class": ModelSpec(layout="grouped", condition=ClassSpec(classes=1000), **{**L, "ffn_hidden": 4096}),
    "grouped, grouped queries, text": ModelSpec(
        layout="grouped", dropout=0.1, condition=TextSpec(vocab=2000, rows=24), **{**GROUPED_QUERIES, "ffn_hidden": 2048}
    ),
    "emoji": ModelSpec(
        layout="instructed",
        dim=256,
        layers=4,
        heads=4,
        ffn_hidden=704,
        vocab_size=512,
        grid=8,
        dropout=0.1,
        condition=TextSpec(vocab=1000, rows=16),
    ),
}


def case(recipe: str = "imagenet", *overrides: str, **options: Any) -> Case:
    """A shipped recipe on a cluster."""
    return case_of(load_recipe(str(RECIPES / f"{recipe}.yaml"), overrides), PlanOptions(**options))
