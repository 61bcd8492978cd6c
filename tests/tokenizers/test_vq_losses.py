"""The optional losses of tokenizer training: off they change nothing, on they do what they are for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oar_scale.config.schema import OpenMojiSource, VQTrainingConfig
from oar_scale.data.sources.openmoji import OpenMojiImages
from oar_scale.errors import Requeue, UserError
from oar_scale.tokenizers import perceptual, vq_training
from oar_scale.tokenizers.adversarial import Adversary, PatchDiscriminator, adaptive_weight, hinge
from oar_scale.tokenizers.perceptual import PerceptualLoss
from oar_scale.tokenizers.vq import Quantized, VQSpec, VQTokenizer, pixels_to_unit
from oar_scale.tokenizers.vq_training import VQProgress, train_vq

SPEC = VQSpec(image_size=16, channels=32, multipliers=(1, 1), res_blocks=1, latent_channels=32, codebook_size=64, codebook_dim=4)
PLAIN = VQTrainingConfig(steps=6, batch=8, lr=3e-3, warmup_steps=2, revive_every=2)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    drawings = OpenMojiImages(OpenMojiSource(limit=32)).images()
    return torch.from_numpy(np.stack([np.asarray(drawing.read(16).image) for drawing in drawings]))


def trained(pixels: Tensor, config: VQTrainingConfig) -> tuple[VQTokenizer, list[VQProgress]]:
    progress: list[VQProgress] = []
    return train_vq(SPEC, config, pixels, 5, progress.append, log_every=1), progress


class Killed(Exception):
    """Ends a training between two steps."""


def killed_at(step: int) -> Callable[[VQProgress], None]:
    def report(at: VQProgress) -> None:
        if at.step == step:
            raise Killed

    return report


@pytest.mark.parametrize("step", [1, 3, 4, 5])
@pytest.mark.parametrize("changes", [{}, {"adversarial_weight": 0.5, "adversarial_from_step": 2}], ids=["plain", "adversarial"])
def test_a_training_resumes_bit_for_bit(
    pixels: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, changes: dict[str, float]
) -> None:
    monkeypatch.setattr(vq_training, "SAVE_EVERY", 2)
    config, saved = PLAIN.model_copy(update=changes), tmp_path / "training.safetensors"
    with pytest.raises(Killed):
        train_vq(SPEC, config, pixels, 5, killed_at(step), log_every=1, checkpoint=str(saved))
    assert saved.exists() is (step > 2)
    progress: list[VQProgress] = []
    resumed = train_vq(SPEC, config, pixels, 5, progress.append, log_every=1, checkpoint=str(saved))
    assert [at.step for at in progress] == list(range(1 + 2 * ((step - 1) // 2), 7))
    assert same_weights(resumed, trained(pixels, config)[0])
    progress.clear()
    assert same_weights(train_vq(SPEC, config, pixels, 5, progress.append, checkpoint=str(saved)), resumed) and not progress


def test_a_training_that_is_asked_to_stop_is_saved_at_that_step(pixels: Tensor, tmp_path: Path) -> None:
    saved, before, after = tmp_path / "training.safetensors", list[VQProgress](), list[VQProgress]()
    with pytest.raises(Requeue, match="SIGUSR1"):
        stop = lambda step: "SIGUSR1" if step == 3 else None  # noqa: E731
        train_vq(SPEC, PLAIN, pixels, 5, before.append, log_every=1, checkpoint=str(saved), stop=stop)
    resumed = train_vq(SPEC, PLAIN, pixels, 5, after.append, log_every=1, checkpoint=str(saved))
    assert [at.step for at in after] == [4, 5, 6]
    assert same_weights(resumed, trained(pixels, PLAIN)[0])


@pytest.mark.parametrize("other", ["steps", "images", "damage"])
def test_a_training_does_not_resume_from_another_ones_state(
    pixels: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    monkeypatch.setattr(vq_training, "SAVE_EVERY", 2)
    saved = tmp_path / "training.safetensors"
    config = PLAIN.model_copy(update={"steps": 5}) if other == "steps" else PLAIN
    with pytest.raises(Killed):
        train_vq(SPEC, config, pixels.flip(0) if other == "images" else pixels, 5, killed_at(4), log_every=1, checkpoint=str(saved))
    if other == "damage":
        content = bytearray(saved.read_bytes())
        content[-9] ^= 1
        saved.write_bytes(content)
    progress: list[VQProgress] = []
    train_vq(SPEC, PLAIN, pixels, 5, progress.append, log_every=1, checkpoint=str(saved))
    assert [at.step for at in progress] == [1, 2, 3, 4, 5, 6]


def same_weights(a: VQTokenizer, b: VQTokenizer) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_with_both_losses_off_training_is_the_plain_one(pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit."""
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)  # not needed, so not imported
    ours, progress = trained(pixels, PLAIN)
    assert not progress[-1].extra_losses

    def plain(self: object, step: int, images: Tensor, reconstructed: Tensor, quantized: Quantized, last_weight: Tensor) -> Tensor:
        return F.mse_loss(reconstructed, images) + 0.1 * vq_training._edge_loss(reconstructed, images) + quantized.loss

    monkeypatch.setattr(vq_training._Losses, "__call__", plain)
    monkeypatch.setattr(vq_training._Losses, "train_discriminator", lambda *arguments: None)
    assert same_weights(ours, trained(pixels, PLAIN)[0])


