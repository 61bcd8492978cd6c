"""Both image tokenizers against what the peers' own code computes with the same weights (``golden/parity``)."""

from __future__ import annotations

import pytest
import torch
from parity import Case, peer_case

from oar_scale.tokenizers.image import ImageTokenizer
from oar_scale.tokenizers.maskgit_vq import MaskGITSpec, MaskGITVQ
from oar_scale.tokenizers.peer_vq import import_llamagen_vq, import_maskgit_vq
from oar_scale.tokenizers.vq import VQSpec, VQTokenizer, psnr, unit_to_pixels

IMPORTS = {"vq16": import_llamagen_vq, "maskgit_vq": import_maskgit_vq}


@pytest.fixture(scope="module", params=list(IMPORTS))
def peer(request: pytest.FixtureRequest) -> tuple[ImageTokenizer, Case]:
    case = peer_case(request.param)
    return IMPORTS[request.param](case.tensors, case.metadata["image_size"], f"{request.param}.pt"), case


def test_full_size_tokenizers_have_the_published_parameters() -> None:
    """72 M for LlamaGen's VQ-16, 54.5 M for MaskGIT's VQGAN; LlamaGen's 344th tensor is its record of used codes."""
    with torch.device("meta"):
        llamagen, maskgit = VQTokenizer(VQSpec(image_size=256)), MaskGITVQ(MaskGITSpec(image_size=256))
    assert [sum(p.numel() for p in vq.parameters()) for vq in (llamagen, maskgit)] == [71_883_403, 54_515_587]
    assert [len(vq.state_dict()) for vq in (llamagen, maskgit)] == [343, 168]
    assert (llamagen.spec.grid, maskgit.spec.grid) == (16, 16)


def test_latents_codes_and_pixels_equal_the_peers(peer: tuple[ImageTokenizer, Case]) -> None:
    vq, case = peer
    with torch.no_grad():
        torch.testing.assert_close(vq.latent(case.arrays["image"]), case.arrays["latent"], rtol=1e-4, atol=1e-4)
    assert torch.equal(vq.encode(case.arrays["image"]), case.arrays["codes"])
    pixels = unit_to_pixels(vq.decode(case.arrays["codes"]))
    assert int((pixels.int() - case.arrays["decoded"].int()).abs().max()) <= 1


def test_in_bfloat16_latents_and_pixels_stay_close(peer: tuple[ImageTokenizer, Case]) -> None:
    """bfloat16 keeps 8 bits: every operation rounds by up to 2^-9 = 0.2 %, and independent roundings of some 50 layers in a row add
    up to about sqrt(50) x 0.2 % = 1.4 %. Three times that is allowed: latents within 4 % of their spread (rms), and with the same
    4 % of the pixels' spread of about 0.35 (rms, of a range of 2), 40 dB. Codes may flip where two entries are nearly as close."""
    vq, case = peer
    with torch.device("meta"):
        half: ImageTokenizer = type(vq)(vq.spec)  # type: ignore[call-arg]
    half.load_tensors(dict(vq.state_dict()), "a copy").to(torch.bfloat16)
    with torch.no_grad():
        latent = half.latent(case.arrays["image"].to(torch.bfloat16))
        decoded = half.decode(case.arrays["codes"])
    assert latent.dtype == decoded.dtype == torch.bfloat16
    error = (latent.float() - case.arrays["latent"]).square().mean().sqrt() / case.arrays["latent"].std()
    assert float(error) < 0.04
    exact = case.arrays["decoded"].permute(0, 3, 1, 2).float() / 127.5 - 1
    assert float(psnr(decoded.float(), exact).min()) > 40
    assert float((half.quantize.codes(latent) == case.arrays["codes"]).float().mean()) >= 0.9


def test_another_square_of_codes_decodes_and_no_other_shape_does(peer: tuple[ImageTokenizer, Case]) -> None:
    vq, case = peer
    nine_codes = case.arrays["codes"][:, :9]
    with torch.no_grad():
        assert vq.decode(nine_codes).shape == (2, 3, 48, 48)
    with pytest.raises(ValueError, match=r"codes are \(2, 12\).*a 4 x 4 grid is \(B, 16\)"):
        vq.decode(case.arrays["codes"][:, :12])
    with pytest.raises(ValueError, match=r"images are \(3, 64, 32\), the tokenizer takes \(3, 64, 64\)"):
        vq.encode(case.arrays["image"][..., :32])
