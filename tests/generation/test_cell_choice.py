"""By which score a model chooses the next cell while it draws: against full forward passes, one for each empty cell at each step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_models import CONDITIONS, cond_inputs, random_codes, small_model
from torch import Tensor

from oar_scale.config.run_sections import SAMPLE_SCORES
from oar_scale.data.hashing import permutations
from oar_scale.generation.drawing import allowed_logits, draw_most_confident
from oar_scale.generation.sampling import Known, generate
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import AnyOrderModel, cache
from oar_scale.orders import scores
from oar_scale.orders.selection import CounterRNG

IMAGES, KNOWN = 2, [4, 0]
SEED = 3


def choices(**changes: Any) -> SampleSettings:
    return SampleSettings(**{"guidance": 1.5, "temperature": 1.3, "top_k": 0, "order_temperature": 0.0, **changes})


def definition(score: str, probability_V: Tensor, code: int) -> float:
    """Each score as its text defines it."""
    best = probability_V.sort(descending=True).values
    match score:
        case "max_prob":
            return float(best[0].log())
        case "neg_entropy":
            return float((probability_V * probability_V.log()).sum())
        case "margin":
            return float(best[0] - best[1])
    return float(probability_V[code].log())


@torch.no_grad()
def guided(model: AnyOrderModel, codes_1N: Tensor, placed: list[int], cell: int, condition_1TD: Tensor, scale: float) -> Tensor:
    """Logits [V] of one cell after the placed ones, from two full forward passes."""
    rest = [c for c in range(model.spec.cells) if c != cell and c not in placed]
    order_1N = torch.tensor([[*placed, cell, *rest]])
    conditional, null = (model(codes_1N, order_1N, rows)[0, len(placed)] for rows in (condition_1TD, model.null_condition(1)))
    mixed: Tensor = null + scale * (conditional - null)
    return mixed


@pytest.mark.parametrize("layout", ["instructed", "dual", "decoupled", "grouped"])
@pytest.mark.parametrize("score", SAMPLE_SCORES)
def test_cells_and_codes_are_those_of_full_passes(score: str, layout: str) -> None:
    """The score is of the guided distribution, before temperature and top_k; the code of a cell is drawn with the noise of that cell."""
    model = small_model(layout=layout, seed=1)
    settings, start = choices(score=score, top_k=5), random_codes(model, IMAGES)
    with torch.no_grad():
        condition = model.condition(cond_inputs(model, IMAGES))
    known = torch.tensor([KNOWN] * IMAGES)
    drawn = generate(model, condition, settings, SEED, known=Known(known, start.gather(1, known)))
    noise = CounterRNG.of(SEED, np.arange(IMAGES), 0, 9, torch.device("cpu")).code_gumbel(torch.arange(9).expand(IMAGES, -1), 7)
    for image in range(IMAGES):
        placed, codes, confidence = list(KNOWN), start[image : image + 1].clone(), list[float]()
        while len(placed) < 9:
            asked = dict[int, tuple[float, int, float]]()
            for cell in set(range(9)) - set(placed):
                logits = guided(model, codes, placed, cell, condition[image : image + 1], settings.guidance)
                code = int((allowed_logits(logits, settings) + noise[image, cell]).argmax())
                asked[cell] = definition(score, logits.softmax(0), code), code, float(logits.log_softmax(0).max())
            best = max(asked, key=lambda cell: asked[cell][0])
            placed.append(best)
            codes[0, best] = asked[best][1]
            confidence.append(asked[best][2])
        assert drawn.order_BN[image].tolist() == placed
        assert drawn.codes_BN[image].tolist() == codes[0].tolist()
        torch.testing.assert_close(drawn.score_BN[image, 2:], torch.tensor(confidence), rtol=1e-3, atol=1e-4)


def test_scores_choose_other_cells() -> None:
    model = small_model(grid=4)
    with torch.no_grad():
        condition = model.condition(cond_inputs(model, 4))
    orders = {score: generate(model, condition, choices(score=score), 0).order_BN for score in SAMPLE_SCORES}
    assert len({tuple(order_BN.flatten().tolist()) for order_BN in orders.values()}) == len(SAMPLE_SCORES)


@torch.no_grad()
@pytest.mark.parametrize("steps", [None, 4])
@pytest.mark.parametrize("static", [False, True])
def test_the_seed_chooses_the_first_cell_of_a_blind_start(static: bool, steps: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which ranks highest in the order that breaks ties in extraction, for each image, whatever else is in the batch."""
    if static:
        monkeypatch.setitem(cache.STATIC_ROWS, "cpu", 2**20)
    model, numbers = small_model(layout="decoupled", grid=4, condition=CONDITIONS["class"]), np.arange(40)
    assert model.spec.blind_start
    condition = model.condition(cond_inputs(model, 1)).expand(40, -1, -1)
    for seed in (0, 1):
        drawn = generate(model, condition, choices(steps=steps, top_k=1), seed, images_B=numbers)
        highest_B = permutations("tie", 16, seed, numbers).argmax(1)
        assert drawn.order_BN[:, 0].tolist() == highest_B.tolist()
        assert len(set(highest_B.tolist())) > 8
        alone = generate(model, condition[:1], choices(steps=steps, top_k=1), seed, images_B=numbers[7:8])
        assert torch.equal(alone.order_BN[0], drawn.order_BN[7])


