"""A patch discriminator for the tokenizer: blur is cheap in squared error and easy to distinguish from a real image.

    discriminator   L_D = mean relu(1 - D(x)) / 2 + mean relu(1 + D(y)) / 2                        (hinge)
    tokenizer       L_G = -mean D(y), weighed by  lambda = |dL_image/dW| / (|dL_G/dW| + 1e-6)       (VQGAN, arXiv 2012.09841, eq. 7)

D gives a verdict for each patch of an image, not one for the whole (pix2pix, arXiv 1611.07004). W is the last convolution of
the decoder: with lambda both losses pull at it equally hard, whatever their scales, and ``adversarial_weight`` is a plain share.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 64
MAX_ADAPTIVE = 1e4


class PatchDiscriminator(nn.Module):
    """Logits [B, 1, h, w], one a patch, of images [B, 3, H, W]; up to three halvings, as many as leave more than a patch.

    Group instead of batch normalisation: a verdict on an image does not depend on the others of its batch.
    """

    def __init__(self, image_size: int) -> None:
        super().__init__()
        halvings = max(1, min(3, image_size.bit_length() - 4))  # 16 px: 1, 32 px: 2, 64 px and more: 3
        layers: list[nn.Module] = [nn.Conv2d(3, WIDTH, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = WIDTH
        for stride in [2] * (halvings - 1) + [1]:
            layers += [nn.Conv2d(width, 2 * width, 4, stride=stride, padding=1, bias=False), nn.GroupNorm(8, 2 * width), nn.LeakyReLU(0.2)]
            width *= 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Logits [B, 1, h, w]; above 0 a patch looks real."""
        logits_B1hw: Tensor = self.layers(images_B3HW)
        return logits_B1hw


class Adversary:
    """A discriminator and its optimizer."""

    def __init__(self, image_size: int, lr: float) -> None:
        self.discriminator = PatchDiscriminator(image_size)
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=lr, betas=(0.5, 0.9))

    def verdict(self, reconstructed_B3HW: Tensor) -> Tensor:
        """-D(y), what the tokenizer minimises; the discriminator itself gets no gradient."""
        self.discriminator.requires_grad_(False)
        score: Tensor = -self.discriminator(reconstructed_B3HW).mean()
        return score

    def learn(self, images_B3HW: Tensor, reconstructed_B3HW: Tensor, lr: float) -> float:
        """One step of the discriminator; returns its loss (1 when it knows nothing, 0 when nothing fools it)."""
        self.discriminator.requires_grad_(True)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        real, fake = self.discriminator(images_B3HW), self.discriminator(reconstructed_B3HW.detach())
        loss = hinge(real, fake)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss for its logits on images and on reconstructions."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(image_loss: Tensor, adversarial_loss: Tensor, last_weight: Tensor) -> Tensor:
    """How much larger the gradient of ``image_loss`` is at ``last_weight``; a constant for the optimizer."""
    (image,) = torch.autograd.grad(image_loss, last_weight, retain_graph=True)
    (adversarial,) = torch.autograd.grad(adversarial_loss, last_weight, retain_graph=True)
    weight: Tensor = (image.norm() / (adversarial.norm() + 1e-6)).clamp(max=MAX_ADAPTIVE).detach()
    return weight
