"""Tokenizers: codes, their round trip, and what training does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from oar_scale.config.schema import OpenMojiSource, VQTrainingConfig
from oar_scale.data.sources.openmoji import OpenMojiImages
from oar_scale.errors import UserError
from oar_scale.tokenizers.text import TextTokenizer, train_text_tokenizer
from oar_scale.tokenizers.vq import VQSpec, VQTokenizer, load_vq, pixels_to_unit, psnr, save_vq, unit_to_pixels, vq_id
from oar_scale.tokenizers.vq_training import VQProgress, assess_vq, train_vq

SPEC = VQSpec(image_size=16, channels=32, multipliers=(1, 1), res_blocks=1, latent_channels=32, codebook_size=64, codebook_dim=4)
CAPTIONS = [f"a {colour} {thing}" for colour in ("red", "green", "blue") for thing in ("apple", "car", "cat", "house")]


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    drawings = OpenMojiImages(OpenMojiSource(limit=48)).images()
    return torch.from_numpy(np.stack([np.asarray(drawing.read(16).image) for drawing in drawings]))


@pytest.fixture(scope="module")
def trained(pixels: torch.Tensor) -> tuple[VQTokenizer, list[VQProgress]]:
    progress: list[VQProgress] = []
    return train_vq(SPEC, VQTrainingConfig(steps=120, batch=16, lr=3e-3, revive_every=20), pixels, 0, progress.append), progress


def test_training_improves_reconstruction_and_uses_the_codebook(
    pixels: torch.Tensor, trained: tuple[VQTokenizer, list[VQProgress]]
) -> None:
    torch.manual_seed(0)
    before, *_ = assess_vq(VQTokenizer(SPEC).eval(), pixels)
    after, use, _ = assess_vq(trained[0], pixels)
    assert after > before + 5
    assert use > 0.3
    assert trained[1][-1].step == 120 and trained[1][-1].loss < trained[1][0].loss


def test_codes_are_stable_and_in_range(pixels: torch.Tensor, trained: tuple[VQTokenizer, list[VQProgress]]) -> None:
    vq = trained[0]
    codes_BN = vq.encode(pixels_to_unit(pixels[:6]))
    assert codes_BN.shape == (6, 64) and int(codes_BN.min()) >= 0 and int(codes_BN.max()) < 64
    alone = torch.cat([vq.encode(pixels_to_unit(pixels[i : i + 1])) for i in range(6)])
    assert torch.equal(alone, codes_BN)
    assert vq.decode(codes_BN).shape == (6, 3, 16, 16)


def test_a_code_is_the_nearest_entry_on_the_sphere(trained: tuple[VQTokenizer, list[VQProgress]]) -> None:
    quantizer = trained[0].quantize
    entries = torch.nn.functional.normalize(quantizer.embedding.weight, dim=-1)
    latent = (3.0 * entries[:16]).t().reshape(1, 4, 4, 4)
    assert torch.equal(quantizer.codes(latent)[0], torch.arange(16))


def test_an_image_of_another_size_is_refused(trained: tuple[VQTokenizer, list[VQProgress]]) -> None:
    with pytest.raises(ValueError, match=r"\(3, 32, 32\).*takes \(3, 16, 16\)"):
        trained[0].encode(torch.zeros(1, 3, 32, 32))


def test_a_saved_tokenizer_gives_the_same_codes(
    pixels: torch.Tensor, trained: tuple[VQTokenizer, list[VQProgress]], tmp_path: Path
) -> None:
    uri = str(tmp_path / "vq.safetensors")
    save_vq(uri, trained[0])
    again = load_vq(uri)
    assert vq_id(again) == vq_id(trained[0])
    assert torch.equal(again.encode(pixels_to_unit(pixels)), trained[0].encode(pixels_to_unit(pixels)))


def test_the_same_weights_give_the_same_bytes(trained: tuple[VQTokenizer, list[VQProgress]], tmp_path: Path) -> None:
    """Order tables and checkpoints know a model by the hash of its file."""
    for index in range(12):
        save_vq(str(tmp_path / f"{index}.safetensors"), trained[0])
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_a_pickle_is_never_opened_as_weights(tmp_path: Path) -> None:
    uri = tmp_path / "vq.safetensors"
    torch.save({"weights": torch.zeros(3)}, uri)
    with pytest.raises(UserError, match=r"vq\.safetensors: not a readable safetensors file"):
        load_vq(str(uri))


def test_pixels_survive_the_unit_range() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(-1, -1, -1, 3)
    assert torch.equal(unit_to_pixels(pixels_to_unit(pixels)), pixels)


def test_psnr_of_a_known_error() -> None:
    image = torch.zeros(1, 3, 4, 4)
    assert float(psnr(image, image + 0.2)) == pytest.approx(20.0, abs=1e-4)  # 10 log10(2^2 / 0.2^2)


def test_captions_become_ids_padded_with_zero_and_cut() -> None:
    text = train_text_tokenizer(CAPTIONS, 64, 12)
    ids_BT = text.encode(["a red apple", "", "a red apple a green car a blue house a red cat"])
    assert ids_BT.shape == (3, 12)
    assert ids_BT[1].eq(0).all() and ids_BT[2].ne(0).all()
    used = ids_BT[0][ids_BT[0] != 0]
    assert text.processor.decode(used.tolist()) == "a red apple"
    assert int(ids_BT.max()) < text.vocab_size


def test_a_saved_text_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    text = train_text_tokenizer(CAPTIONS, 64, 6)
    text.save(str(tmp_path / "text.model"))
    again = TextTokenizer.load(str(tmp_path / "text.model"), 6)
    assert torch.equal(again.encode(CAPTIONS), text.encode(CAPTIONS))


def test_captions_of_any_length_are_learned_from() -> None:
    """SentencePiece leaves out lines of more than 4,192 bytes without a word, and then finds that there are none."""
    captions = [f"{'a long story ' * 500}{number}" for number in range(20)]
    text = train_text_tokenizer([*captions, "short\0\ud83d"], 64, 16)
    assert "story" in text.processor.decode(text.encode(["a long story"])[0].tolist())


def test_a_file_that_is_no_sentencepiece_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"text\.model: not a SentencePiece model"):
        TextTokenizer.load(str(tmp_path / "text.model"), 6)


def test_a_vocabulary_smaller_than_the_alphabet_is_named() -> None:
    captions = [chr(0x4E00 + i) * 3 for i in range(200)]
    with pytest.raises(UserError, match=r"tokenizer\.text\.vocab_size 64"):
        train_text_tokenizer(captions, 64, 6)
