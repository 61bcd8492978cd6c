"""An exported folder is a pipeline that the real diffusers loads; its pictures are those of ``model.sample`` and ``model.edit``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawing_run import CAPTIONS, PIXELS, small_run
from PIL import Image

import oar_scale
from oar_scale.cli import main
from oar_scale.errors import UserError
from oar_scale.generation.pretrained import Pretrained


@pytest.fixture(scope="module")
def diffusers() -> Any:
    """Imported when it is used: it takes seconds, and every process that collects tests would import it."""
    return pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    top = tmp_path_factory.mktemp("pipeline")
    run = small_run(top / "run", {"type": "sentencepiece", "max_tokens": 4}, None)
    assert main(["checkpoint", "export", run, "--out", str(top / "exported")]) == 0
    return str(top / "exported")


@pytest.fixture(scope="module")
def model(folder: str) -> Pretrained:
    return oar_scale.load(folder)


@pytest.fixture
def pipeline(diffusers: Any, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)


def pixels(pictures: list[Image.Image]) -> list[bytes]:
    return [picture.tobytes() for picture in pictures]


def test_diffusers_draws_what_the_model_samples(diffusers: Any, pipeline: Any, model: Pretrained) -> None:
    assert isinstance(pipeline, diffusers.DiffusionPipeline) and type(pipeline).__name__ == "OrderedPipeline"
    drawn = pipeline(CAPTIONS[:2], num_images_per_prompt=2, guidance_scale=2.0, num_inference_steps=4, seed=5, top_k=3)
    twice = [caption for caption in CAPTIONS[:2] for _ in range(2)]
    assert isinstance(drawn, diffusers.ImagePipelineOutput)
    assert pixels(drawn.images) == pixels(model.sample(twice, guidance=2.0, steps=4, seed=5, top_k=3))
    assert pixels(pipeline(CAPTIONS[0], return_dict=False)[0]) == pixels(model.sample(CAPTIONS[:1]))
    array, tensor = (pipeline(CAPTIONS[:2], output_type=kind).images for kind in ("np", "pt"))
    assert array.shape == (2, PIXELS, PIXELS, 3) and tensor.shape == (2, 3, PIXELS, PIXELS)
    wanted = np.stack([np.asarray(picture) for picture in model.sample(CAPTIONS[:2])])
    assert np.array_equal(np.round(array * 255).astype(np.uint8), wanted) and torch.equal(
        tensor.permute(0, 2, 3, 1), torch.from_numpy(array)
    )


def test_diffusers_edits_what_is_white_in_the_mask(pipeline: Any, model: Pretrained) -> None:
    picture, mask = Image.new("RGB", (24, 24), "red"), Image.new("L", (24, 24))
    mask.paste(255, (0, 0, 12, 24))
    drawn = pipeline(CAPTIONS[:2], image=picture, mask_image=mask, num_images_per_prompt=2, strength=0.5, seed=2).images
    prompts = [caption for caption in CAPTIONS[:2] for _ in range(2)]
    edits = model.edit([picture] * 4, [mask] * 4, prompts, strength=0.5, seed=2)
    assert pixels(drawn) == pixels([edit.picture for edit in edits])
    assert pixels(pipeline(CAPTIONS[0], picture, (0, 0, 12, 24)).images) == pixels([model.edit([picture], [mask], CAPTIONS[:1])[0].picture])


def test_several_may_come_as_a_tuple(pipeline: Any) -> None:
    """Of numbers, a tuple is one mask: a box."""
    pictures, box = (Image.new("RGB", (24, 24), "red"), Image.new("RGB", (24, 24), "blue")), (0, 0, 12, 24)
    assert pixels(pipeline(tuple(CAPTIONS[:2])).images) == pixels(pipeline(CAPTIONS[:2]).images)
    listed = pixels(pipeline(CAPTIONS[:2], image=list(pictures), mask_image=[box, box]).images)
    assert pixels(pipeline(tuple(CAPTIONS[:2]), image=pictures, mask_image=(box, box)).images) == listed
    assert pixels(pipeline(tuple(CAPTIONS[:2]), image=pictures, mask_image=box).images) == listed


def test_generators_decide_each_picture(pipeline: Any) -> None:
    """One generator draws other pictures each time; of a list, each decides its own, whatever is drawn beside it."""
    generator = torch.Generator().manual_seed(1)
    first, second = (pixels(pipeline(CAPTIONS[:2], generator=generator).images) for _ in range(2))
    assert first != second
    assert pixels(pipeline(CAPTIONS[:2], generator=torch.Generator().manual_seed(1)).images) == first
    both = pixels(pipeline(CAPTIONS[:2], generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)]).images)
    assert pixels(pipeline(CAPTIONS[1], generator=[torch.Generator().manual_seed(4)]).images) == both[1:]


def test_a_saved_pipeline_is_the_same_exported_folder(
    diffusers: Any, pipeline: Any, folder: str, model: Pretrained, tmp_path: Path
) -> None:
    target = tmp_path / "saved"
    target.mkdir()
    pipeline.save_pretrained(target)
    assert {path.name for path in target.iterdir()} == {path.name for path in Path(folder).iterdir()}
    again = diffusers.DiffusionPipeline.from_pretrained(str(target), trust_remote_code=True)
    assert pixels(again(CAPTIONS).images) == pixels(model.sample(CAPTIONS)) == pixels(oar_scale.load(str(target)).sample(CAPTIONS))
    with pytest.raises(UserError, match=r"saved: there is something here already"):
        pipeline.save_pretrained(target)


def test_device_and_dtype_move_the_model(diffusers: Any, pipeline: Any, folder: str) -> None:
    """The image tokenizer keeps its float32."""
    assert pipeline.to("cpu", torch.bfloat16) is pipeline and pipeline.device == torch.device("cpu")
    assert pipeline.dtype == torch.bfloat16 and pipeline.model.network.dtype == torch.bfloat16
    assert next(pipeline.model.vq.parameters()).dtype == torch.float32
    half = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and pixels(half(CAPTIONS[:1]).images) == pixels(pipeline(CAPTIONS[:1]).images)


def test_the_folder_runs_no_code_without_trust(diffusers: Any, folder: str) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        diffusers.DiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"image": Image.new("RGB", (12, 12))}, "image and mask_image go together"),
        ({"strength": 0.5}, "strength 0.5 is of an edit, and there is no image"),
        ({"guidance_scale": 2.0, "guidance": 3.0}, "guidance_scale and guidance are two names"),
        ({"num_inference_steps": 4, "steps": 4}, "num_inference_steps and steps are two names"),
        ({"generator": torch.Generator(), "seed": 0}, "seed 0 and a generator"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt 0 must be a whole number from 1"),
        ({"generator": [torch.Generator()]}, "1 generators for 2 pictures"),
        ({"output_type": "latent"}, "output_type 'latent': there are pil, np and pt"),
        ({"image": [Image.new("RGB", (12, 12))] * 3, "mask_image": (0, 0, 6, 6)}, "image holds 3 for 2 prompts"),
    ],
)
def test_what_does_not_fit_together_is_refused(pipeline: Any, choices: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipeline(CAPTIONS[:2], **choices)


def test_what_saving_and_pushing_would_not_do_is_refused(pipeline: Any, tmp_path: Path) -> None:
    """Before anything is written, at least anything public."""
    for choices in ({"push_to_hub": True}, {"variant": "fp16"}, {"safe_serialization": False}, {"max_shard_size": "1GB"}):
        with pytest.raises(UserError, match=f"save_pretrained: {next(iter(choices))} would do nothing here"):
            pipeline.save_pretrained(tmp_path / "saved", **choices)
    for choices in ({"create_pr": True}, {"token": "x"}, {"commit_message": "new"}):
        with pytest.raises(UserError, match=f"push_to_hub: {next(iter(choices))} would do nothing here"):
            pipeline.push_to_hub("me/name", **choices)
    assert not (tmp_path / "saved").exists()
    pipeline.save_pretrained(tmp_path / "saved", safe_serialization=True, push_to_hub=False)
