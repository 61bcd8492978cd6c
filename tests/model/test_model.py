"""The model against itself: one cell at a time against whole images, and what a logit may and may not depend on."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from small_models import random_codes, random_orders, random_text, small_model, small_spec
from torch import Tensor

from oar_scale.errors import UserError
from oar_scale.model import AnyOrderModel, Decoder, load_model, save_model
from oar_scale.model.spec import FeatureSpec
from oar_scale.model.weights import model_of
from oar_scale.orders.extraction import extract_orders
from oar_scale.orders.settings import ExtractionSettings
from oar_scale.tokenizers.safetensors_file import file_damage, load_weights, save_weights


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the roundings of float32 sums taken in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def decoded_logits(model: AnyOrderModel, codes_BN: Tensor, order_BN: Tensor, condition_BTD: Tensor, known: int) -> Tensor:
    """Logits [B, N - known, V] in generation order: the first cells prefilled, then all empty cells scored at every step."""
    image_B = torch.arange(len(codes_BN))
    placed_BN = codes_BN.gather(1, order_BN)
    prefix = Decoder(model).prefill(Decoder(model).begin(condition_BTD), order_BN[:, :known], placed_BN[:, :known])
    rows = []
    for step in range(known, codes_BN.shape[1]):
        empty_BR = order_BN[:, step:].sort(1).values
        winner_B = (empty_BR == order_BN[:, step, None]).int().argmax(1)
        candidates = Decoder(model).candidate_rows(prefix, empty_BR)
        rows.append(candidates.logits_BRV[image_B, winner_B])
        prefix = Decoder(model).commit(prefix, candidates, winner_B, placed_BN[:, step])
    return torch.stack(rows, dim=1) if rows else torch.empty(len(codes_BN), 0, model.spec.vocab_size)


@settings(max_examples=25, deadline=None)
@given(grid=st.integers(1, 4), batch=st.integers(1, 3), seed=st.integers(0, 1000), known_share=st.floats(0, 1))
@torch.no_grad()
def test_one_cell_at_a_time_equals_the_whole_image_in_any_order(grid: int, batch: int, seed: int, known_share: float) -> None:
    model = small_model(grid=grid, seed=seed)
    codes, order = random_codes(model, batch, seed), random_orders(model, batch, seed)
    condition = model.condition(random_text(model, batch, seed))
    known = round(known_share * model.spec.cells)
    whole = model(codes, order, condition)[:, known:]
    assert_same(decoded_logits(model, codes, order, condition, known), whole)


@pytest.mark.parametrize("layout", ["instructed", "dual", "decoupled", "grouped"])
def test_a_model_first_used_in_inference_mode_can_be_trained(layout: str) -> None:
    model = small_model(layout=layout)
    codes, order, text = random_codes(model, 2, 0), random_orders(model, 2, 0), random_text(model, 2, 0)
    with torch.inference_mode():
        model(codes, order, model.condition(text))
    model(codes, order, model.condition(text)).sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "qkv" in name)


@torch.no_grad()
def test_known_cells_may_come_in_parts_and_between_others() -> None:
    """Known cells may arrive in several parts and between drawn ones."""
    model = small_model()
    codes, order, condition = random_codes(model, 2), random_orders(model, 2), model.condition(random_text(model, 2))
    placed, first = codes.gather(1, order), torch.zeros(2, dtype=torch.long)
    prefix = Decoder(model).prefill(Decoder(model).begin(condition), order[:, :2], placed[:, :2])
    candidates = Decoder(model).candidate_rows(prefix, order[:, 2:])
    prefix = Decoder(model).commit(prefix, candidates, first, placed[:, 2])
    prefix = Decoder(model).prefill(Decoder(model).prefill(prefix, order[:, 3:4], placed[:, 3:4]), order[:, 4:7], placed[:, 4:7])
    logits = Decoder(model).candidate_rows(prefix, order[:, 7:]).logits_BRV[:, 0]
    assert_same(logits, model(codes, order, condition)[:, 7])


@torch.no_grad()
def test_a_candidate_does_not_see_the_other_candidates() -> None:
    model = small_model()
    codes, order, condition = random_codes(model, 2), random_orders(model, 2), model.condition(random_text(model, 2))
    known = Decoder(model).prefill(Decoder(model).begin(condition), order[:, :4], codes.gather(1, order[:, :4]))
    together = Decoder(model).candidate_rows(known, order[:, 4:]).logits_BRV
    for r in range(5):
        alone = Decoder(model).candidate_rows(known, order[:, 4 + r : 5 + r]).logits_BRV[:, 0]
        assert_same(together[:, r], alone)


@torch.no_grad()
@pytest.mark.parametrize("step", [0, 3, 7])
def test_a_logit_depends_on_earlier_codes_alone(step: int) -> None:
    model = small_model()
    codes, order, condition = random_codes(model, 1), random_orders(model, 1), model.condition(random_text(model, 1))
    before = model(codes, order, condition)
    changed = codes.clone()
    changed[0, order[0, step]] = (changed[0, order[0, step]] + 1) % model.spec.vocab_size
    after = model(changed, order, condition)
    assert torch.equal(before[:, : step + 1], after[:, : step + 1])  # the changed code's own logits included
    assert (before[:, step + 1 :] - after[:, step + 1 :]).abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_a_logit_does_not_depend_on_the_cells_after_its_own() -> None:
    """A logit depends on the requested cell and not on the cells after it."""
    model = small_model()
    codes, condition = random_codes(model, 1), model.condition(random_text(model, 1))
    order = torch.arange(9)[None]
    swapped_later = torch.tensor([[0, 1, 2, 3, 8, 7, 6, 5, 4]])
    before, after = model(codes, order, condition), model(codes, swapped_later, condition)
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4] - after[:, 4]).abs().max() > 1e-3


@torch.no_grad()
def test_images_of_a_batch_do_not_mix() -> None:
    model = small_model()
    codes, order, condition = random_codes(model, 3), random_orders(model, 3), model.condition(random_text(model, 3))
    batch = model(codes, order, condition)
    for image in range(3):
        part = slice(image, image + 1)
        assert_same(batch[part], model(codes[part], order[part], condition[part]))


@torch.no_grad()
def test_a_dropped_caption_is_the_null_condition() -> None:
    model = small_model()
    text = random_text(model, 3)
    condition = model.condition(text, torch.tensor([False, True, False]))
    assert torch.equal(condition[1], model.null_condition(1)[0])
    assert torch.equal(condition[[0, 2]], model.condition(text)[[0, 2]])
    assert torch.equal(model.condition(torch.zeros_like(text)), model.null_condition(3))


@torch.no_grad()
def test_padding_does_not_leak_into_a_caption() -> None:
    model = small_model()
    text = random_text(model, 1)
    text[0, 2:] = 0
    before = model.condition(text)
    model.conditioner.embedding.weight[0].add_(1.0)
    assert torch.equal(model.condition(text), before)
    assert torch.equal(before[0, 2:], model.null_condition(1)[0, 2:])


@torch.no_grad()
def test_the_caption_changes_the_logits() -> None:
    model = small_model()
    codes, order = random_codes(model, 1), random_orders(model, 1)
    first, second = (model(codes, order, model.condition(random_text(model, 1, seed))) for seed in (1, 2))
    assert (first - second).abs().amax(-1).min() > 1e-3


def test_the_null_condition_is_trained() -> None:
    model = small_model()
    model.loss(random_codes(model, 2), random_orders(model, 2), model.null_condition(2))[0].backward()
    assert model.conditioner.null_rows.grad is not None
    assert model.conditioner.null_rows.grad.abs().amax(1).min() > 0


@torch.no_grad()
def test_the_first_loss_is_log_v() -> None:
    model = AnyOrderModel(small_spec(vocab_size=37, grid=4))
    nll = model.nll(random_codes(model, 2), random_orders(model, 2), model.condition(random_text(model, 2)))
    assert_same(nll, torch.full((2, 16), math.log(37)))


@torch.no_grad()
def test_nll_is_the_log_probability_of_the_image_in_that_order() -> None:
    model = small_model()
    codes, order, condition = random_codes(model, 2), random_orders(model, 2), model.condition(random_text(model, 2))
    log_p = model(codes, order, condition).log_softmax(-1)
    for image in range(2):
        for step in range(9):
            expected = -log_p[image, step, codes[image, order[image, step]]]
            assert_same(model.nll(codes, order, condition)[image, step], expected)


def test_dropout_is_active_in_training_and_only_there() -> None:
    model = small_model(dropout=0.5)
    arguments = random_codes(model, 1), random_orders(model, 1), model.null_condition(1)
    assert torch.equal(model(*arguments), model(*arguments))
    model.train()
    assert not torch.equal(model(*arguments), model(*arguments))


def test_a_model_can_be_trained_after_an_extraction() -> None:
    """A model can be trained after orders were extracted with it."""
    model = small_model()
    codes = random_codes(model, 1)
    order = extract_orders(model, codes, model.null_condition(1), ExtractionSettings()).order_BN.clone()
    model.train().loss(codes, order, model.null_condition(1))[0].backward()
    assert model.tok_embeddings.weight.grad is not None


@torch.no_grad()
def test_a_saved_model_is_the_same_model(tmp_path: Path) -> None:
    model, uri = small_model(), str(tmp_path / "model.safetensors")
    save_model(uri, model)
    loaded = load_model(uri)
    assert loaded.spec == model.spec
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


@torch.no_grad()
def test_half_precision_halves_the_file_and_keeps_the_nll(tmp_path: Path) -> None:
    """Half precision halves the file and barely moves the likelihood."""
    model, full, half = small_model(), str(tmp_path / "full"), str(tmp_path / "half")
    save_model(full, model)
    save_model(half, model, half=True)
    assert os.path.getsize(half) < 0.6 * os.path.getsize(full)
    loaded = load_model(half)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    codes, order = random_codes(model, 4), random_orders(model, 4)
    means = [m.nll(codes, order, m.null_condition(4)).mean() for m in (model, loaded)]
    torch.testing.assert_close(means[0], means[1], rtol=0.02, atol=0)


@pytest.mark.parametrize("half", [False, True])
def test_loading_draws_nothing_and_gives_whole_trainable_weights(tmp_path: Path, half: bool) -> None:
    uri = str(tmp_path / "model.safetensors")
    save_model(uri, small_model(vocab=5), half=half)
    before = torch.get_rng_state()
    loaded = load_model(uri)
    assert torch.equal(torch.get_rng_state(), before)
    for name, parameter in loaded.named_parameters():
        assert parameter.device.type == "cpu" and parameter.requires_grad and parameter.is_leaf, name
        assert parameter.data_ptr() % 64 == 0, name  # at whatever address the file had them, products would round differently


def test_a_model_made_of_tensors_holds_those_very_tensors() -> None:
    """A model made of tensors holds those and keeps what is frozen frozen."""
    spec = small_spec(layout="raster", condition=FeatureSpec(width=6, rows=2), trainable_null=False)
    tensors = dict(AnyOrderModel(spec).state_dict())
    model = model_of(spec, tensors, "tensors")
    assert all(parameter.data_ptr() == tensors[name].data_ptr() for name, parameter in model.named_parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["conditioner.uncond_embedding"]


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    uri = str(tmp_path / "vq.safetensors")
    save_weights(uri, {"x": torch.zeros(1)}, {"kind": "vq", "spec": "{}"})
    with pytest.raises(UserError, match="holds 'vq', expected 'any-order model'"):
        load_model(uri)


@pytest.mark.parametrize("half", [False, True])
def test_one_flipped_bit_is_found(tmp_path: Path, half: bool) -> None:
    path = tmp_path / "model.safetensors"
    save_model(str(path), small_model(), half=half)
    assert file_damage(str(path)) is None
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path}: damaged: its tensors are not those that were written"):
        load_model(str(path))
    assert str(path) in (file_damage(str(path)) or "")


def test_a_file_without_a_checksum_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    spec = {"kind": "any-order model", "spec": small_model().spec.model_dump_json()}
    path.write_bytes(save(small_model().state_dict(), {"oar_scale": json.dumps(spec)}))
    load_model(str(path))
    assert file_damage(str(path)) is None


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_model(str(path))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("shape", r"tok_embeddings.weight is \(7, 31\) in the file, the model has \(7, 32\)"),
        ("missing", r"tok_embeddings.weight is absent in the file"),
        ("unknown", r"extra is \(1,\) in the file, the model has absent"),
    ],
)
def test_tensors_that_do_not_fit_the_spec_are_named(tmp_path: Path, change: str, complaint: str) -> None:
    uri = str(tmp_path / "model.safetensors")
    save_model(uri, small_model())
    tensors, spec = load_weights(uri, "any-order model")
    if change == "shape":
        tensors["tok_embeddings.weight"] = tensors["tok_embeddings.weight"][:, 1:]
    elif change == "missing":
        del tensors["tok_embeddings.weight"]
    else:
        tensors["extra"] = torch.zeros(1)
    save_weights(uri, tensors, {"kind": "any-order model", "spec": spec})
    with pytest.raises(UserError, match=complaint):
        load_model(uri)