def test_a_discriminator_that_has_not_started_changes_nothing(pixels: Tensor) -> None:
    late = PLAIN.model_copy(update={"adversarial_weight": 0.5, "adversarial_from_step": 6})
    assert same_weights(trained(pixels, late)[0], trained(pixels, PLAIN)[0])
    soon = late.model_copy(update={"adversarial_from_step": 4})
    _, progress = trained(pixels, soon)
    assert ["discriminator" in at.extra_losses for at in progress] == [False] * 4 + [True] * 2


def test_the_perceptual_distance_grows_with_blur(pixels: Tensor) -> None:
    """It is zero for the same image."""
    pytest.importorskip("efficientnet_lite_pytorch")
    images, loss = pixels_to_unit(pixels[:4]), PerceptualLoss()
    blurred = [F.avg_pool2d(F.pad(images, (r,) * 4, mode="replicate"), 2 * r + 1, 1) for r in (0, 1, 2)]
    same, little, much = (float(loss(images, picture)) for picture in blurred)
    assert same == 0 and 0.01 < little < much < 4


def test_the_perceptual_gradient_brings_an_image_closer(pixels: Tensor) -> None:
    """Also where the network was first loaded by a caller in inference mode."""
    pytest.importorskip("efficientnet_lite_pytorch")
    perceptual.load_network.cache_clear()
    with torch.inference_mode():
        perceptual.load_network()
    images, loss = pixels_to_unit(pixels[:2]), PerceptualLoss()
    start = F.avg_pool2d(F.pad(images, (1,) * 4, mode="replicate"), 3, 1).requires_grad_()
    before = loss(start, images)
    (gradient,) = torch.autograd.grad(before, start)
    after = loss(start.detach() - 0.02 * gradient / gradient.abs().max(), images)
    assert float(after) < float(before.detach())
    assert all(parameter.grad is None for parameter in loss.network.parameters())


def test_the_perceptual_loss_ends_perceptually_closer(pixels: Tensor) -> None:
    """Than training without it."""
    pytest.importorskip("efficientnet_lite_pytorch")
    longer = PLAIN.model_copy(update={"steps": 16, "batch": 4, "revive_every": 12})
    images, distance = pixels_to_unit(pixels), PerceptualLoss()
    distances = []
    for weight in (0.0, 2.0):
        vq, progress = trained(pixels, longer.model_copy(update={"perceptual_weight": weight}))
        distances.append(float(distance(vq.decode(vq.encode(images)), images)))
        assert bool(weight) == ("perceptual" in progress[-1].extra_losses)
    assert distances[1] < distances[0]


def test_a_missing_package_is_named_with_the_field_that_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    perceptual.load_network.cache_clear()
    with pytest.raises(UserError, match=r"perceptual_weight: needs .*efficientnet_lite_pytorch: pip install 'oar_scale\[eval\]'"):
        PerceptualLoss()


def test_the_discriminator_learns_to_tell_blur(pixels: Tensor) -> None:
    """It gives a verdict for each patch."""
    torch.manual_seed(0)
    adversary, images = Adversary(16, 1e-3), pixels_to_unit(pixels)
    blurred = F.avg_pool2d(images, 3, 1, padding=1)
    losses = [adversary.learn(images, blurred, 1e-3) for _ in range(40)]
    assert losses[0] == pytest.approx(1.0, abs=0.3) and losses[-1] < 0.5
    real, fake = adversary.discriminator(images), adversary.discriminator(blurred)
    assert real.shape[1] == 1 and real.shape[2] > 1 and real.mean() > fake.mean() + 1
    assert float(adversary.verdict(blurred)) == pytest.approx(-float(fake.detach().mean()), abs=1e-5)
    assert all(not parameter.requires_grad for parameter in adversary.discriminator.parameters())


@pytest.mark.parametrize("size", [8, 16, 32, 64, 256])
def test_a_patch_is_less_than_the_image_at_every_size(size: int) -> None:
    with torch.device("meta"):
        verdicts = PatchDiscriminator(size)(torch.zeros(1, 3, size, size))
    assert verdicts.shape[2] >= 2 and verdicts.shape[2] == verdicts.shape[3]


def test_hinge_is_zero_only_beyond_the_margin() -> None:
    assert float(hinge(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -2.0]))) == 0
    assert float(hinge(torch.tensor([0.0]), torch.tensor([0.0]))) == 1
    assert float(hinge(torch.tensor([-1.0]), torch.tensor([1.0]))) == 2


def test_both_losses_pull_equally_hard_at_the_last_weight() -> None:
    """VQGAN's equation 7: the ratio of the two gradients' norms, whatever the scale of the losses."""
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    image, adversarial = (weight * torch.tensor([0.6, 0.8])).sum() * 10, weight.sum() * 1e-3
    factor = adaptive_weight(image, adversarial, weight)
    assert not factor.requires_grad
    assert float(factor) == pytest.approx(10 / (1e-3 * 2**0.5), rel=1e-3)
    assert float(adaptive_weight(image, adversarial * 0 * weight.sum(), weight)) == 1e4, "a dead gradient must not blow it up"
