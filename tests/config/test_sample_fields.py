"""What a recipe may say about drawing, and what that means for runs that are there already."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from oar_scale.config.schema import Recipe
from oar_scale.registry import STAGES
from oar_scale.run.stage_markers import stage_fingerprint, stage_settings


def recipe(**sections: dict[str, object]) -> Recipe:
    return Recipe.model_validate({"name": "sample", **sections})


@pytest.mark.parametrize(
    ("sections", "complaint"),
    [
        ({"sample": {"draft": 4}}, r"(?s)the model decides while it draws.*Name an order"),
        ({"sample": {"draft": 4, "order": "confidence"}}, "the model decides while it draws"),
        ({"sample": {"draft": 4, "steps": 8, "order": "halton"}}, "two ways to place several cells"),
        ({"sample": {"draft": 4, "order": "raster"}, "model": {"layout": "raster"}}, "layout raster cannot draft cells"),
        ({"sample": {"steps": 4}, "model": {"layout": "raster"}}, "layout raster asks for one cell a pass"),
        ({"sample": {"steps": 4, "order": "halton"}, "model": {"layout": "dual"}}, "layout dual asks for one cell a pass"),
        ({"sample": {"top_p": 0}}, "top_p"),
        ({"sample": {"min_p": 1}}, "min_p"),
        ({"sample": {"guidance": float("nan")}}, "guidance"),
        ({"sample": {"temperature": float("inf")}}, "temperature"),
        ({"sample": {"temperature": 1e-9}}, "temperature"),
        ({"sample": {"guidance": 1e38}}, "guidance"),
        ({"sample": {"steps": 10**400}}, "steps"),
        ({"sample": {"guidance_schedule": "sine"}}, "guidance_schedule"),
        ({"sample": {"score": "gt_logprob"}}, "(?s)an image that is being drawn has none there yet.*one of max_prob, neg_entropy"),
        ({"sample": {"score": "entropy"}}, "score"),
        ({"sample": {"guidance_start": 2.0}}, "constant guidance has no start"),
    ],
)
def test_settings_of_drawing_that_cannot_be_are_refused(sections: dict[str, dict[str, object]], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        recipe(**sections)


def test_settings_of_drawing_that_go_together() -> None:
    """The model's own order may take several cells a pass in every layout with a choice; drafts go along any named order."""
    assert recipe(sample={"steps": 4}, model={"layout": "dual"}).sample.steps == 4
    for layout in ("instructed", "dual", "decoupled", "grouped"):
        assert recipe(sample={"draft": 4, "order": "halton"}, model={"layout": layout}).sample.draft == 4


def test_an_evaluation_made_before_these_settings_still_counts() -> None:
    """At their defaults new settings are no part of a stage's fingerprint, and drafts, which change no image, never are."""
    evaluate = STAGES["evaluate"]
    names = {key for key in stage_settings(recipe(), evaluate) if key.startswith("sample.")}
    assert names == {f"sample.{name}" for name in ("images", "guidance", "temperature", "top_k", "order_temperature", "order")}
    plain, drafted, nucleus = (
        stage_fingerprint(recipe(sample={"order": "halton", **changes}), evaluate) for changes in ({}, {"draft": 8}, {"top_p": 0.9})
    )
    assert plain == drafted
    assert plain != nucleus
