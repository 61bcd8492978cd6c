"""Training the small image tokenizer, in one process.

    image loss = |x - y|^2 + edge_weight * |grad x - grad y| + perceptual_weight * d(x, y)
    loss       = image loss + codebook loss + commitment * commitment loss + adversarial_weight * lambda * -D(y)

The edge term compares horizontal and vertical differences of neighbouring pixels: drawings are their outlines, and the
squared error alone blurs them. d is a distance of network features (``perceptual``), D a patch discriminator that learns
along (``adversarial``); both are off unless the recipe asks for them, and cost nothing then.

Codebook entries that no recent image chose move onto encoder outputs (revival), or a young codebook dies. What is kept is
the exponential moving average of the weights.
"""

from __future__ import annotations

import copy
import json
import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from oar_scale.config.schema import VQTrainingConfig
from oar_scale.errors import Requeue
from oar_scale.tokenizers.adversarial import Adversary, adaptive_weight
from oar_scale.tokenizers.image import ImageTokenizer
from oar_scale.tokenizers.perceptual import PerceptualLoss
from oar_scale.tokenizers.training_file import optimizer_tensors, read_training, restore_optimizer, save_training
from oar_scale.tokenizers.vq import Quantized, VQSpec, VQTokenizer, codebook_use, pixels_to_unit, psnr, unit_to_pixels

SAVE_EVERY = 200
"""Steps between two savings of a training that is to resume."""


@dataclass(frozen=True)
class VQProgress:
    """What is reported every ``log_every`` steps; ``psnr`` in dB on the current batch."""

    step: int
    loss: float
    psnr: float
    codebook_use: float
    extra_losses: dict[str, float] = field(default_factory=dict)
    """Losses that are not part of every training, unweighted: ``perceptual``, ``adversarial``, ``discriminator``."""


def train_vq(
    spec: VQSpec,
    config: VQTrainingConfig,
    pixels_SHW3: Tensor,
    seed: int,
    report: Callable[[VQProgress], None],
    log_every: int = 20,
    checkpoint: str | None = None,
    stop: Callable[[int], str | None] = lambda step: None,
    resumed: Callable[[int, float], None] = lambda step, seconds: None,
) -> VQTokenizer:
    """Train a tokenizer on uint8 images [S, H, W, 3] held in memory.

    Every batch is drawn anew, each image shifted by up to an eighth of its side and flipped half of the time.

    Args:
        checkpoint: where the training is saved every ``SAVE_EVERY`` steps, and resumes from if it is of the same training: bit for bit as
            if it had never stopped. Kept at the end: whoever calls deletes it when the tokenizer is stored. None: it is not saved.
        stop: asked after each step of a training that is saved, with the number of the step; a reason ends it.
        resumed: called where a saved training was loaded: with its step, and the seconds that this took.

    Raises:
        Requeue: stopped, and saved.
    """
    training = _Training(spec, config, seed)
    identity = "" if checkpoint is None else _identity(spec, config, pixels_SHW3, seed)
    started = time.monotonic()
    if checkpoint is not None and (saved := read_training(checkpoint, identity)) is not None:
        training.restore(saved)
        resumed(training.step, time.monotonic() - started)
    trained = training.step < config.steps
    while training.step < config.steps:
        images, reconstructed, quantized, loss = training.train_step(pixels_SHW3)
        step = training.step
        if step % log_every == 0 or step == config.steps:
            quality = float(psnr(images, reconstructed.detach()).mean())
            use = codebook_use([quantized.codes_BN], spec.codebook_size)
            report(VQProgress(step, float(loss.detach()), quality, use, dict(training.losses.extra_losses)))
        if checkpoint is not None and step < config.steps:
            reason = stop(step)
            if reason is not None or step % SAVE_EVERY == 0:
                save_training(checkpoint, training.tensors(), identity)
            if reason is not None:
                raise Requeue(reason)
    if checkpoint is not None and trained:
        save_training(checkpoint, training.tensors(), identity)
    return training.average.eval().to(memory_format=torch.contiguous_format)


