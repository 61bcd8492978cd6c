"""Likelihood per order and caption, against sums done by hand; pictures against the pixels they are made of."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import random_codes, random_text, small_model

from oar_scale.evaluation.likelihood import (
    nll_estimate,
    nll_table,
    paired_difference,
    prediction_table,
    random_orders,
    raster_orders,
    shuffled_captions,
)
from oar_scale.evaluation.pictures import contact_sheet, decode_pictures, order_map, png, step_of_cell, upscale
from oar_scale.generation.sampling import generate
from oar_scale.generation.settings import SampleSettings
from oar_scale.orders.extraction import extract_orders
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.tokenizers.vq import VQSpec, VQTokenizer


@torch.no_grad()
def test_the_table_holds_each_images_own_nll_whatever_the_batch() -> None:
    model = small_model()
    codes, text = random_codes(model, 5), random_text(model, 5)
    orders = {"random": random_orders(5, 9, seed=1), "raster": raster_orders(5, 9)}
    table = nll_table(model, codes, text, orders, batch=2)
    assert table.keys() == orders.keys()
    for name, order in orders.items():
        for image in range(5):
            part = slice(image, image + 1)
            log_p = model(codes[part], order[part], model.condition(text[part])).log_softmax(-1)[0]
            by_hand = -torch.stack([log_p[step, codes[image, order[image, step]]] for step in range(9)]).double().mean()
            torch.testing.assert_close(table[name][image], by_hand, rtol=1e-4, atol=1e-5)


def test_the_confidence_order_is_likelier_than_random_ones() -> None:
    """The order of highest confidence is likelier than random ones."""
    model = small_model()
    codes, text = random_codes(model, 16), random_text(model, 16)
    with torch.no_grad():
        confident = extract_orders(model, codes, model.condition(text), ExtractionSettings(score="gt_logprob")).order_BN
    table = nll_table(model, codes, text, {"confidence": confident, "random": random_orders(16, 9, seed=0)}, batch=8)
    difference = paired_difference(table["confidence"], table["random"])
    assert difference.mean < -2 * difference.standard_error


@torch.no_grad()
def test_predictions_are_those_of_the_logits_whatever_the_batch() -> None:
    model = small_model()
    codes, text, order = random_codes(model, 5), random_text(model, 5), random_orders(5, 9, seed=1)
    table = prediction_table(model, codes, text, order, batch=2)
    torch.testing.assert_close(table["nll"], nll_table(model, codes, text, {"given": order}, batch=5)["given"], rtol=1e-6, atol=1e-6)
    p = model(codes, order, model.condition(text)).softmax(-1)
    top, code = p.max(-1)
    torch.testing.assert_close(table["entropy"], -(p * p.log()).sum(-1).double().mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(table["top probability"], top.double().mean(1), rtol=1e-5, atol=1e-6)
    assert torch.equal(table["top accuracy"], (code == codes.gather(1, order)).double().mean(1))


@torch.no_grad()
def test_a_model_is_calibrated_on_codes_it_drew_itself() -> None:
    """Along its max_prob orders its NLL is its entropy; sharpened it is over-confident about the same codes, flattened the contrary."""
    model = small_model()
    text = random_text(model, 400)
    settings = SampleSettings(guidance=1.0, temperature=1.0, top_k=0, order_temperature=0.0)
    codes = generate(model, model.condition(text), settings, 3).codes_BN
    in_errors = []
    for sharpening in (1.0, 3.0, 1 / 9):
        model.output.weight *= sharpening
        order = extract_orders(model, codes, model.condition(text), ExtractionSettings()).order_BN
        nll = nll_table(model, codes, text, {"own": order}, 100)["own"]
        gap = paired_difference(nll, prediction_table(model, codes, text, order, 100)["entropy"])
        in_errors.append(gap.mean / gap.standard_error)
    assert abs(in_errors[0]) < 3 and in_errors[1] > 10 and in_errors[2] < -10


def test_random_orders_are_permutations_that_belong_to_the_image() -> None:
    many, few = random_orders(50, 16, seed=3), random_orders(7, 16, seed=3)
    assert torch.equal(many.sort(1).values, torch.arange(16).expand(50, -1))
    assert torch.equal(many[:7], few)
    assert len(many.unique(dim=0)) == 50
    assert not torch.equal(few, random_orders(7, 16, seed=4))


def test_shuffled_captions_give_no_image_a_caption_like_its_own() -> None:
    text = torch.tensor([[1, 2], [3, 0], [1, 2], [4, 4], [3, 0], [1, 2]])
    for seed in range(20):
        shuffled = shuffled_captions(text, seed)
        assert (shuffled != text).any(1).all()
        assert {tuple(row) for row in shuffled.tolist()} == {tuple(row) for row in text.tolist()}
        assert torch.equal(shuffled, shuffled_captions(text, seed))


def test_captions_that_are_all_the_same_cannot_be_shuffled() -> None:
    with pytest.raises(ValueError, match="at least two different"):
        shuffled_captions(torch.tensor([[1, 2], [1, 2]]), 0)


def test_a_paired_difference_cancels_what_both_sides_share() -> None:
    """A paired difference does not suffer from what both sides share."""
    hardness = torch.linspace(1, 100, 50)
    gain = torch.tensor([0.1, 0.3]).repeat(25)
    difference = paired_difference(hardness - gain, hardness)
    assert difference.mean == pytest.approx(-0.2, abs=1e-5)
    assert difference.standard_error == pytest.approx(float(gain.double().std()) / 50**0.5, abs=1e-5)
    assert nll_estimate(hardness).standard_error > 100 * difference.standard_error


def test_values_of_different_images_are_not_paired() -> None:
    with pytest.raises(ValueError, match="same images"):
        paired_difference(torch.zeros(3), torch.zeros(4))


def test_an_order_of_another_grid_is_named() -> None:
    model = small_model()
    with pytest.raises(ValueError, match=r"order 'raster' is \[2, 16\], the codes are \[2, 9\]"):
        nll_table(model, random_codes(model, 2), random_text(model, 2), {"raster": raster_orders(2, 16)}, batch=2)


def test_a_model_in_training_mode_is_refused() -> None:
    model = small_model().train()
    with pytest.raises(ValueError, match="training mode"):
        nll_table(model, random_codes(model, 2), random_text(model, 2), {"raster": raster_orders(2, 9)}, batch=2)


def test_pictures_are_what_the_tokenizer_decodes() -> None:
    torch.manual_seed(0)
    vq = VQTokenizer(VQSpec(image_size=8, channels=32, multipliers=(1, 1), res_blocks=1, latent_channels=32, codebook_size=16)).eval()
    codes = torch.randint(16, (3, 16))
    pictures = decode_pictures(vq, codes, batch=2)
    assert [picture.shape for picture in pictures] == [(8, 8, 3)] * 3
    with torch.no_grad():
        images = vq.decode(codes)
    expected = (images.clamp(-1, 1) + 1) * 127.5
    assert np.abs(np.stack(pictures) - expected.permute(0, 2, 3, 1).numpy()).max() <= 1


def test_an_order_map_runs_from_dark_to_bright_along_the_order() -> None:
    order = torch.tensor([[8, 0, 4, 2, 6, 1, 3, 5, 7]])
    steps = step_of_cell(order)[0]
    assert steps.tolist() == [[1, 5, 3], [6, 2, 7], [4, 8, 0]]
    brightness = order_map(steps).sum(-1).flatten()[order[0].numpy()]
    assert (np.diff(brightness.astype(int)) > 0).all()


def test_a_sheet_shows_each_picture_in_place_and_survives_png() -> None:
    """A sheet shows every picture in its place and survives png."""
    red, blue = np.zeros((2, 3, 3), np.uint8), np.zeros((2, 3, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    sheet = contact_sheet([[red, blue], [blue]], gap=1)
    assert sheet.shape == (5, 7, 3)
    assert (sheet[:2, :3] == red).all()
    assert (sheet[:2, 4:] == blue).all()
    assert (sheet[3:, :3] == blue).all()
    assert (sheet[2] == 255).all()
    assert (sheet[3:, 4:] == 255).all()
    large = upscale(sheet, 3)
    assert large.shape == (15, 21, 3)
    assert (np.asarray(Image.open(io.BytesIO(png(large))))[::3, ::3] == sheet).all()


def test_pictures_of_different_sizes_make_no_sheet() -> None:
    with pytest.raises(ValueError, match="one size"):
        contact_sheet([[np.zeros((2, 2, 3), np.uint8), np.zeros((3, 2, 3), np.uint8)]])
