"""Scores are what their names say, whatever the blocks that the logits come in."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oar_scale.config.schema import Score
from oar_scale.orders import scores
from oar_scale.orders.scores import SCORES, score_logits, score_rows


def plain(score: Score, logits_V: torch.Tensor, target: int, uniform: float) -> float:
    """By the definition, in float64."""
    log_p = logits_V.double().log_softmax(0)
    p = log_p.exp()
    best = p.sort(descending=True).values
    drawn = min(int((p.cumsum(0) < uniform).sum()), len(p) - 1)
    values = {
        "gt_logprob": log_p[target],
        "max_prob": log_p.max(),
        "neg_entropy": (p * log_p).sum(),
        "margin": best[0] - (best[1] if len(best) > 1 else 0.0),
        "sampled": log_p[drawn],
    }
    return float(values[score])


@settings(max_examples=150, deadline=None)
@given(
    score=st.sampled_from(sorted(SCORES)),
    rows=st.integers(1, 7),
    codes=st.integers(1, 12),
    block=st.tuples(st.integers(1, 8), st.integers(1, 13)),
    scale=st.sampled_from([0.1, 1.0, 10.0, 60.0]),
    offset=st.sampled_from([0.0, -300.0, 90.0]),
    seed=st.integers(0, 1000),
)
def test_a_score_does_not_depend_on_the_blocks_of_logits(
    score: Score, rows: int, codes: int, block: tuple[int, int], scale: float, offset: float, seed: int
) -> None:
    """A score does not depend on the blocks its logits come in."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, codes, generator=generator) * scale + offset
    targets, uniform = torch.randint(codes, (rows,), generator=generator), torch.rand(rows, generator=generator, dtype=torch.float64)
    uniform = uniform.clamp(1e-3, 1 - 1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(scores.BLOCK, "cpu", block)
        result = score_rows(logits.t().contiguous(), torch.eye(rows), score, targets, uniform) if rows == 1 else None
        weight = torch.randn(codes, 5, generator=generator)
        x = torch.randn(rows, 5, generator=generator)
        in_blocks = score_rows(weight, x, score, targets, uniform)
    if result is not None:
        torch.testing.assert_close(result[0].item(), plain(score, logits[0], int(targets[0]), float(uniform[0])), rtol=1e-4, atol=1e-4)
    at_once = score_logits(score, x @ weight.t(), targets, uniform)
    torch.testing.assert_close(in_blocks, at_once, rtol=1e-4, atol=1e-5)
    for row in range(rows):
        expected = plain(score, (x @ weight.t())[row], int(targets[row]), float(uniform[row]))
        assert at_once[row].item() == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_scores_are_what_their_names_say() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]])
    logits, target = p.log() + 3, torch.tensor([1])
    expected: dict[Score, float] = {
        "gt_logprob": np.log(0.3),
        "max_prob": np.log(0.5),
        "neg_entropy": float((p * p.log()).sum()),
        "margin": 0.2,
        "sampled": np.log(0.2),
    }
    assert SCORES.keys() == expected.keys() == set(get_args(Score)) - {"info_gain"}, "test_look_ahead.py has the last"
    for name, value in expected.items():
        assert score_logits(name, logits, target, torch.tensor([0.9], dtype=torch.float64)).item() == pytest.approx(value, rel=1e-5)
    assert torch.equal(logits, p.log() + 3)


def test_a_sampled_code_has_the_probability_of_the_model() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    uniform = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    scores = score_logits("sampled", p.log().expand(2000, -1), torch.zeros(2000, dtype=torch.long), uniform)
    for probability in p:
        share = (scores - probability.log()).abs().lt(1e-4).float().mean().item()
        assert share == pytest.approx(float(probability), abs=2e-3)


def test_cells_the_model_is_certain_of_keep_their_ranks() -> None:
    logits = torch.zeros(2, 4)
    logits[0, 0], logits[1, 0] = 18.0, 20.0
    for score in ("gt_logprob", "max_prob"):
        sure, surer = score_logits(score, logits, torch.zeros(2, dtype=torch.long)).tolist()
        assert sure < surer < 0  # log_softmax gives 0 for both
        assert surer == pytest.approx(-3 * np.exp(-20), rel=1e-4)


@pytest.mark.parametrize("score", sorted(SCORES))
def test_a_logit_that_is_no_number_gives_no_score(score: Score) -> None:
    logits = torch.zeros(1, 4)
    logits[0, 2] = torch.nan
    assert score_logits(score, logits, torch.zeros(1, dtype=torch.long), torch.tensor([0.5])).isnan().all()


def test_bfloat16_rows_are_scored_in_float32() -> None:
    x, weight = torch.randn(6, 16).bfloat16(), torch.randn(9, 16).bfloat16()
    scores = score_rows(weight, x, "gt_logprob", torch.arange(6))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, score_logits("gt_logprob", (x @ weight.t()).float(), torch.arange(6)))
