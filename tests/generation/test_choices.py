"""Which codes may be drawn, what guidance does over an image, and settings that mean nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from oar_scale.config.schema import SampleConfig
from oar_scale.generation.drawing import allowed_logits, guided_rows
from oar_scale.generation.settings import SampleSettings


def choices(**changes: Any) -> SampleSettings:
    return SampleSettings(**{"guidance": 1.0, "temperature": 1.0, "top_k": 0, "order_temperature": 0.0, **changes})


@pytest.mark.parametrize("scale", [3.3, 0.7, 1.0])
def test_a_scale_of_each_row_is_not_rounded_in_bfloat16(scale: float) -> None:
    """Rows with a scale each, as drafts have them, are those of one scale for all: 3.3 is no number of bfloat16, and would be 3.297."""
    rows = torch.randn(6, 50, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    one, each = guided_rows(rows, scale), guided_rows(rows, torch.full((3, 50), scale))
    assert each.dtype == torch.bfloat16
    assert float((each != one).float().mean()) < 0.01  # of another kernel's roundings; of a rounded scale it is a quarter


@examples(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.01, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
)
def test_the_codes_left_are_those_of_the_definitions(seed: int, top_k: int, top_p: float, min_p: float, temperature: float) -> None:
    """One code after the other, as top-k, nucleus and min-p are defined."""
    logits = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(seed)) * 2
    kept = allowed_logits(logits, choices(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)).isfinite()
    for image in range(2):
        for cell in range(3):
            scaled = (logits[image, cell] / temperature).tolist()
            codes = sorted(range(10), key=lambda v, scaled=scaled: -scaled[v])  # type: ignore[misc]
            codes = codes[: top_k or None]
            total, sum_so_far, nucleus = sum(math.exp(scaled[v]) for v in codes), 0.0, []
            for code in codes:
                if sum_so_far < top_p:
                    nucleus.append(code)
                sum_so_far += math.exp(scaled[code]) / total
            expected = {v for v in nucleus if math.exp(scaled[v] - max(scaled)) >= min_p}
            assert set(kept[image, cell].nonzero().flatten().tolist()) == expected


def test_nothing_is_sorted_where_nothing_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("sorted")

    for name in ("topk", "sort", "argsort"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    logits = torch.zeros(1, 1, 7)
    assert allowed_logits(logits, choices(temperature=2.0, min_p=0.1)).isfinite().all()
    with pytest.raises(AssertionError, match="sorted"):
        allowed_logits(logits, choices(top_p=0.5))


@pytest.mark.parametrize("name", ["guidance", "temperature", "top_p", "min_p", "order_temperature", "guidance_start"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, 1e308])
def test_numbers_without_meaning_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        choices(**{"guidance_schedule": "linear", name: value})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"temperature": 0.0}, "temperature 0.0 must be at least 1e-06; top_k=1"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0.0 must be above 0"),
        ({"top_p": 1.1}, "at most 1"),
        ({"min_p": 1.0}, "min_p 1.0 must be below 1"),
        ({"steps": 0}, "steps 0 must be a whole number from 1"),
        ({"draft": -1}, "draft -1"),
        ({"draft": 2, "steps": 4}, "choose one of the two"),
        ({"guidance_schedule": "sine"}, "'sine': there are constant, linear, cosine"),
        ({"guidance_start": 1.0}, "constant guidance has no start"),
    ],
)
def test_settings_that_contradict_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        choices(**changes)


def test_guidance_follows_its_schedule() -> None:
    placed = (0, 64, 128, 192, 256)
    for schedule, expected in {
        "constant": (5.0, 5.0, 5.0, 5.0, 5.0),
        "linear": (1.0, 2.0, 3.0, 4.0, 5.0),
        "cosine": (1.0, 3 - math.sqrt(2), 3.0, 3 + math.sqrt(2), 5.0),
    }.items():
        settings = choices(guidance=5.0, guidance_schedule=schedule)
        assert [settings.scale(count, 256) for count in placed] == pytest.approx(expected)
    late = choices(guidance=1.0, guidance_schedule="linear", guidance_start=3.0)
    assert late.scale(0, 4) == 3.0
    assert late.guided
    assert not choices(guidance=1.0, guidance_schedule="cosine").guided


def test_a_recipe_names_all_settings_of_a_drawing() -> None:
    recipe = SampleConfig(guidance=3.0, guidance_schedule="cosine", top_k=5, top_p=0.9, min_p=0.1, temperature=2.0, draft=4, order="halton")
    wanted = choices(guidance=3.0, guidance_schedule="cosine", top_k=5, top_p=0.9, min_p=0.1, temperature=2.0, draft=4)
    assert SampleSettings.from_recipe(recipe) == wanted
    assert set(SampleSettings.__dataclass_fields__) <= set(SampleConfig.model_fields)