class _Step(NamedTuple):
    images: Tensor
    reconstructed: Tensor
    quantized: Quantized
    loss: Tensor


class _Training:
    """All that a training changes, so that it can be saved between two steps."""

    def __init__(self, spec: VQSpec, config: VQTrainingConfig, seed: int) -> None:
        self.spec, self.config, self.step = spec, config, 0
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.vq = VQTokenizer(spec).to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.vq).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.vq.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.losses = _Losses(spec, config)
        self.used = torch.zeros(spec.codebook_size, dtype=torch.long)

    def train_step(self, pixels_SHW3: Tensor) -> _Step:
        """One update, and the revival of unused codebook entries where it is due."""
        self.step += 1
        step, vq, config, optimizer = self.step, self.vq, self.config, self.optimizer
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(config, step)
        images = _batch(pixels_SHW3, config.batch, self.generator).to(memory_format=torch.channels_last)
        reconstructed, quantized = vq(images, config.commitment)
        loss = self.losses(step, images, reconstructed, quantized, vq.decoder.conv_out.weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        optimizer.step()
        self.losses.train_discriminator(step, images, reconstructed)
        _update_average(self.average, vq, min(config.ema_decay, step / (step + 10)))

        self.used += torch.bincount(quantized.codes_BN.flatten(), minlength=self.spec.codebook_size)
        if step % config.revive_every == 0 and step < 0.8 * config.steps:
            _revive(vq, self.average, self.used, images, self.generator)
            self.used.zero_()
        return _Step(images, reconstructed, quantized, loss)

    def tensors(self) -> dict[str, Tensor]:
        """Everything, by name."""
        plain = {"step": torch.tensor(self.step), "used": self.used, "generator": self.generator.get_state()}
        for name, module, optimizer in self._parts():
            plain |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
            if optimizer is not None:
                plain |= optimizer_tensors(f"{name} optimizer", optimizer)
        return plain

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Take the place of the training that :meth:`tensors` was called of."""
        self.step, self.used = int(saved["step"]), saved["used"]
        self.generator.set_state(saved["generator"])
        for name, module, optimizer in self._parts():
            module.load_state_dict({key: saved[f"{name}.{key}"] for key in module.state_dict()})
            if optimizer is not None:
                restore_optimizer(f"{name} optimizer", optimizer, saved)

    def _parts(self) -> list[tuple[str, torch.nn.Module, torch.optim.Optimizer | None]]:
        parts: list[tuple[str, torch.nn.Module, torch.optim.Optimizer | None]] = [
            ("vq", self.vq, self.optimizer),
            ("average", self.average, None),
        ]
        if self.losses.adversary is not None:
            parts.append(("discriminator", self.losses.adversary.discriminator, self.losses.adversary.optimizer))
        return parts


def _identity(spec: VQSpec, config: VQTrainingConfig, pixels_SHW3: Tensor, seed: int) -> str:
    """What a saved training must agree with to be this one."""
    images = zlib.crc32(pixels_SHW3.contiguous().numpy().data)
    return json.dumps({"spec": spec.model_dump(), "training": config.model_dump(), "seed": seed, "images": images}, sort_keys=True)


class _Losses:
    """The loss of a step, and the discriminator's own step."""

    def __init__(self, spec: VQSpec, config: VQTrainingConfig) -> None:
        self.config = config
        self.perceptual = PerceptualLoss() if config.perceptual_weight else None
        self.adversary = Adversary(spec.image_size, config.lr) if config.adversarial_weight else None
        self.extra_losses: dict[str, float] = {}

    def __call__(self, step: int, images: Tensor, reconstructed: Tensor, quantized: Quantized, last_weight: Tensor) -> Tensor:
        image_loss = F.mse_loss(reconstructed, images) + self.config.edge_weight * _edge_loss(reconstructed, images)
        if self.perceptual is not None:
            distance = self.perceptual(reconstructed, images)
            image_loss = image_loss + self.config.perceptual_weight * distance
            self.extra_losses["perceptual"] = float(distance.detach())
        loss = image_loss + quantized.loss
        if self.adversary is not None and step > self.config.adversarial_from_step:
            verdict = self.adversary.verdict(reconstructed)
            loss = loss + self.config.adversarial_weight * adaptive_weight(image_loss, verdict, last_weight) * verdict
            self.extra_losses["adversarial"] = float(verdict.detach())
        return loss

    def train_discriminator(self, step: int, images: Tensor, reconstructed: Tensor) -> None:
        if self.adversary is not None and step > self.config.adversarial_from_step:
            self.extra_losses["discriminator"] = self.adversary.learn(images, reconstructed, _learning_rate(self.config, step))


def _learning_rate(config: VQTrainingConfig, step: int) -> float:
    warm = min(1.0, step / max(1, config.warmup_steps))
    return config.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / config.steps)))


