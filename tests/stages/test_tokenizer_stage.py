"""Stage ``tokenizer``: what it measures on held-out images, and weights that come from elsewhere."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from oar_scale.config.schema import Recipe
from oar_scale.errors import Requeue
from oar_scale.evaluation import features
from oar_scale.evaluation.distances import frechet
from oar_scale.evaluation.features import picture_features
from oar_scale.observe.console import Console
from oar_scale.observe.events import read_events
from oar_scale.report import render_report
from oar_scale.report.report_data import ReportData
from oar_scale.report.run_metadata import run_metadata, tokenizer_metadata
from oar_scale.run.context import Run
from oar_scale.stages.data import run_data
from oar_scale.stages.tokenizer import read_images, run_tokenizer
from oar_scale.tokenizers import perceptual, vq_training
from oar_scale.tokenizers.image import ImageTokenizer
from oar_scale.tokenizers.maskgit_vq import MaskGITSpec, MaskGITVQ
from oar_scale.tokenizers.vq import VQSpec, VQTokenizer, load_vq, pixels_to_unit, save_vq, unit_to_pixels


def prepared(folder: Path, **image: Any) -> tuple[Run, io.StringIO]:
    """60 drawings of 16 px, 24 or so of them held out; and what the console says."""
    recipe = Recipe.model_validate(
        {
            "name": "small",
            "run_dir": str(folder),
            "data": {"source": {"type": "openmoji", "limit": 60}, "image_size": 16, "heldout_fraction": 0.4},
            "tokenizer": {"image": {"multipliers": (1, 1), "codebook_size": 32, **image}, "text": {"vocab_size": 100}},
            "parallel": {"workers": 1},
        }
    )
    output = io.StringIO()
    run = Run(recipe, Console(output))
    run_data(run)
    return run, output


def test_held_out_quality_is_returned_printed_and_reported(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    run, output = prepared(tmp_path, training={"steps": 25, "batch": 8, "adversarial_weight": 0.1, "adversarial_from_step": 2})
    results = run_tokenizer(run)
    vq, images = load_vq(run.vq_uri), read_images(run, "heldout")[0]
    decoded = unit_to_pixels(vq.decode(vq.encode(pixels_to_unit(images))))
    again = frechet(*(picture_features(pixels.numpy()) for pixels in (images, decoded)))
    assert results["heldout_images"] == len(images)
    assert results["reconstruction_fd_efflite0"] == pytest.approx(again, rel=1e-3)
    assert f"reconstruction fd_efflite0 {results['reconstruction_fd_efflite0']:.2f} on {len(images)} held-out images" in output.getvalue()
    assert "FID" not in output.getvalue().replace("not rFID", "")
    metadata = tokenizer_metadata(run, results)
    assert (metadata.codebook_size, metadata.reconstruction_fd_efflite0) == (32, results["reconstruction_fd_efflite0"])
    html = render_report(ReportData(run_metadata(run, {}), "", tokenizer=metadata))
    assert f"{results['reconstruction_fd_efflite0']:.2f} between all held-out images and their reconstructions" in html
    steps = [event for event in read_events(run.events, "tokenizer") if event["kind"] == "vq"]
    assert "discriminator" in steps[-1] and "psnr" in steps[-1]


def test_a_training_that_is_asked_to_stop_says_so_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, output = prepared(tmp_path, training={"steps": 6, "batch": 4})
    batches, plain = list[int](), vq_training._batch

    def batch(*arguments: Any) -> Any:
        batches.append(1)
        if len(batches) == 3:
            signal.raise_signal(signal.SIGTERM)
        return plain(*arguments)

    monkeypatch.setattr(vq_training, "_batch", batch)
    with pytest.raises(Requeue, match="SIGTERM"):
        run_tokenizer(run)
    assert "step 3: stopping: SIGTERM" in output.getvalue()
    (stopping,) = [event for event in read_events(run.events, "tokenizer") if event["kind"] == "stopping"]
    assert (stopping["step"], stopping["reason"]) == (3, "SIGTERM")
    assert "resumes" not in output.getvalue()
    run_tokenizer(run)
    assert len(batches) == 6, "it has begun where it was"
    assert "resumes from step 3\n" in output.getvalue()
    (event,) = [event for event in read_events(run.events, "tokenizer") if event["kind"] == "resumed"]
    assert (event["step"], event["uri"]) == (3, run.at("tokenizers", "training.safetensors")) and event["seconds"] > 0


def test_a_stage_that_fails_while_it_assesses_does_not_train_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = prepared(tmp_path, training={"steps": 3, "batch": 4})
    batches, plain = list[int](), vq_training._batch

    def batch(*arguments: Any) -> Any:
        batches.append(1)
        return plain(*arguments)

    monkeypatch.setattr(vq_training, "_batch", batch)
    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr("oar_scale.stages.tokenizer.assess_vq", Mock(side_effect=ConnectionError("gone")))
        run_tokenizer(run)
    before = Path(run.vq_uri).read_bytes()
    run_tokenizer(run)
    assert len(batches) == 3, "nothing is trained twice"
    assert Path(run.vq_uri).read_bytes() == before
    assert not Path(run.at("tokenizers", "training.safetensors")).exists()


def test_without_the_extra_eval_the_rest_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    perceptual.load_network.cache_clear()
    features._loaded.cache_clear()
    run, output = prepared(tmp_path, training={"steps": 2, "batch": 4})
    results = run_tokenizer(run)
    assert results["reconstruction_fd_efflite0"] is None and results["psnr_db"] > 0
    assert "pip install 'oar_scale[eval]'" in output.getvalue()


def counted(call: Callable[[ImageTokenizer, torch.Tensor], torch.Tensor], sizes: list[int]) -> Any:
    """The same method, which notes how many images it is given."""

    def noted(vq: ImageTokenizer, batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        return call(vq, batch)

    return noted


def test_held_out_images_are_encoded_and_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By all figures together, in batches, however many of them there are."""
    pytest.importorskip("efficientnet_lite_pytorch")
    run, _ = prepared(tmp_path, training={"steps": 2, "batch": 4})
    seen: dict[str, list[int]] = {"encode": [], "decode": []}
    for name, sizes in seen.items():
        monkeypatch.setattr(ImageTokenizer, name, counted(getattr(ImageTokenizer, name), sizes))
    results = run_tokenizer(run)
    assert results["reconstruction_fd_efflite0"] is not None
    assert sum(seen["encode"]) == sum(seen["decode"]) == results["heldout_images"]


@pytest.mark.parametrize("kind", [VQTokenizer, MaskGITVQ])
def test_given_weights_of_either_kind_keep_every_bit(kind: type[ImageTokenizer], tmp_path: Path) -> None:
    torch.manual_seed(3)
    shape: dict[str, Any] = {"image_size": 16, "channels": 32, "multipliers": (1, 1), "latent_channels": 32, "codebook_size": 48}
    given = VQTokenizer(VQSpec(**shape)) if kind is VQTokenizer else MaskGITVQ(MaskGITSpec(**shape))
    save_vq(str(tmp_path / "given.safetensors"), given)
    run, _ = prepared(tmp_path / "run", weights=str(tmp_path / "given.safetensors"))
    results = run_tokenizer(run)
    used = load_vq(run.vq_uri)
    assert type(used) is kind and results["codebook_size"] == 48
    assert all(torch.equal(tensor, used.state_dict()[name]) for name, tensor in given.state_dict().items())