@torch.no_grad()
def test_equal_cells_that_a_model_can_tell_apart_are_placed_in_raster_order() -> None:
    """Also of a model with a blind start, once its image has begun."""
    sighted, blind = small_model(), small_model(layout="decoupled", condition=CONDITIONS["class"])
    known = torch.tensor([[4]])
    for model, first in ((sighted, None), (blind, Known(known, known))):
        model.output.weight.zero_()  # all codes are as likely as one another, everywhere
        drawn = generate(model, model.condition(cond_inputs(model, 1)), choices(), 5, known=first)
        assert drawn.order_BN[0].tolist() == ([] if first is None else [4]) + [cell for cell in range(9) if first is None or cell != 4]


def test_the_greedy_code_is_the_most_likely_one() -> None:
    """So that with it both scores are of the same code."""
    model = small_model(grid=4)
    with torch.no_grad():
        condition = model.condition(cond_inputs(model, 3))
    one, other = (generate(model, condition, choices(score=score, top_k=1, steps=6), 0) for score in ("sampled", "max_prob"))
    assert torch.equal(one.order_BN, other.order_BN) and torch.equal(one.codes_BN, other.codes_BN)


def test_logits_of_all_cells_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cell by cell or all at once, the same cells get the same codes."""
    model, settings, cells = small_model(), choices(score="sampled"), torch.arange(9).expand(IMAGES, -1)
    rows = torch.randn(IMAGES, 9, model.spec.dim, generator=torch.Generator().manual_seed(0))
    rng, asked = CounterRNG.of(0, np.arange(IMAGES), 0, 9, torch.device("cpu")), list[int]()
    model.output.register_forward_hook(lambda head, inputs, output: asked.append(output.shape[1]))
    with torch.no_grad():
        whole = draw_most_confident(model.output, rows, cells, 4, settings, rng, 0)
        monkeypatch.setitem(scores.BLOCK, "cpu", (8 * 2 * IMAGES, 7))
        parts = draw_most_confident(model.output, rows, cells, 4, settings, rng, 0)
    assert asked == [9, 4, 2, 2, 2, 2, 1, 4]
    assert torch.equal(whole.cells_BM, parts.cells_BM) and torch.equal(whole.codes_BM, parts.codes_BM)


@pytest.mark.parametrize(
    ("score", "complaint"),
    [
        (
            "gt_logprob",
            "score 'gt_logprob' looks at the code that lies in a cell, and an image that is being drawn has none there yet: cells",
        ),
        ("info_gain", "score 'info_gain' takes thousands of passes for each image: orders can be extracted by it: cells are chosen by max"),
        ("entropy", "score 'entropy' is unknown: cells are chosen by max_prob"),
        (["max_prob"], "score a list of 1 entries is unknown"),
        (None, "score None is unknown"),
    ],
)
def test_scores_that_nobody_can_draw_by_are_refused(score: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        choices(score=score)
