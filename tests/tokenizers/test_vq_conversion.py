"""Peers' image tokenizers in and out: the same bits, the same keys, and a clear word about a tensor that does not fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from oar_scale.config.loading import load_recipe
from oar_scale.errors import UserError
from oar_scale.tokenizers.image import ImageTokenizer
from oar_scale.tokenizers.maskgit_vq import MaskGITSpec, MaskGITVQ
from oar_scale.tokenizers.peer_vq import export_llamagen_vq, export_maskgit_vq, import_llamagen_vq, import_maskgit_vq
from oar_scale.tokenizers.vq import VQSpec, VQTokenizer, load_vq, save_vq, vq_id

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"image_size": 16, "channels": 32, "multipliers": (1, 2, 2), "res_blocks": 2, "latent_channels": 48, "codebook_size": 64}


def small_llamagen() -> dict[str, Tensor]:
    torch.manual_seed(1)
    used = torch.arange(65536, dtype=torch.float32) % 64
    return {"quantize.codebook_used": used, **VQTokenizer(VQSpec(**SMALL, codebook_dim=4)).state_dict()}


def small_maskgit() -> dict[str, Tensor]:
    torch.manual_seed(2)
    return MaskGITVQ(MaskGITSpec(**SMALL)).state_dict()


def assert_same_bits(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].dtype == expected[name].dtype and torch.equal(tensors[name], expected[name]) for name in expected)


def test_llamagen_comes_back_bit_for_bit_also_through_a_file(tmp_path: Path) -> None:
    tensors = small_llamagen()
    vq = import_llamagen_vq(tensors, 16, "peer.pt")
    assert vq.spec == VQSpec(**SMALL, codebook_dim=4)
    assert_same_bits(export_llamagen_vq(vq), tensors)
    save_vq(str(tmp_path / "vq.safetensors"), vq)
    again = load_vq(str(tmp_path / "vq.safetensors"))
    assert isinstance(again, VQTokenizer)
    assert_same_bits(export_llamagen_vq(again), tensors)


def test_integer_record_of_used_codes_stays_integer() -> None:
    tensors = {**small_llamagen(), "quantize.codebook_used": torch.arange(65536)}
    assert_same_bits(export_llamagen_vq(import_llamagen_vq(tensors, 16, "peer.pt")), tensors)


def test_maskgit_comes_back_bit_for_bit_also_through_a_file(tmp_path: Path) -> None:
    tensors = small_maskgit()
    vq = import_maskgit_vq(tensors, 16, "peer.bin")
    assert vq.spec == MaskGITSpec(**SMALL)
    assert_same_bits(export_maskgit_vq(vq), tensors)
    save_vq(str(tmp_path / "vq.safetensors"), vq)
    again = load_vq(str(tmp_path / "vq.safetensors"))
    assert isinstance(again, MaskGITVQ) and vq_id(again) == vq_id(vq)
    assert_same_bits(export_maskgit_vq(again), tensors)


def test_an_export_has_the_record_that_llamagen_requires() -> None:
    """Of a tokenizer that was trained here."""
    exported = export_llamagen_vq(VQTokenizer(VQSpec(**SMALL)))
    assert exported["quantize.codebook_used"].shape == (65536,) and not exported["quantize.codebook_used"].any()


def test_the_record_of_used_codes_does_not_change_the_id() -> None:
    tensors = small_llamagen()
    with_record = import_llamagen_vq(tensors, 16, "peer.pt")
    del tensors["quantize.codebook_used"]
    assert vq_id(with_record) == vq_id(import_llamagen_vq(tensors, 16, "peer.pt"))


def test_the_shipped_tokenizer_keeps_its_id() -> None:
    """Token shards carry it: another id for the same weights would make every stored code foreign."""
    assert vq_id(load_vq(str(ROOT / "recipes" / "weights" / "emoji" / "vq.safetensors"))) == "6be0d9cc29826278"


WEIGHTS = [name for name in small_llamagen() if name.endswith(("weight", "used"))]


@pytest.mark.parametrize("name", ["encoder.conv_in.weight", "encoder.conv_out.weight", "quant_conv.weight", *WEIGHTS[::9]])
def test_a_wrong_shape_is_named_with_both_shapes(name: str) -> None:
    tensors = small_llamagen()
    right, wrong = tuple(tensors[name].shape), (tensors[name].shape[0] + 32, *tensors[name].shape[1:])
    if name == "quantize.embedding.weight":  # any number of entries is a codebook, but not any width
        wrong = (right[0], right[1] + 1)
    tensors[name] = torch.zeros(wrong)
    with pytest.raises(UserError) as refused:
        import_llamagen_vq(tensors, 16, "peer.pt")
    assert str(refused.value).startswith("peer.pt: ")
    assert f"tensor {name} is {wrong}, expected {right}" in str(refused.value)
    assert "more" not in str(refused.value), "tensors that are right were blamed, too"


@pytest.mark.parametrize("family", ["llamagen", "maskgit"])
def test_missing_and_unexpected_tensors_are_named(family: str) -> None:
    make, take = {"llamagen": (small_llamagen, import_llamagen_vq), "maskgit": (small_maskgit, import_maskgit_vq)}[family]
    for name in ("encoder.conv_in.weight", "quantize.embedding.weight", "decoder.norm_out.bias"):
        tensors = make()
        del tensors[name]
        with pytest.raises(UserError, match=rf"peer\.pt: (.|\n)*tensor {name} is absent"):
            take(tensors, 16, "peer.pt")
    with pytest.raises(UserError, match=r"tensor loss\.logvar is \(3,\), expected absent"):
        take({**make(), "loss.logvar": torch.zeros(3)}, 16, "peer.pt")


def test_one_familys_weights_are_not_taken_for_the_others() -> None:
    with pytest.raises(UserError, match=r"peer\.pt: no tensor encoder\.conv_blocks\.0"):
        import_llamagen_vq(small_maskgit(), 16, "peer.pt")
    with pytest.raises(UserError, match=r"peer\.pt: no tensor encoder\.down\.0"):
        import_maskgit_vq(small_llamagen(), 16, "peer.pt")


def test_an_image_size_that_does_not_halve_evenly_is_refused() -> None:
    with pytest.raises(UserError, match=r"peer\.pt: this tokenizer takes images of a multiple of 4 pixels, not of 18"):
        import_llamagen_vq(small_llamagen(), 18, "peer.pt")


def test_tensors_that_do_not_fit_the_spec_are_refused(tmp_path: Path) -> None:
    """The error names the file."""
    vq: ImageTokenizer = VQTokenizer(VQSpec(**SMALL))
    vq.spec = VQSpec(**{**SMALL, "codebook_size": 32})
    uri = str(tmp_path / "vq.safetensors")
    save_vq(uri, vq)
    with pytest.raises(UserError, match=r"vq\.safetensors: (.|\n)*quantize\.embedding\.weight is \(64, 8\), expected \(32, 8\)"):
        load_vq(uri)


def test_the_guides_import_and_recipe_work_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (ROOT / "docs" / "tokenizers.md").read_text()
    code, recipe = (re.search(rf"```{language}\n(.*?)```", guide, re.DOTALL) for language in ("python", "yaml"))
    assert code and recipe
    monkeypatch.chdir(tmp_path)
    torch.save({"model": small_llamagen()}, "vq_ds16_c2i.pt")
    exec(code[1], {})
    assert load_vq("vq16.safetensors").spec.image_size == 256
    Path("mine.yaml").write_text(recipe[1])
    assert load_recipe("mine.yaml").grid == 16