def _batch(pixels_SHW3: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Random images [B, 3, H, W] in [-1, 1], shifted on white and flipped."""
    index = torch.randint(len(pixels_SHW3), (batch,), generator=generator)
    images = pixels_to_unit(pixels_SHW3[index])
    side = images.shape[-1]
    margin = side // 8
    padded = F.pad(images, (margin, margin, margin, margin), value=1.0)
    offsets = torch.randint(0, 2 * margin + 1, (batch, 2), generator=generator).tolist()
    flip = (torch.rand(batch, generator=generator) < 0.5).tolist()
    crops = [padded[i, :, y : y + side, x : x + side] for i, (y, x) in enumerate(offsets)]
    return torch.stack([crop.flip(-1) if flipped else crop for crop, flipped in zip(crops, flip, strict=True)])


def _edge_loss(a: Tensor, b: Tensor) -> Tensor:
    horizontal = F.l1_loss(a.diff(dim=-1), b.diff(dim=-1))
    return horizontal + F.l1_loss(a.diff(dim=-2), b.diff(dim=-2))


@torch.no_grad()
def _update_average(average: VQTokenizer, vq: VQTokenizer, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(vq.parameters()), 1 - decay)


@torch.no_grad()
def _revive(vq: VQTokenizer, average: VQTokenizer, used: Tensor, images: Tensor, generator: torch.Generator) -> None:
    """Move codebook entries that nothing chose onto random encoder outputs of this batch."""
    dead = torch.nonzero(used == 0).flatten()
    if len(dead) == 0:
        return
    rows = F.normalize(vq.latent(images).flatten(2).transpose(1, 2).reshape(-1, vq.spec.codebook_dim), dim=-1)
    chosen = rows[torch.randint(len(rows), (len(dead),), generator=generator)]
    vq.quantize.embedding.weight[dead] = chosen
    average.quantize.embedding.weight[dead] = chosen


class VQQuality(NamedTuple):
    """What is left of images after encoding and decoding."""

    psnr_db: float
    """Mean over the images."""
    codebook_use: float
    """Share of the codebook that their codes use."""
    decoded_SHW3: Tensor
    """The images again, uint8 on the CPU."""


@torch.no_grad()
def assess_vq(vq: ImageTokenizer, pixels_SHW3: Tensor, batch: int = 64) -> VQQuality:
    """Encode and decode images [S, H, W, 3] once, on the tokenizer's device."""
    quality, codes, decoded = [], [], []
    for start in range(0, len(pixels_SHW3), batch):
        images = pixels_to_unit(pixels_SHW3[start : start + batch]).to(vq.device)
        codes_BN = vq.encode(images)
        again = vq.decode(codes_BN)
        codes.append(codes_BN.cpu())
        quality.append(psnr(images, again).cpu())
        decoded.append(unit_to_pixels(again).cpu())
    return VQQuality(float(torch.cat(quality).mean()), codebook_use(codes, vq.spec.codebook_size), torch.cat(decoded))
