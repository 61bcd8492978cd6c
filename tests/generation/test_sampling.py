"""Generation against full forward passes, and editing against the codes it must leave alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from small_models import random_codes, random_orders, random_text, small_model
from torch import Tensor

from oar_scale.generation.editing import box_mask, centre_mask, redraw
from oar_scale.generation.sampling import Known, generate
from oar_scale.generation.settings import SampleSettings
from oar_scale.model import AnyOrderModel, Decoder


def choices(*, guidance: float = 1.0, temperature: float = 1.0, top_k: int = 0, order_temperature: float = 0.0) -> SampleSettings:
    return SampleSettings(guidance=guidance, temperature=temperature, top_k=top_k, order_temperature=order_temperature)


@torch.no_grad()
def condition_of(model: AnyOrderModel, images: int, seed: int = 0) -> Tensor:
    return model.condition(random_text(model, images, seed))


@torch.no_grad()
def guided_next_logits(model: AnyOrderModel, codes_1N: Tensor, placed: list[int], cell: int, condition_1TD: Tensor, scale: float) -> Tensor:
    """Logits [V] of one cell after the placed ones, from two full forward passes."""
    rest = [c for c in range(model.spec.cells) if c != cell and c not in placed]
    order_1N = torch.tensor([[*placed, cell, *rest]])
    conditional, null = (model(codes_1N, order_1N, rows)[0, len(placed)] for rows in (condition_1TD, model.null_condition(1)))
    guided: Tensor = null + scale * (conditional - null)
    return guided


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("known", [[], [4, 0]])
def test_greedy_generation_equals_brute_force_over_full_forwards(guidance: float, known: list[int]) -> None:
    model = small_model()
    start, condition = random_codes(model, 2), condition_of(model, 2)
    cells = torch.tensor([known, known], dtype=torch.long)
    given_codes = Known(cells, start.gather(1, cells))
    drawn = generate(model, condition, choices(guidance=guidance, top_k=1), 0, known=given_codes)
    for image in range(2):
        placed, scores, codes = list(known), [0.0] * len(known), start[image : image + 1].clone()
        while len(placed) < model.spec.cells:
            empty = [c for c in range(model.spec.cells) if c not in placed]
            own = condition[image : image + 1]
            logits = {c: guided_next_logits(model, codes, placed, c, own, guidance) for c in empty}
            cell = max(empty, key=lambda c: float(logits[c].log_softmax(0).max()))
            codes[0, cell] = logits[cell].argmax()
            placed.append(cell)
            scores.append(float(logits[cell].log_softmax(0).max()))
        assert drawn.order_BN[image].tolist() == placed
        assert drawn.codes_BN[image].tolist() == codes[0].tolist()
        torch.testing.assert_close(drawn.score_BN[image], torch.tensor(scores), rtol=1e-3, atol=1e-4)


@examples(max_examples=20, deadline=None)
@given(
    grid=st.integers(1, 4),
    batch=st.integers(1, 3),
    seed=st.integers(0, 1000),
    guidance=st.sampled_from([0.0, 1.0, 3.0]),
    order_temperature=st.sampled_from([0.0, 2.0]),
)
def test_the_order_it_chooses_is_a_permutation(grid: int, batch: int, seed: int, guidance: float, order_temperature: float) -> None:
    model = small_model(grid=grid, seed=seed)
    settings = choices(guidance=guidance, order_temperature=order_temperature)
    drawn = generate(model, condition_of(model, batch, seed), settings, seed)
    assert torch.equal(drawn.order_BN.sort(1).values, torch.arange(grid * grid).expand(batch, -1))
    assert drawn.codes_BN.min() >= 0
    assert drawn.codes_BN.max() < model.spec.vocab_size
    assert drawn.score_BN.isfinite().all()
    assert drawn.score_BN.max() <= 0


def test_a_given_order_is_followed_with_greedy_codes() -> None:
    """A given order is followed and its codes are greedy in that order."""
    model = small_model()
    order, condition = random_orders(model, 2, seed=3), condition_of(model, 2)
    drawn = generate(model, condition, choices(top_k=1), 0, order_BN=order)
    assert torch.equal(drawn.order_BN, order)
    with torch.no_grad():
        greedy = model(drawn.codes_BN, order, condition).argmax(-1)
    assert torch.equal(drawn.codes_BN.gather(1, order), greedy)


def test_the_seed_alone_decides_the_images() -> None:
    """The same seed draws the same images and another seed others."""
    model = small_model()
    condition, settings = condition_of(model, 2), choices(guidance=2.0, order_temperature=0.5, temperature=2.0)
    first, again, other = (generate(model, condition, settings, seed) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.codes_BN, other.codes_BN)
    assert not torch.equal(first.order_BN, other.order_BN)


def test_codes_are_drawn_with_the_probabilities_of_the_model() -> None:
    model = small_model(grid=1, vocab=5)
    condition = condition_of(model, 1).expand(4000, -1, -1)
    with torch.no_grad():
        logits = model(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), condition[:1])[0, 0]
    for temperature in (1.0, 3.0):
        drawn = generate(model, condition, choices(temperature=temperature), 0).codes_BN[:, 0]
        share = torch.bincount(drawn, minlength=5) / 4000
        torch.testing.assert_close(share, (logits / temperature).softmax(0), atol=0.03, rtol=0)
    kept = set(generate(model, condition, choices(temperature=3.0, top_k=2), 0).codes_BN[:, 0].tolist())
    assert kept == set(logits.topk(2).indices.tolist())


@torch.no_grad()
def test_of_cells_that_differ_by_roundings_the_first_is_taken() -> None:
    """As in extraction: the last bits of a confidence depend on the batch that it was computed in."""
    model = small_model()
    model.output.weight.mul_(1e-7 / float(model.output.weight.std()))
    condition = condition_of(model, 3)
    logits = Decoder(model).candidate_rows(Decoder(model).begin(condition), torch.arange(9).expand(3, -1)).logits_BRV
    best = logits.log_softmax(2).amax(2)
    assert 0 < float(best.max() - best.min()) < 1e-6 and best.argmax(1).any(), "there is something to be strict about"
    assert generate(model, condition, choices(), 0).order_BN.tolist() == [list(range(9))] * 3


def test_order_temperature_spreads_the_choice_of_cells() -> None:
    """Order temperature spreads the choice of cells and zero takes the most confident."""
    model = small_model(grid=2)
    condition = condition_of(model, 1).expand(4000, -1, -1)
    with torch.no_grad():
        codes = torch.zeros(1, 4, dtype=torch.long)
        confidence = torch.stack([guided_next_logits(model, codes, [], cell, condition[:1], 1.0).log_softmax(0).max() for cell in range(4)])
    first = generate(model, condition, choices(), 0).order_BN[:, 0]
    assert first.unique().tolist() == [int(confidence.argmax())]
    for temperature in (0.5, 2.0):
        first = generate(model, condition, choices(order_temperature=temperature), 0).order_BN[:, 0]
        share = torch.bincount(first, minlength=4) / 4000
        torch.testing.assert_close(share, (confidence / temperature).softmax(0), atol=0.03, rtol=0)


def test_guidance_1_sees_no_null_and_guidance_0_no_caption() -> None:
    """Guidance one does not see the null condition and guidance zero not the caption."""
    model, changed = small_model(), small_model()
    with torch.no_grad():
        changed.conditioner.null_rows.mul_(-2.0)
    condition, other = condition_of(model, 2), condition_of(model, 2, seed=9)
    plain, moved = (generate(m, condition, choices(top_k=1), 0) for m in (model, changed))
    assert torch.equal(plain.codes_BN, moved.codes_BN)
    assert torch.equal(plain.score_BN, moved.score_BN)
    blind = [generate(model, rows, choices(top_k=1, guidance=0.0), 0) for rows in (condition, other, model.null_condition(2))]
    assert torch.equal(blind[0].score_BN, blind[1].score_BN)
    unguided = generate(model, model.null_condition(2), choices(top_k=1), 0)
    assert torch.equal(blind[2].codes_BN, unguided.codes_BN)
    guided = [generate(m, condition, choices(top_k=1, guidance=2.0), 0) for m in (model, changed)]
    assert not torch.equal(guided[0].score_BN, guided[1].score_BN)


@examples(max_examples=15, deadline=None)
@given(
    layout=st.sampled_from(["instructed", "dual", "decoupled", "grouped"]),
    seed=st.integers(0, 1000),
    redo_count=st.integers(0, 9),
    guidance=st.sampled_from([1.0, 2.0]),
)
def test_inpainting_keeps_the_known_codes_and_places_them_first(layout: str, seed: int, redo_count: int, guidance: float) -> None:
    model = small_model(layout=layout, seed=seed)
    codes, condition = random_codes(model, 2, seed), condition_of(model, 2, seed)
    redo = random_orders(model, 2, seed) < redo_count
    drawn = redraw(model, codes, redo, condition, choices(guidance=guidance), seed)
    kept = model.spec.cells - redo_count
    assert torch.equal(drawn.codes_BN[~redo], codes[~redo])
    assert torch.equal(drawn.order_BN.sort(1).values, torch.arange(9).expand(2, -1))
    for image in range(2):
        assert drawn.order_BN[image, :kept].tolist() == torch.nonzero(~redo[image]).flatten().tolist()
    hidden = torch.where(redo, (codes + 1) % model.spec.vocab_size, codes)
    again = redraw(model, hidden, redo, condition, choices(guidance=guidance), seed)
    assert torch.equal(drawn.codes_BN, again.codes_BN)  # what lay under the mask is never looked at


def test_inpainting_follows_a_given_order() -> None:
    """Inpainting in a given order shows and draws the cells in that order."""
    model = small_model()
    codes, condition, order = random_codes(model, 2), condition_of(model, 2), random_orders(model, 2, seed=4)
    redo = box_mask(3, 0, 1, 2, 2)
    drawn = redraw(model, codes, redo, condition, choices(top_k=1), 0, order_BN=order)
    for image in range(2):
        sequence = order[image].tolist()
        assert drawn.order_BN[image].tolist() == [c for c in sequence if not redo[c]] + [c for c in sequence if redo[c]]
    with torch.no_grad():
        greedy = model(drawn.codes_BN, drawn.order_BN, condition).argmax(-1)
    assert torch.equal(drawn.codes_BN.gather(1, drawn.order_BN)[:, 5:], greedy[:, 5:])


def test_inpainting_depends_on_the_known_codes() -> None:
    model = small_model()
    condition, redo = condition_of(model, 1), ~centre_mask(3, 1)
    codes = random_codes(model, 1)
    drawn = [redraw(model, (codes + shift) % 7, redo, condition, choices(top_k=1), 0) for shift in (0, 3)]
    assert not torch.equal(drawn[0].score_BN, drawn[1].score_BN)


def test_masks_mark_the_box() -> None:
    assert box_mask(4, 1, 0, 2, 3).view(4, 4).int().tolist() == [[0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert centre_mask(4, 2).view(4, 4).int().tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    for box in ((0, 0, 5, 1), (-1, 0, 2, 2), (3, 3, 2, 1), (0, 0, 0, 1)):
        with pytest.raises(ValueError, match="does not lie inside a 4 x 4 grid"):
            box_mask(4, *box)


def test_images_of_a_batch_may_redo_different_numbers_of_cells() -> None:
    model = small_model()
    codes, condition, settings = random_codes(model, 3), condition_of(model, 3), choices(guidance=2.0)
    redo = torch.stack([box_mask(3, 0, 0, 1, 2), box_mask(3, 0, 0, 3, 3), box_mask(3, 1, 1, 2, 2)])
    drawn = redraw(model, codes, redo, condition, settings, 4)
    assert torch.equal(drawn.codes_BN[~redo], codes[~redo])
    for image in range(3):
        one = slice(image, image + 1)
        alone = redraw(model, codes[one], redo[image], condition[one], settings, 4, images_B=np.array([image]))
        assert torch.equal(drawn.codes_BN[one], alone.codes_BN)
        assert torch.equal(drawn.order_BN[one], alone.order_BN)
        assert int(drawn.passes_B[image]) == int(redo[image].sum())


@pytest.mark.parametrize(
    ("cells", "codes", "complaint"),
    [
        ([[1, 1]], [[0, 0]], "named twice"),
        ([[9]], [[0]], "known cells must lie in 0..8"),
        ([[1]], [[7]], "known codes must lie in 0..6"),
        ([[1]], [[0, 1]], "must both be"),
        ([[-1, 1]], [[0, 0]], "must come behind all others"),
    ],
)
def test_impossible_known_cells_are_refused(cells: list[list[int]], codes: list[list[int]], complaint: str) -> None:
    model = small_model()
    with pytest.raises(ValueError, match=complaint):
        generate(model, condition_of(model, 1), choices(), 0, known=Known(torch.tensor(cells), torch.tensor(codes)))


def test_an_order_that_is_no_permutation_is_refused() -> None:
    model = small_model()
    with pytest.raises(ValueError, match=r"permutation of 0..8"):
        generate(model, condition_of(model, 1), choices(), 0, order_BN=torch.zeros(1, 9, dtype=torch.long))


def test_a_model_in_training_mode_is_refused() -> None:
    model = small_model().train()
    with pytest.raises(ValueError, match="training mode"):
        generate(model, model.null_condition(1), choices(), 0)
